"""Calls of the CUDA kernel that adds a residual and normalises."""

from __future__ import annotations

from math import prod

from tvm import relax

from rescompile.backends import cuda_add_norm
from rescompile.backends.cuda_add_norm import AddNormSpec
from rescompile.backends.emitter import Emitter, Expr
from rescompile.backends.lower_reduce import product
from rescompile.backends.reports import Region
from rescompile.graph import Op


class CudaNorms:
    """The kernels of one program, one for each spec."""

    def __init__(self) -> None:
        self._functions: dict[AddNormSpec, Expr] = {}

    def takes(self, e: Emitter, x: Expr, residual: Expr, axis: int) -> bool:
        """Whether there is a kernel for a norm over the dimensions from `axis` on."""
        width = product(e.shape(x)[axis:])
        same = [str(extent) for extent in e.shape(x)] == [str(extent) for extent in e.shape(residual)]
        return isinstance(width, int) and same and e.dtype(x) in cuda_add_norm.DTYPES

    def add_norm(self, e: Emitter, op: Op, x: Expr, residual: Expr, axis: int) -> list[Expr]:
        """y and sum."""
        shape = e.shape(x)
        rows, width = product(shape[:axis]), product(shape[axis:])
        rms = op.attr("norm") == "rms"
        weight, bias = op.operand("weight"), None if rms else op.operand("bias")
        spec = AddNormSpec(
            rows if isinstance(rows, int) else None,
            width,
            "rms" if rms else "layer",
            weight is not None,
            bias is not None,
            float(op.attr("eps")),
            e.dtype(x),
        )
        if spec not in self._functions:
            name = f"add_norm_{len(self._functions)}"
            self._functions[spec] = e.bb.add_func(cuda_add_norm.prim_func(spec, name), name)
            tile = str(cuda_add_norm.shape_of(spec))
            size = 4 * prod((spec.rows, width)) * cuda_add_norm.DTYPES[spec.dtype] if spec.rows is not None else None
            e.regions[name] = Region(name, "add_norm", spec=str(spec), tile=tile, bytes=size)
        function = self._functions[spec]
        region = e.regions[function.name_hint]
        region.ops.append(op.name)
        region.calls += 1
        operands = [e.reshape(x, [rows, width]), e.reshape(residual, [rows, width])]
        for value in (weight, bias):
            if value is not None:
                operands.append(e.reshape(e.cast(e.get(value), spec.dtype), [width]))
        row = relax.TensorType((rows, width), spec.dtype)
        result = e.emit(relax.call_tir(function, relax.Tuple(operands), [row, row]))
        return [e.reshape(e.emit(relax.TupleGetItem(result, index)), shape) for index in range(2)]
