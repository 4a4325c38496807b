"""CPU kernels: contractions with their epilogue, attention, norms, softmax, pools, layout copies.

A kernel is described by a frozen *spec* (what is computed) and a *tile* (how it is cut):

    machine = Machine.host()
    spec    = ConvSpec(1, 56, 56, 64, 64, (3, 3), pads=(1, 1, 1, 1), in_border=(1, 1), epilogue=Epilogue(bias=True))
    tile    = choose([spec], machine)[spec].tile     # times candidates(spec, machine), remembers the fastest
    func    = prim_func(spec, tile, "conv0")         # tirx.PrimFunc; add it to an IRModule, call it by call_tir
    buffers = arguments(spec, tile)                  # names, shapes, dtypes in order: inputs, then outputs
    weight  = pack_weight(spec, tile, w)             # from torch's layout; bias = pack_bias(spec, tile, b)

- Activations of convolutions and pools are NHWC. `in_border`, `out_border`, `residual_border` are (vertical,
  horizontal) frames of zeros that are physically part of the buffers; a kernel writes its own out_border.
- Buffer order. Contractions: x, weight, [bias], [residual], y. Norms: x, [residual], [weight], [bias], y, [sum].
  Attention: qkv or q, k, v, then [mask], y. All others: x, y.
- A dimension None in an `Argument` is the dynamic row count (linears, norms, softmax with rows=None).
- Regions. A `Program` is a fused region with the `Place` of each operand and result. Alone it is a `RegionSpec`, around
  norms a `RowsSpec`, behind a contraction or a window the spec's `tail`.
- `schedule_default(func)` schedules any other legalised PrimFunc (elementwise, reductions, small contractions).
- Functions carry op_pattern 8 (opaque), so that Relax never fuses into them.
- Buffers of these kernels need only the alignment of their element type. TVM's own ops assume 64 bytes, and crash
  on a tensor that starts elsewhere, such as a slice.
"""

from __future__ import annotations

from rescompile.backends.kernels.chooser import Choice, choose
from rescompile.backends.kernels.default_schedule import schedule_default
from rescompile.backends.kernels.elementwise import RegionSpec
from rescompile.backends.kernels.families import Spec, arguments, candidates, pack_bias, pack_weight, prim_func
from rescompile.backends.kernels.machine import Machine
from rescompile.backends.kernels.product import ProductSpec
from rescompile.backends.kernels.region import Place, Program
from rescompile.backends.kernels.row_region import RowsSpec
from rescompile.backends.kernels.specs import (
    ACTIVATIONS,
    Argument,
    AttentionSpec,
    ConvSpec,
    Epilogue,
    GlobalMeanSpec,
    LayoutSpec,
    LinearSpec,
    NormSpec,
    PoolSpec,
    SoftmaxSpec,
)
from rescompile.backends.kernels.tail import Tail
from rescompile.backends.kernels.tiles import Tile

__all__ = [
    "ACTIVATIONS",
    "Argument",
    "AttentionSpec",
    "Choice",
    "ConvSpec",
    "Epilogue",
    "GlobalMeanSpec",
    "LayoutSpec",
    "LinearSpec",
    "Machine",
    "NormSpec",
    "Place",
    "PoolSpec",
    "ProductSpec",
    "Program",
    "RegionSpec",
    "RowsSpec",
    "SoftmaxSpec",
    "Spec",
    "Tail",
    "Tile",
    "arguments",
    "candidates",
    "choose",
    "pack_bias",
    "pack_weight",
    "prim_func",
    "schedule_default",
]
