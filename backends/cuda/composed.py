"""Attention without a kernel of its own: two products with a softmax between them, each a region by itself.

As a family it stands beside the libraries' attention. It is nothing that is compiled alone, so what is timed in its
place are the same three steps by torch's own kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rescompile.backends.cuda import reference
from rescompile.backends.cuda.targets import Architecture
from rescompile.backends.kernels import Argument, AttentionSpec
from rescompile.errors import RescompileError

INLINE = True  # whoever asked for it emits it


@dataclass(frozen=True)
class ThreeSteps:
    """The only way to compose it."""

    def __str__(self) -> str:
        return "of products and a softmax"


def refusal(spec: Any, limits: Architecture) -> str:
    """Empty: attention can always be composed."""
    return "" if isinstance(spec, AttentionSpec) else "it is no attention"


def candidates(spec: AttentionSpec, limits: Architecture) -> list[ThreeSteps]:
    """The only way."""
    return [ThreeSteps()]


def arguments(spec: AttentionSpec) -> list[Argument]:
    """qkv, or q, k, v; [mask]; y."""

    def laid(heads: int, length: int, layout: str) -> tuple[int | None, ...]:
        order = (heads, length) if layout == "bhsd" else (length, heads)
        return (spec.batch, *order, spec.head_dim)

    if spec.layout == "qkv":
        width = (spec.heads + 2 * spec.shared_heads) * spec.head_dim
        found = [Argument("qkv", (spec.batch, spec.q_len, width), spec.dtype)]
    else:
        found = [Argument("q", laid(spec.heads, spec.q_len, spec.layout), spec.dtype)]
        found += [Argument(name, laid(spec.shared_heads, spec.k_len, spec.layout), spec.dtype) for name in "kv"]
    if spec.mask != "none":
        found.append(Argument("mask", spec.mask_shape, "bool" if spec.mask == "keep" else spec.dtype))
    return [*found, Argument("y", laid(spec.heads, spec.q_len, spec.out_layout), spec.dtype, output=True)]


def prim_func(spec: AttentionSpec, tile: ThreeSteps, name: str) -> Any:
    """RescompileError: it is several kernels."""
    raise RescompileError("Attention that is composed is no single kernel.")


def stand_in(spec: AttentionSpec, as_torch: Callable[[Any], Any]) -> Callable[..., None]:
    """The three steps by torch's kernels."""
    plain = reference.described(spec)
    names = [part.name for part in arguments(spec) if not part.output]

    def run(*buffers: Any) -> None:
        *inputs, y = map(as_torch, buffers)
        made = reference.eager(plain, dict(zip(names, inputs, strict=True)))
        if made is not None:
            y.copy_(made["y"])

    return run
