"""x·wᵀ as one loop nest that reads w as it lies.

TVM's own pass takes the first operand of what it has matched for the weight, which it is not where x was bound first,
and expects two of them, which x·xᵀ has not.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator
from tvm.relax.transform.fuse_transpose_matmul import _pattern, _TransposeMatmulFuser

_NAME = "transpose_matmul_fuse"


@tvm.transform.module_pass(opt_level=0, name="JoinTransposedMatmul")
def join_transposed_matmul(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    """A product with a transposed operand, and that transposition, as one."""
    matched = relax.transform.FuseOpsByPattern([(_NAME, *_pattern())], bind_constants=False)(module)
    fuser = _Fuser(matched)
    for name, function in matched.functions_items():
        if isinstance(function, relax.Function):
            fuser.builder_.update_func(name, fuser.visit_expr(function))
    return fuser.builder_.get()


@mutator
class _Fuser(_TransposeMatmulFuser._cls):  # type: ignore[misc, name-defined]
    def visit_call_(self, call: Any) -> Any:
        if isinstance(call.op, relax.GlobalVar):
            function = self.builder_.get()[call.op]
            if function.attrs is not None and function.attrs.get("Composite") == _NAME:
                call = relax.Call(call.op, [call.args[place] for place in _places(function)])
        return super().visit_call_(call)


def _places(function: Any) -> tuple[int, int]:
    """Which parameters of a matched function the weight and the other factor are."""
    params = list(function.params)

    def place(value: Any) -> int:
        return next(index for index, param in enumerate(params) if param.same_as(value))

    weight = factor = 0
    for block in function.body.blocks:
        for binding in block.bindings:
            name = binding.value.op.name
            if name == "relax.permute_dims":
                weight = place(binding.value.args[0])
            elif name == "relax.matmul":
                factor = place(binding.value.args[0])
    return weight, factor
