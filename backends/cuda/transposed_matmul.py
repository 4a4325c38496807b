"""x·wᵀ as one loop nest that reads w as it lies.

TVM's own pass takes whatever it has matched for a transposition of the first operand and a product: also a product
alone where two products share the transposition (wrong numbers where w is square), and x·xᵀ, which has one operand.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import mutator
from tvm.relax.transform.fuse_transpose_matmul import _pattern, _TransposeMatmulFuser

_NAME = "transpose_matmul_fuse"


@tvm.transform.module_pass(opt_level=0, name="JoinTransposedMatmul")  # type: ignore[untyped-decorator]
def join_transposed_matmul(module: tvm.IRModule, _: tvm.transform.PassContext) -> tvm.IRModule:
    """A product with a transposed operand, and that transposition, as one."""
    matched = relax.transform.FuseOpsByPattern([(_NAME, *_pattern())], bind_constants=False)(module)
    fuser = _Fuser(matched)
    for name, function in matched.functions_items():
        if isinstance(function, relax.Function):
            fuser.builder_.update_func(name, fuser.visit_expr(function))
    return fuser.builder_.get()


@mutator
class _Fuser(_TransposeMatmulFuser._cls):  # type: ignore[misc]
    def visit_call_(self, call: Any) -> Any:
        if isinstance(call.op, relax.GlobalVar):
            function = self.builder_.get()[call.op]
            if function.attrs is not None and function.attrs.get("Composite") == _NAME:
                return self._joined(call, function)
        return super().visit_call_(call)

    def _joined(self, call: Any, function: Any) -> Any:
        """The product of what was matched."""
        steps = {binding.value.op.name: binding.value for block in function.body.blocks for binding in block.bindings}
        product, turned = steps["relax.matmul"], steps.get("relax.permute_dims")
        params = list(function.params)

        def given(value: Any) -> Any:
            return call.args[next(index for index, param in enumerate(params) if param.same_as(value))]

        if turned is None:
            return relax.op.matmul(*map(given, product.args), out_dtype=product.attrs.out_dtype)
        weight, factor = given(turned.args[0]), given(product.args[0])
        if not isinstance(function.ret_ty, relax.TensorType):  # others read the transposition
            other = self.builder_.emit(relax.op.permute_dims(weight, turned.attrs.axes))
            made = self.builder_.emit(relax.op.matmul(factor, other, out_dtype=product.attrs.out_dtype))
            return relax.Tuple([other, made])
        return super().visit_call_(relax.Call(call.op, [weight, factor]))
