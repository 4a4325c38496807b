"""Outputs of a lowered function: each a buffer of its own, which one kernel writes."""

from __future__ import annotations

from typing import Any, TypeAlias

import tvm
from tvm import relax, topi

Expr: TypeAlias = Any

_SAME_MEMORY = ("relax.reshape", "relax.memory.view", "relax.memory.ensure_zero_offset")


def own_outputs(module: tvm.IRModule) -> tvm.IRModule:
    """What is an input, a weight, a view of one, or returned twice, is copied: its buffer is not the caller's to have."""
    main = module["main"]
    body = main.body
    if not isinstance(body, relax.SeqExpr):
        return module
    values = {binding.var: binding.value for block in body.blocks for binding in block.bindings}
    last = body.blocks[-1].bindings[-1]
    result = values[body.body]
    parts = list(result.fields) if isinstance(result, relax.Tuple) else [body.body]
    builder = relax.BlockBuilder(module)
    seen: list[Expr] = []
    wanted: dict[int, Expr] = {}
    for index, part in enumerate(parts):
        base = _base(part, values)
        fresh = base is not None and not any(base.same_as(other) for other in seen)
        if fresh:
            seen.append(base)
        else:
            wanted[index] = part
    if not wanted:
        return module
    bindings = [*body.blocks[-1].bindings]
    if isinstance(result, relax.Tuple):
        bindings.remove(last)
    for index, part in wanted.items():
        call = builder.call_te(topi.identity, part, primfunc_name_hint="copy_output")
        copied = relax.DataflowVar(f"copied_{index}", part.ty)
        bindings.append(relax.VarBinding(copied, call))
        parts[index] = copied
    packed = relax.Tuple(parts) if isinstance(result, relax.Tuple) else parts[0]
    out = relax.Var("outputs", packed.ty if isinstance(result, relax.Tuple) else parts[0].ty)
    bindings.append(relax.VarBinding(out, packed))
    kind = type(body.blocks[-1])
    blocks = [*body.blocks[:-1], kind(bindings)]
    made = relax.Function(main.params, relax.SeqExpr(blocks, out), main.ret_ty, main.is_pure, main.attrs)
    copied_module = builder.get()
    copied_module.update_func(copied_module.get_global_var("main"), made)
    return copied_module


def _base(expr: Expr, values: dict[Expr, Expr]) -> Expr | None:
    """The variable of the call that writes this memory, None where no call of the function does."""
    while True:
        value = values.get(expr)
        if value is None:
            return None
        if isinstance(value, relax.Var):
            expr = value
        elif isinstance(value, relax.TupleGetItem):
            inner = values.get(value.tuple_value)
            if isinstance(inner, relax.Tuple):
                expr = inner.fields[value.index]
            else:
                return None if inner is None else expr
        elif isinstance(value, relax.Call) and getattr(value.op, "name", "") in _SAME_MEMORY:
            expr = value.args[0]
        elif isinstance(value, relax.Call):
            return expr
        else:
            return None
