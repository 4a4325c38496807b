"""How operations are lowered for a GPU where it is not as for a processor.

Norms and softmax are calls of our kernels. Products read weights as [out, in], as torch keeps them, and convolutions
run channels last: both operands then lie along the summed axis, which is what tensor cores and 128-bit accesses want.
What is done to a weight alone is done when compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, TypeAlias

import numpy as np
import tvm
from tvm import relax

from rescompile.backends.cuda import composed, flash, softmax
from rescompile.backends.cuda.choose import KernelChoice, explained
from rescompile.backends.cuda.libraries import GLOBAL
from rescompile.backends.cuda.lower_contraction import conv as product_conv
from rescompile.backends.cuda.lower_contraction import linear, matmul
from rescompile.backends.cuda.lower_region import REGIONS
from rescompile.backends.cuda.lower_windows import WINDOWS, depthwise
from rescompile.backends.cuda.softmax import RowSoftmax
from rescompile.backends.cuda.targets import Architecture, architecture
from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.kernels import Argument, AttentionSpec
from rescompile.backends.lower_attention import MASKED, attention_by_kernel, attention_in_relax, softmax_in_relax
from rescompile.backends.lower_reduce import REDUCTIONS, product
from rescompile.backends.reports import Region, bytes_of
from rescompile.backends.rules import RULES
from rescompile.backends.symbols import Extent
from rescompile.backends.working import WorkingGraph
from rescompile.graph import Op
from rescompile.kinds import OpKind
from rescompile.values import numpy_dtype

Make: TypeAlias = Callable[[], np.ndarray[Any, Any]]
Rows: TypeAlias = "Extent | Mapping[str, Sequence[Extent]] | None"


class CudaEmitter(Emitter):
    """An emitter whose kernels are those for a GPU."""

    def __init__(self, graph: WorkingGraph, choice: KernelChoice | None = None, *, tf32: bool = False) -> None:
        """`choice`: what computes each region; by default the first candidate for sm_90.

        `tf32`: whether products of float32 may be rounded to 10 bits after the point.
        """
        super().__init__(graph)
        self.choice, self.tf32 = choice or KernelChoice(architecture("sm_90")), tf32
        self._makers: dict[int, tuple[Expr, str, Make]] = {}
        self._kernels: dict[Any, Expr] = {}
        self._calls: dict[Any, Region] = {}

    def weight(self, name: str, make: Make, shape: Sequence[int] | None = None, dtype: str | None = None) -> Expr:
        """A tensor known at compile time; it can be cast and reshaped at compile time too."""
        made = super().weight(name, make, shape, dtype)
        self._makers[id(made)] = (made, name, make)
        return made

    def cast(self, expr: Expr, dtype: str | None) -> Expr:
        """`expr` in another element type."""
        known = self._makers.get(id(expr))
        if known is None or dtype in (None, "bool", self.dtype(expr)):
            return super().cast(expr, dtype)
        _, name, make = known
        to = str(dtype)
        return self.weight(f"{name}@{to}", lambda: make().astype(numpy_dtype(to)), _static(self.shape(expr)), to)

    def reshape(self, expr: Expr, shape: Sequence[Extent]) -> Expr:
        """`expr` with other extents."""
        known = self._makers.get(id(expr))
        if known is None or self.shape(expr) == list(shape):
            return super().reshape(expr, shape)
        _, name, make = known
        elements = prod(_static(self.shape(expr)))
        fixed = prod(extent for extent in shape if extent != -1)
        to = [elements // fixed if extent == -1 else int(extent) for extent in shape]
        return self.weight(f"{name}@{to}", lambda: make().reshape(to), to, self.dtype(expr))

    def softmax(self, op: Op, x: Expr, out_dtype: str, *, log: bool = False, floor: float | None = None) -> Expr | None:
        """Softmax over the last dimension, None where there is no kernel for it."""
        shape = self.shape(x)
        lead = product(shape[:-1])
        if not isinstance(shape[-1], int):
            return None
        rows = lead if isinstance(lead, int) else None
        spec = RowSoftmax(rows, shape[-1], self.dtype(x), out_dtype, log, floor)
        if not self.takes(spec, softmax):
            return None
        return self.reshape(self.call_kernel(op, spec, softmax, "softmax", {"x": x}, lead)[0], shape)

    @property
    def limits(self) -> Architecture:
        """What the GPU can do."""
        return self.choice.limits

    def call(self, op: Op, spec: Any, given: Mapping[str, Expr], rows: Extent | None = None) -> list[Expr]:
        """Call what computes attention, one kernel before all else; nothing where it is to be composed."""
        if not isinstance(spec, AttentionSpec):
            return super().call(op, spec, given, rows)
        return self.call_kernel(op, spec, (flash, composed), "attention", given)

    def takes(self, spec: Any, *families: Any) -> bool:
        """Whether one of the families, modules as in `choose.Family`, has a kernel for the spec."""
        return any(not family.refusal(spec, self.choice.limits) for family in families)

    def call_kernel(
        self,
        op: Op,
        spec: Any,
        families: Any,
        stem: str,
        given: Mapping[str, Expr],
        rows: Rows = None,
    ) -> list[Expr]:
        """Call what was chosen to compute a spec with buffers by name; the outputs, none where it is to be composed.

        Args:
            families: a module as in `choose.Family`, or several with the same arguments, the preferred one first.
            stem: what the kernel is called: the first part of its name, and its kind in reports.
            rows: the extent that the spec leaves to run time, or the extents of each buffer by name.
        """
        served = tuple(families) if isinstance(families, Sequence) else (families,)
        choice = self.choice.pick(spec, served)
        if choice.candidate.inline:
            return []
        buffers: list[Argument] = served[0].arguments(spec)
        if spec not in self._calls:
            name = f"{stem}_{len(self.regions)}"
            if choice.candidate.library is None:
                self._kernels[spec] = self.bb.add_func(choice.candidate.prim_func(spec, name), name)
            static = all(extent is not None for part in buffers for extent in part.shape)
            self._calls[spec] = self.regions[name] = Region(
                name,
                stem,
                spec=str(spec),
                tile=choice.candidate.label,
                flops=getattr(spec, "flops", None) if static else None,
                bytes=bytes_of(buffers) if static else None,
                dtype=str(getattr(spec, "dtype", "")),
                **explained(choice),
            )
        library = choice.candidate.library

        def call(operands: list[Expr], types: Any) -> Expr:
            if library is None:
                return relax.call_tir(self._kernels[spec], relax.Tuple(operands), types)
            told = relax.Tuple([tvm.ir.StringImm(library.text()), *operands])
            return relax.op.call_dps_packed(GLOBAL, told, types)

        return self._called(op, self._calls[spec], buffers, given, rows, call)

    def _called(
        self,
        op: Op,
        region: Region,
        buffers: list[Argument],
        given: Mapping[str, Expr],
        rows: Rows,
        call: Callable[[list[Expr], Any], Expr],
    ) -> list[Expr]:
        """The outputs of a call with operands by name, each in the shape of its buffer."""
        region.ops.append(op.name)
        region.calls += 1

        def extents(argument: Argument) -> list[Extent]:
            if isinstance(rows, Mapping):
                return list(rows[argument.name])
            return [rows if extent is None else extent for extent in argument.shape]

        operands = [given[part.name] for part in buffers if not part.output]
        if not isinstance(rows, Mapping):
            shapes = [extents(part) for part in buffers if not part.output]
            operands = [self.reshape(operand, shape) for operand, shape in zip(operands, shapes, strict=True)]
        types = [relax.TensorType(tuple(extents(part)), part.dtype) for part in buffers if part.output]
        result = self.emit(call(operands, types[0] if len(types) == 1 else types))
        if len(types) == 1:
            return [result]
        return [self.emit(relax.TupleGetItem(result, index)) for index in range(len(types))]


def conv(e: Emitter, op: Op) -> None:
    """y = outer(residual + inner(conv(x) + bias)), channels last"""
    if not depthwise(e, op):
        product_conv(e, op)


def attention(e: Emitter, op: Op) -> None:
    """y = softmax(scale·q·kᵀ + mask)·v: a library's, or two products and one pass over the scores between them"""
    if not attention_by_kernel(e, op):
        e.bind(op.output, attention_in_relax(e, op, _attention_weights))


def _attention_weights(e: Emitter, op: Op, scores: Expr, dtype: str) -> Expr:
    floor = MASKED if op.operand("mask") is not None else None
    made = e.softmax(op, scores, dtype, floor=floor) if isinstance(e, CudaEmitter) else None
    return softmax_in_relax(e, op, scores, dtype) if made is None else made


def row_softmax(e: Emitter, op: Op) -> None:
    """y = exp(x − max) / sum of exp(x − max) along `axis`; its logarithm with `log`"""
    x = e.get(op.operands[0])
    last = op.attr("axis") % len(e.shape(x)) == len(e.shape(x)) - 1
    dtype = str(op.output.dtype or e.dtype(x))
    made = e.softmax(op, x, dtype, log=bool(op.attr("log"))) if last and isinstance(e, CudaEmitter) else None
    if made is None:
        REDUCTIONS[OpKind.SOFTMAX](e, op)
    else:
        e.bind(op.output, made)


def _static(shape: Sequence[Extent]) -> list[int]:
    return [int(extent) for extent in shape]


CUDA_RULES = {
    **RULES,
    **WINDOWS,
    OpKind.LINEAR: linear,
    OpKind.FUSED_LINEAR: linear,
    OpKind.CONV: conv,
    OpKind.FUSED_CONV: conv,
    OpKind.MATMUL: matmul,
    OpKind.ATTENTION: attention,
    OpKind.SOFTMAX: row_softmax,
    **REGIONS,
}
