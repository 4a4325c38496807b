"""Outputs of a lowered function: each a buffer of its own, which one kernel writes."""

from __future__ import annotations

from typing import Any, TypeAlias

import tvm
from tvm import relax, topi

Expr: TypeAlias = Any

_SAME_MEMORY = ("relax.reshape", "relax.memory.view", "relax.memory.ensure_zero_offset")


def own_outputs(module: tvm.IRModule) -> tvm.IRModule:
    """A copy for what is an input, a weight, a view of one, or returned twice: its memory is not the caller's."""
    main = module["main"]
    body = main.body
    values = {binding.var: binding.value for block in body.blocks for binding in block.bindings}
    result = values[body.body]
    parts = list(result.fields) if isinstance(result, relax.Tuple) else [body.body]
    taken: list[Expr] = []
    shared: list[int] = []
    for index, part in enumerate(parts):
        base = _base(part, values)
        if base is None or any(base.same_as(other) for other in taken):
            shared.append(index)
        else:
            taken.append(base)
    if not shared:
        return module
    builder = relax.BlockBuilder(module)
    last = body.blocks[-1]
    bindings = [binding for binding in last.bindings if not binding.var.same_as(body.body) or len(parts) == 1]
    for index in shared:
        copied = relax.DataflowVar(f"copied_{index}", parts[index].ty)
        call = builder.call_te(topi.identity, parts[index], primfunc_name_hint="copy_output")
        bindings.append(relax.VarBinding(copied, call))
        parts[index] = copied
    returned = relax.Tuple(parts) if isinstance(result, relax.Tuple) else parts[0]
    outputs = relax.Var("outputs", body.body.ty)
    bindings.append(relax.VarBinding(outputs, returned))
    blocks = [*body.blocks[:-1], type(last)(bindings)]
    made = relax.Function(main.params, relax.SeqExpr(blocks, outputs), main.ret_ty, main.is_pure, main.attrs)
    out = builder.get()
    out.update_func(out.get_global_var("main"), made)
    return out


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
