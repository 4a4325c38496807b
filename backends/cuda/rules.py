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

from rescompile.backends.cuda import add_norm, softmax
from rescompile.backends.cuda.choose import KernelChoice, explained
from rescompile.backends.cuda.libraries import GLOBAL
from rescompile.backends.cuda.lower_windows import WINDOWS, depthwise
from rescompile.backends.cuda.rows import DTYPES, WIDEST, row_tile
from rescompile.backends.cuda.softmax import RowSoftmax
from rescompile.backends.cuda.targets import architecture
from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.fallback import NARROW
from rescompile.backends.kernels import Argument, NormSpec, Spec
from rescompile.backends.layouts import CHANNELS_LAST
from rescompile.backends.lower_attention import MASKED, attention_in_relax, softmax_in_relax
from rescompile.backends.lower_conv import conv_in_relax
from rescompile.backends.lower_linear import epilogue, matmul_of, residual_of, residual_value
from rescompile.backends.lower_norm import add_norm as add_norm_in_relax
from rescompile.backends.lower_norm import layer_norm as layer_norm_in_relax
from rescompile.backends.lower_norm import norm_by_kernel
from rescompile.backends.lower_reduce import REDUCTIONS, product
from rescompile.backends.reports import Region, bytes_of
from rescompile.backends.rules import RULES
from rescompile.backends.symbols import Extent
from rescompile.backends.working import WorkingGraph
from rescompile.graph import Op
from rescompile.kinds import OpKind
from rescompile.values import numpy_dtype

Make: TypeAlias = Callable[[], np.ndarray[Any, Any]]


class CudaEmitter(Emitter):
    """An emitter whose kernels are those for a GPU."""

    def __init__(self, graph: WorkingGraph, choice: KernelChoice | None = None) -> None:
        """`choice`: what computes each region; by default the first candidate for sm_90."""
        super().__init__(graph)
        self.choice = choice or KernelChoice(architecture("sm_90"))
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

    def call(self, op: Op, spec: Spec, given: Mapping[str, Expr], rows: Extent | None = None) -> list[Expr]:
        """Call the kernel of a norm with buffers by name; the outputs. `rows` is the dynamic row count."""
        if not isinstance(spec, NormSpec):
            return super().call(op, spec, given, rows)
        name = f"{'add_' if spec.residual else ''}{spec.kind}_norm"
        return self.call_rows(op, spec, name, add_norm, spec.dtype, given, rows)

    def softmax(self, op: Op, x: Expr, out_dtype: str, *, log: bool = False, floor: float | None = None) -> Expr | None:
        """Softmax over the last dimension, None where there is no kernel for it."""
        shape = self.shape(x)
        lead = product(shape[:-1])
        if not isinstance(shape[-1], int):
            return None
        rows = lead if isinstance(lead, int) else None
        spec = RowSoftmax(rows, shape[-1], self.dtype(x), out_dtype, log, floor)
        if not softmax.takes(spec):
            return None
        return self.reshape(self.call_rows(op, spec, "softmax", softmax, spec.dtype, {"x": x}, lead)[0], shape)

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
        rows: Extent | None = None,
    ) -> list[Expr]:
        """Call what was chosen to compute a spec with buffers by name; the outputs, a list also where there is one.

        Args:
            families: a module as in `choose.Family`, or several with the same arguments, the preferred one first.
            stem: what the kernel is called: the first part of its name, and its kind in reports.
            rows: the extent that the spec leaves to run time.
        """
        served = tuple(families) if isinstance(families, Sequence) else (families,)
        choice = self.choice.pick(spec, served)
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

    def call_rows(
        self,
        op: Op,
        spec: NormSpec | RowSoftmax,
        stem: str,
        kernel: Any,
        dtype: str,
        given: Mapping[str, Expr],
        rows: Extent | None,
    ) -> list[Expr]:
        """Call a kernel over rows: `kernel` is its module."""
        buffers = kernel.arguments(spec)
        if spec not in self._kernels:
            name = f"{stem}_{len(self.regions)}"
            self._kernels[spec] = self.bb.add_func(kernel.prim_func(spec, name), name)
            static = spec.rows is not None
            self.regions[name] = Region(
                name,
                "softmax" if isinstance(spec, RowSoftmax) else "norm",
                spec=str(spec),
                tile=str(row_tile(spec.width, dtype)),
                bytes=bytes_of(buffers) if static else None,
                dtype=str(getattr(spec, "dtype", "")),
            )
        function = self._kernels[spec]

        def call(operands: list[Expr], types: Any) -> Expr:
            return relax.call_tir(function, relax.Tuple(operands), types)

        return self._called(op, self.regions[function.name_hint], buffers, given, rows, call)

    def _called(
        self,
        op: Op,
        region: Region,
        buffers: list[Argument],
        given: Mapping[str, Expr],
        rows: Extent | None,
        call: Callable[[list[Expr], Any], Expr],
    ) -> list[Expr]:
        """The outputs of a call with operands by name, each in the shape of its buffer."""
        region.ops.append(op.name)
        region.calls += 1

        def extents(argument: Argument) -> list[Extent]:
            return [rows if extent is None else extent for extent in argument.shape]

        operands = [self.reshape(given[part.name], extents(part)) for part in buffers if not part.output]
        types = [relax.TensorType(tuple(extents(part)), part.dtype) for part in buffers if part.output]
        result = self.emit(call(operands, types[0] if len(types) == 1 else types))
        if len(types) == 1:
            return [result]
        return [self.emit(relax.TupleGetItem(result, index)) for index in range(len(types))]


def linear(e: Emitter, op: Op) -> None:
    """y = outer(residual + inner(x·weightᵀ + bias))"""
    x, weight = e.get(op.operands[0]), op.operands[1]
    if op.attr("transpose_weight"):
        matrix = e.emit(relax.op.permute_dims(e.cast(e.get(weight), e.dtype(x))))
    elif e.is_literal(weight) and weight.rank == 2:
        turned = e.weight(f"{weight.name}.transposed", lambda: e.data(weight).T)
        matrix = e.emit(relax.op.permute_dims(e.cast(turned, e.dtype(x))))
    else:
        matrix = e.cast(e.get(weight), e.dtype(x))
    out = epilogue(e, op, matmul_of(e, x, matrix), residual_of(e, op))
    e.bind(op.output, e.cast(out, op.output.dtype or e.dtype(x)))


def conv(e: Emitter, op: Op) -> None:
    """y = outer(residual + inner(conv(x) + bias)), channels last"""
    if depthwise(e, op):
        return
    value, weight = op.operands[:2]
    rank = (value.rank or 0) - 2
    if rank not in _CONVOLUTIONS:
        conv_in_relax(e, op)
        return
    function, data, kernel = _CONVOLUTIONS[rank]
    x = e.get(value, CHANNELS_LAST)
    dtype = e.dtype(x)
    out = e.emit(
        function(
            x,
            e.cast(e.get(weight, CHANNELS_LAST), dtype),
            strides=tuple(op.attr("stride"))[:rank],
            padding=tuple(op.attr("pads"))[: 2 * rank],
            dilation=tuple(op.attr("dilation"))[:rank],
            groups=int(op.attr("groups")),
            data_layout=data,
            kernel_layout=kernel,
            out_layout=data,
            out_dtype="float32" if dtype in NARROW else dtype,
        )
    )
    residual = residual_value(op)
    beside = None if residual is None else e.get(residual, CHANNELS_LAST)
    e.bind(op.output, e.cast(epilogue(e, op, out, beside), op.output.dtype or dtype), CHANNELS_LAST)


# Function, layout of the data and layout of the weight, by the number of spatial dimensions.
_CONVOLUTIONS: dict[int, tuple[Any, str, str]] = {
    1: (relax.op.nn.conv1d, "NWC", "OWI"),
    2: (relax.op.nn.conv2d, "NHWC", "OHWI"),
    3: (relax.op.nn.conv3d, "NDHWC", "ODHWI"),
}


def attention(e: Emitter, op: Op) -> None:
    """y = softmax(scale·q·kᵀ + mask)·v: two products, and one pass over the scores between them"""
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


def layer_norm(e: Emitter, op: Op) -> None:
    """y = N(x)·weight + bias over the dimensions from `axis` to the last"""
    x = e.get(op.operands[0])
    axis = op.attr("axis") % len(e.shape(x))
    if _kernel_takes(e, x, axis):
        e.bind(op.output, norm_by_kernel(e, op, x, None, axis)[0])
    else:
        layer_norm_in_relax(e, op)


def joined_norm(e: Emitter, op: Op) -> None:
    """sum = x + residual; y = N(sum); outputs y, sum"""
    x, residual = (e.cast(e.get(value), op.outputs[1].dtype) for value in op.operands[:2])
    axis = op.attr("axis") % len(e.shape(x))
    same = op.operands[0].shape == op.operands[1].shape is not None
    if not same or not _kernel_takes(e, x, axis):
        add_norm_in_relax(e, op)
        return
    for value, out in zip(op.outputs, norm_by_kernel(e, op, x, residual, axis), strict=True):
        e.bind(value, out)


def _kernel_takes(e: Emitter, x: Expr, axis: int) -> bool:
    width = product(e.shape(x)[axis:])
    return isinstance(width, int) and width <= WIDEST and e.dtype(x) in DTYPES


def _static(shape: Sequence[Extent]) -> list[int]:
    return [int(extent) for extent in shape]


CUDA_RULES = {
    **RULES,
    **WINDOWS,
    OpKind.LINEAR: linear,
    OpKind.FUSED_LINEAR: linear,
    OpKind.CONV: conv,
    OpKind.FUSED_CONV: conv,
    OpKind.ATTENTION: attention,
    OpKind.SOFTMAX: row_softmax,
    OpKind.LAYER_NORM: layer_norm,
    OpKind.RMS_NORM: layer_norm,
    OpKind.ADD_NORM: joined_norm,
}
