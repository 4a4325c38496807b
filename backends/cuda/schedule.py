"""Bind every generated function to the threads of a GPU, by the first of dlight's rules that fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir import dlight

from rescompile.backends.cuda.targets import THREADS_PER_BLOCK
from rescompile.backends.cuda.tensor_core import TensorCoreProduct
from rescompile.errors import RescompileError


class _Matmul(dlight.gpu.Matmul):  # type: ignore[misc]
    """dlight's rule for products, in registers and shared memory. It looks for tensor cores by the target's number."""

    def apply(self, func: tirx.PrimFunc, target: tvm.target.Target, _: bool) -> Any:
        plain = {**{str(key): value for key, value in dict(target.attrs).items()}, "kind": "cuda", "arch": "sm_60"}
        return super().apply(func, tvm.target.Target(plain), _)


# From the most to the least particular. Matmul takes contractions, convolutions as implicit products among them. It
# comes after our own rule for tensor cores, as its own would parse TVM's whole library of intrinsics. Fallback takes
# everything.
RULES: tuple[Any, ...] = (
    TensorCoreProduct(),
    _Matmul(),
    dlight.gpu.GEMV(),
    dlight.gpu.Reduction(),
    dlight.gpu.GeneralReduction(),
    dlight.gpu.Transpose(),
    dlight.gpu.Fallback(),
)
# For other GPUs: what takes no account of NVIDIA's.
PORTABLE_RULES: tuple[Any, ...] = (dlight.gpu.Matmul(), *RULES[2:])
# How dlight's rules say, besides returning None, that a function is not of their kind: they take much for granted.
_NOT_MINE = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError)


@dataclass(frozen=True)
class Scheduled:
    """A module whose functions all run on the GPU, and the rule that scheduled each: `own` for what came bound."""

    module: tvm.IRModule
    rules: dict[str, str]


def schedule(module: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """The module with every function bound to threads. RescompileError when one cannot be."""
    return schedule_with_rules(module, target).module


def schedule_with_rules(module: tvm.IRModule, target: tvm.target.Target) -> Scheduled:
    """As `schedule`, with the rule that each function was scheduled by."""
    functions: dict[tvm.ir.GlobalVar, tirx.PrimFunc] = {}
    rules: dict[str, str] = {}
    for variable, function in module.functions_items():
        if not isinstance(function, tirx.PrimFunc) or _host_only(function):
            continue
        name = str(variable.name_hint)
        if is_bound(function):
            rules[name] = "own"
            continue
        with target:
            rules[name], functions[variable] = _apply(name, function, target)
    out = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    for variable, function in functions.items():
        out.update_func(variable, function)
    return Scheduled(out, rules)


def is_bound(function: tirx.PrimFunc) -> bool:
    """Whether the function runs on GPU threads."""
    return bool(thread_extents(function))


def thread_extents(function: tirx.PrimFunc) -> dict[str, Any]:
    """The extents that the function's loops and launches bind: by `blockIdx.x`, `threadIdx.x`, ..."""
    found: dict[str, Any] = {}

    def loop(node: Any) -> None:
        if node.kind == tirx.ForKind.THREAD_BINDING:
            found[str(node.thread_binding.thread_tag)] = node.extent

    def attribute(node: Any) -> None:
        if node.attr_key == "thread_extent":
            found[str(node.node.thread_tag)] = node.value

    tvm_ffi.structural_walk(function.body, [(tirx.For, loop), (tirx.AttrStmt, attribute)], order="post")
    return found


def _apply(name: str, function: tirx.PrimFunc, target: tvm.target.Target) -> tuple[str, tirx.PrimFunc]:
    refused = []
    for rule in RULES if str(target.kind.name) == "cuda" else PORTABLE_RULES:
        label = type(rule).__name__.lstrip("_")
        try:
            found = rule.apply(function, target, False)
        except _NOT_MINE as error:
            if isinstance(rule, TensorCoreProduct) and not isinstance(error, s_tir.ScheduleError):
                raise
            refused.append(f"{label}: {str(error).strip().splitlines()[-1] if str(error).strip() else 'refused'}")
            continue
        if found is None:
            continue
        bound = (found[0] if isinstance(found, list) else found).mod["main"]
        if _fits(bound, target):
            return label, bound.with_attrs({**_attributes(function), "tirx.is_scheduled": True})
        refused.append(f"{label}: the result is not bound, or to more than {_threads(target)} threads")
    raise RescompileError(
        f"No schedule binds the generated function '{name}' to GPU threads ({'; '.join(refused)}): "
        f"compile the model for cpu."
    )


def _threads(target: tvm.target.Target) -> int:
    return int(target.attrs.get("max_num_threads", THREADS_PER_BLOCK))


def _fits(function: tirx.PrimFunc, target: tvm.target.Target) -> bool:
    extents = thread_extents(function)
    threads = 1
    for tag, extent in extents.items():
        if tag.startswith("threadIdx") and isinstance(extent, tirx.IntImm):
            threads *= int(extent.value)
    return bool(extents) and threads <= _threads(target)


def _attributes(function: tirx.PrimFunc) -> dict[str, Any]:
    return dict(function.attrs) if function.attrs else {}


def _host_only(function: tirx.PrimFunc) -> bool:
    """Whether the function is one of those that Relax runs on the processor, such as arithmetic in shapes."""
    return bool(function.attrs and function.attrs.get("tirx.is_host_func"))
