"""How operations are lowered for a GPU where it is not as for a processor: norms are called, the rest is generated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import relax

from rescompile.backends.cuda import add_norm
from rescompile.backends.emitter import Emitter, Expr, Region
from rescompile.backends.kernels import NormSpec, Spec
from rescompile.backends.lower_norm import add_norm as add_norm_in_relax
from rescompile.backends.lower_norm import layer_norm as layer_norm_in_relax
from rescompile.backends.lower_norm import norm_by_kernel
from rescompile.backends.lower_reduce import product
from rescompile.backends.rules import RULES
from rescompile.backends.symbols import Extent
from rescompile.graph import Op
from rescompile.kinds import OpKind


class CudaEmitter(Emitter):
    """An emitter whose kernels are those for a GPU."""

    def call(self, op: Op, spec: Spec, given: Mapping[str, Expr], rows: Extent | None = None) -> list[Expr]:
        """Call the kernel of a norm with buffers by name; the outputs. `rows` is the dynamic row count."""
        if not isinstance(spec, NormSpec):
            return super().call(op, spec, given, rows)
        if spec not in self._functions:
            name = f"{'add_' if spec.residual else ''}{spec.kind}_norm_{len(self._functions)}"
            self._functions[spec] = self.bb.add_func(add_norm.prim_func(spec, name), name)
            tile = add_norm.row_tile(spec.width, spec.dtype)
            self.regions[name] = Region(name, "norm", spec=str(spec), tile=str(tile))
        function = self._functions[spec]
        region = self.regions[function.name_hint]
        region.ops.append(op.name)
        region.calls += 1

        def extents(argument: Any) -> list[Extent]:
            return [rows if extent is None else extent for extent in argument.shape]

        arguments = add_norm.arguments(spec)
        operands = [self.reshape(given[part.name], extents(part)) for part in arguments if not part.output]
        types = [relax.TensorType(tuple(extents(part)), part.dtype) for part in arguments if part.output]
        result = self.emit(relax.call_tir(function, relax.Tuple(operands), types[0] if len(types) == 1 else types))
        if len(types) == 1:
            return [result]
        return [self.emit(relax.TupleGetItem(result, index)) for index in range(len(types))]


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
    return isinstance(width, int) and width <= add_norm.WIDEST and e.dtype(x) in add_norm.DTYPES


CUDA_RULES = {
    **RULES,
    OpKind.LAYER_NORM: layer_norm,
    OpKind.RMS_NORM: layer_norm,
    OpKind.ADD_NORM: joined_norm,
}
