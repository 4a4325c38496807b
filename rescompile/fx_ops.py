"""Spellings: what a torch.fx node calls, under one name and with named arguments.

torch has many ways to say the same: `aten.relu.default`, `aten.relu_.default`, `torch.relu`, `F.relu(inplace=True)`,
`x.relu()`, `nn.ReLU()`. `spell` reads each of them into a `Call`: the name of the ATen operation without overload and
trailing underscore ("relu"), its arguments by schema name with the schema's defaults filled in (the first tensor is
always `input`), and whether the call changes its first argument. `rescompile.fx_rules` goes on from there.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload


@dataclass(frozen=True, slots=True)
class Attr:
    """The tensor at a dotted path of the module: a parameter or a buffer that no node need have read."""

    target: str


@dataclass(slots=True)
class Call:
    """One call: operation, arguments by name, and the argument it writes to ("" for none)."""

    name: str
    args: dict[str, Any]
    writes: str = ""


@dataclass(frozen=True, slots=True)
class _Signature:
    name: str
    names: tuple[str, ...]
    defaults: Mapping[str, Any]
    writes: str


# Python operators by function; the in-place ones write to their first operand when that is a tensor.
OPERATORS: dict[Callable[..., Any], str] = {
    operator.add: "add",
    operator.sub: "sub",
    operator.mul: "mul",
    operator.truediv: "div",
    operator.floordiv: "floor_divide",
    operator.mod: "remainder",
    operator.pow: "pow",
    operator.matmul: "matmul",
    operator.neg: "neg",
    operator.eq: "eq",
    operator.ne: "ne",
    operator.lt: "lt",
    operator.le: "le",
    operator.gt: "gt",
    operator.ge: "ge",
    operator.and_: "bitwise_and",
    operator.or_: "bitwise_or",
    operator.invert: "bitwise_not",
    operator.getitem: "getitem",
    operator.iadd: "iadd",
    operator.isub: "isub",
    operator.imul: "imul",
    operator.itruediv: "idiv",
    operator.imatmul: "matmul",
    operator.setitem: "setitem",
    operator.abs: "abs",
    abs: "abs",
    sum: "builtin_sum",
    getattr: "getattr",
    len: "len",
    int: "int",
    float: "float",
    torch.sym_float: "float",
    torch.sym_int: "int",
}
_AUGMENTED = {"iadd": "add", "isub": "sub", "imul": "mul", "idiv": "div"}
_OPERATOR_NAMES = ("input", "other")
_RENAMED = {"self": "input", "tensor": "input", "x": "input", "axis": "dim", "keepdims": "keepdim", "a": "input"}
_RENAMED |= {"axis0": "dim0", "axis1": "dim1"}  # of swapaxes
# Functions whose name in torch differs from that of the ATen operation.
_ALIASES = {
    "cat": "cat",
    "concat": "cat",
    "concatenate": "cat",
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "clip": "clamp",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "row_stack": "vstack",
    "movedim": "movedim",
    "special_erf": "erf",
    "special_expit": "sigmoid",
    "expit": "sigmoid",
    "tensor_split": "tensor_split",
    "split_with_sizes_copy": "split_with_sizes",
    "unsafe_chunk": "chunk",
    "unsafe_split": "split",
    "_unsafe_view": "view",
    "view_copy": "view",
    "permute_copy": "permute",
    "expand_copy": "expand",
    "slice_copy": "slice",
    "select_copy": "select",
    "squeeze_copy": "squeeze",
    "unsqueeze_copy": "unsqueeze",
    "t_copy": "t",
    "transpose_copy": "transpose",
    "alias_copy": "alias",
    "repeat_interleave": "repeat_interleave",
}
# Methods whose trailing integers are one list: x.view(2, -1) is x.view((2, -1)).
_VARIADIC = frozenset(
    {
        "view",
        "reshape",
        "permute",
        "expand",
        "repeat",
        "flip",
        "tile",
        "new_zeros",
        "new_ones",
        "new_empty",
        "unflatten",
    }
)
_FUNCTION_MODULES = ("torch", "_operator", "operator")
_FOREIGN = frozenset({"torchvision.ops.stochastic_depth.stochastic_depth"})


def _rename(name: str) -> str:
    return _RENAMED.get(name, name)


@lru_cache(maxsize=4096)
def _overload_signature(target: OpOverload) -> _Signature:
    schema = target._schema
    base = schema.name.rpartition("::")[2]
    first = schema.arguments[0] if schema.arguments else None
    alias = first.alias_info if first is not None else None
    writes = ""
    if alias is not None and alias.is_write and first is not None:
        writes = _rename(first.name)
        if base.endswith("_") and not base.endswith("__"):
            base = base[:-1]
    names = tuple(_rename(argument.name) for argument in schema.arguments)
    defaults = {_rename(a.name): a.default_value for a in schema.arguments if a.has_default_value()}
    return _Signature(_ALIASES.get(base, base), names, defaults, writes)


@lru_cache(maxsize=1024)
def _python_signature(function: Callable[..., Any]) -> _Signature | None:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):
        return None
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return None
    names = tuple(_rename(p.name) for p in parameters)
    defaults = {_rename(p.name): p.default for p in parameters if p.default is not p.empty}
    return _Signature(function.__name__, names, defaults, "")


def _bind(signature: _Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    bound = dict(signature.defaults)
    bound.update(zip(signature.names, args, strict=False))
    for key, value in kwargs.items():
        bound[_rename(key)] = value
    return bound


def _fits(value: Any, wanted: str, numbers_as_tensors: bool) -> bool:
    """Whether an argument may stand for a schema type."""
    if wanted.endswith("?"):
        return value is None or _fits(value, wanted[:-1], numbers_as_tensors)
    if isinstance(value, fx.Node):
        if wanted in ("int[]", "SymInt[]") and _is_shape(value):
            return True
        return wanted not in ("bool", "str", "ScalarType", "int", "int[]", "SymInt[]") or not _holds_tensor(value)
    if wanted in ("int", "SymInt"):
        return isinstance(value, int) and not isinstance(value, bool)
    if wanted in ("float", "Scalar", "number"):
        return isinstance(value, int | float)
    if wanted == "bool":
        return isinstance(value, bool)
    if wanted == "str":
        return isinstance(value, str)
    if wanted.startswith(("int[", "SymInt[")):
        listed = isinstance(value, list | tuple) and all(isinstance(x, int | fx.Node) for x in value)
        return listed or (isinstance(value, int) and not isinstance(value, bool))
    if wanted.startswith("Tensor["):
        return isinstance(value, list | tuple)
    if wanted == "ScalarType":
        return isinstance(value, torch.dtype)
    if wanted == "Device":
        return isinstance(value, torch.device | str)
    if wanted == "Tensor":
        return isinstance(value, Attr) or (numbers_as_tensors and isinstance(value, int | float))
    return True


def _is_shape(node: fx.Node) -> bool:
    """Whether a node of a graph without shapes gives all extents of a tensor."""
    if node.op == "call_method":
        return node.target == "size" and len(node.args) == 1 and not node.kwargs
    return node.target is getattr and node.args[1] == "shape"


def _holds_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val", node.meta.get("tensor_meta"))
    return value is None or isinstance(value, torch.Tensor) or hasattr(value, "dtype")


def _schema_type(argument: Any) -> str:
    text = str(argument.type)
    for prefix in ("Optional[", "List["):
        if text.startswith(prefix):
            inner = text[len(prefix) : -1]
            return (
                f"{inner.replace('List[', '').rstrip(']')}[]?"
                if "List[" in inner
                else (f"{inner}?" if prefix == "Optional[" else f"{inner}[]")
            )
    return text


@lru_cache(maxsize=1024)
def _candidates(base: str) -> tuple[tuple[_Signature, tuple[str, ...], int], ...]:
    """Overloads of an ATen operation: signature, argument types, number of positional arguments."""
    packet = getattr(torch.ops.aten, base, None)
    if packet is None:
        return ()
    found = []
    for name in packet.overloads():
        schema = getattr(packet, name)._schema
        if any(argument.is_out for argument in schema.arguments) or not schema.arguments:
            continue
        if "Tensor" not in str(schema.arguments[0].type) and base not in ("arange", "full", "zeros", "ones", "where"):
            continue
        positional = sum(not argument.kwarg_only for argument in schema.arguments)
        types = tuple(_schema_type(argument) for argument in schema.arguments)
        found.append((_overload_signature(getattr(packet, name)), types, positional))
    return tuple(found)


def _bind_by_schema(base: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Arguments by the first overload that takes them: one that takes numbers as numbers, if there is one."""
    named = {_rename(key): value for key, value in kwargs.items() if value is not None}
    for numbers_as_tensors in (False, True):
        for signature, types, positional in _candidates(base):
            given = {**dict(zip(signature.names, args, strict=False)), **named}
            if len(args) > positional or not set(given) <= set(signature.names):
                continue
            if any(name not in given and name not in signature.defaults for name in signature.names):
                continue
            wanted = dict(zip(signature.names, types, strict=True))
            if all(_fits(value, wanted[name], numbers_as_tensors) for name, value in given.items()):
                return {**signature.defaults, **given}
    return None


def _spell_function(node: fx.Node) -> Call | None:
    target: Any = node.target
    name = OPERATORS.get(target)
    if name is not None:
        args = dict(zip(_OPERATOR_NAMES, node.args, strict=False))
        if name in _AUGMENTED:
            return Call(_AUGMENTED[name], args, "input")
        if name == "setitem":
            return Call(name, {"args": node.args}, "input")
        if name in ("getattr", "builtin_sum"):
            return Call(name, {"args": node.args, **node.kwargs})
        return Call(name, args)
    module = getattr(target, "__module__", None) or "torch"
    qualified = f"{module}.{getattr(target, '__name__', '')}"
    if module.partition(".")[0] not in _FUNCTION_MODULES and qualified not in _FOREIGN:
        return None
    return _spell_named(target, node)


def _spell_named(target: Any, node: fx.Node) -> Call | None:
    base = getattr(target, "__name__", "")
    if not base:
        return None
    args, kwargs = node.args, dict(node.kwargs)
    signature = _python_signature(target) if inspect.isfunction(target) else None
    if signature is not None:
        bound: dict[str, Any] | None = _bind(signature, args, kwargs)
    else:
        bound = None
    return _named_call(base, args, kwargs, bound)


def _named_call(base: str, args: tuple[Any, ...], kwargs: dict[str, Any], bound: dict[str, Any] | None) -> Call | None:
    writes = ""
    if base.endswith("_") and not base.startswith("_"):
        base, writes = base[:-1], "input"
    base = _ALIASES.get(base, base)
    if base.startswith("fft_"):
        return Call(base, {"input": args[0] if args else kwargs.get("input")})
    if base == "einsum":
        operands = args[1:]
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = tuple(operands[0])
        return Call(base, {"equation": args[0], "tensors": operands})
    if bound is None:
        if kwargs.pop("return_indices", False):
            base = f"{base}_with_indices"
        if base == "dim":
            return Call("ndim", {"input": args[0]})
        if base in ("size", "type", "contiguous", "float", "half", "double", "bfloat16", "int", "long", "bool", "item"):
            return Call(base, {"input": args[0], "other": args[1] if len(args) > 1 else kwargs.get("dim")})
        bound = _bind_by_schema(base, args, kwargs)
    if bound is None:
        return None
    if bound.get("inplace"):
        writes = "input"
    return Call(base, bound, writes)


def _spell_method(node: fx.Node) -> Call | None:
    base = str(node.target)
    args = node.args
    head = 2 if base == "unflatten" else 1
    if base in _VARIADIC and len(args) > head and not isinstance(args[head], list | tuple | torch.Size):
        only = args[head]
        listed = len(args) == head + 1 and isinstance(only, fx.Node) and not is_extent(only)
        if not listed:
            args = (*args[:head], list(args[head:]))
    if base == "to":
        wanted = args[1] if len(args) > 1 else node.kwargs.get("dtype")
        return Call("to", {"input": args[0], "dtype": wanted if isinstance(wanted, torch.dtype) else None})
    if base == "transpose" and len(args) == 3:
        return Call("transpose", {"input": args[0], "dim0": args[1], "dim1": args[2]})
    return _named_call(base, args, dict(node.kwargs), None)


def is_extent(node: fx.Node) -> bool:
    """Whether a node of a graph without shapes gives an integer: an extent, or arithmetic on one."""
    if "val" in node.meta:
        return not isinstance(node.meta["val"], torch.Tensor | tuple | list)
    if node.op == "call_method" and node.target == "size":
        return len(node.args) > 1 or bool(node.kwargs)
    if node.op == "call_method" and node.target == "dim":
        return True
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        if not isinstance(source, fx.Node):
            return False
        size = source.op == "call_method" and source.target == "size"
        return size or (source.target is getattr and source.args[1] == "shape")
    if node.target in OPERATORS:
        return all(is_extent(argument) for argument in node.all_input_nodes) and bool(node.all_input_nodes)
    return False


def spell(node: fx.Node, modules: Mapping[str, nn.Module]) -> Call | None:
    """What a call node calls, None when it is nothing that rescompile knows. `modules`: the graph's, by dotted path."""
    op = node.op
    if op == "call_function":
        target = node.target
        if isinstance(target, OpOverload):
            signature = _overload_signature(target)
            return Call(signature.name, _bind(signature, node.args, node.kwargs), signature.writes)
        return _spell_function(node)
    if op == "call_method":
        return _spell_method(node)
    if op == "call_module":
        from rescompile.fx_modules import spell_module

        return spell_module(modules[str(node.target)], str(node.target), node)
    return None


def python_argument(function: Any, name: str) -> int | None:
    """Position of an argument of a Python function of torch, None when it has none of that name."""
    signature = _python_signature(function) if inspect.isfunction(function) else None
    return signature.names.index(name) if signature is not None and name in signature.names else None
