"""Affine maps between channels, composed from the contents of convolutions, linears, norms, pools and sums.

A map is y = W·x + b with W: [out, in / groups, *kernel]; a linear has no kernel. What composes maps is a program: steps
in order, each {"do": name, "of": [earlier steps], "with": [operands]} and its settings. Strides, borders and dilation
are for whoever writes the program to agree on; `place` puts a kernel where the agreement wants it.

do          result
input       x itself, one group a channel. channels, spatial (dimensions of the kernel)
conv        W₂·(W·x + b) + b₂. with: weight, bias; groups. At most one of the kernels has more than one element
linear      the same. transpose: the weight is [in, out]
pool        the mean over a kernel. kernel
norm        γ·(y − μ)/√(σ² + ε) + β. with: γ, β, μ, σ²; eps
scale       factor·v·y or factor·y/v. with: v, a number or one for each channel, or nothing; divide
shift       y + factor·v. with: v
rows        zero channels before and after those of y. before, after
place       the kernel inside a larger one. kernel, offset, dilation
sum         Σ factors[i]·yᵢ, all of one input
stack       [y₀, y₁], of one input
beside      y₀ + y₁, where y₁ has an input of its own, behind that of y₀
diagonal    [y₀, y₁], where y₁ has an input of its own, behind that of y₀
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
Step: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Affine:
    """y = W·x + b in float64. `weight`: [out, in / groups, *kernel]; `bias`: [out]."""

    weight: Array
    bias: Array
    groups: int

    @property
    def diagonal(self) -> bool:
        """Whether every channel depends on itself alone."""
        return bool(self.weight.shape[:2] == (self.groups, 1))

    def grouped(self, groups: int) -> Affine:
        """The same map with fewer groups, of which `groups` is a divisor: zeros between what was apart."""
        if groups == self.groups:
            return self
        merged = self.groups // groups
        out, width = self.weight.shape[0] // self.groups, self.weight.shape[1]
        full = np.zeros((self.weight.shape[0], merged * width, *self.weight.shape[2:]))
        for group in range(self.groups):
            at = group % merged * width
            rows = slice(group * out, (group + 1) * out)
            full[rows, at : at + width] = self.weight[rows]
        return replace(self, weight=full, groups=groups)

    def fill(self, whole: Array) -> None:
        """Write the weight, without groups, into a part of a larger one that holds zeros."""
        out, width = self.weight.shape[0] // self.groups, self.weight.shape[1]
        for group in range(self.groups):
            rows = slice(group * out, (group + 1) * out)
            whole[rows, group * width : (group + 1) * width] = self.weight[rows]

    def then(self, later: Affine) -> Affine:
        """later(self(x))."""
        if self.diagonal:
            factor = self.weight.reshape(later.groups, 1, later.weight.shape[1], *self.weight.shape[2:])
            kernels = later.weight.reshape(later.groups, -1, *later.weight.shape[1:])
            moved = later.bias + (_taps(kernels, 3) * self.bias.reshape(later.groups, 1, -1)).sum(axis=2).reshape(-1)
            weight = kernels * factor
            return Affine(weight.reshape(-1, *weight.shape[2:]), moved, later.groups)
        if later.diagonal:
            return Affine(
                self.weight * later.weight, self.bias * _taps(later.weight, 2)[:, 0] + later.bias, self.groups
            )
        groups = math.gcd(self.groups, later.groups)
        first, second = self.grouped(groups), later.grouped(groups)
        inner = first.weight.shape[0] // groups
        a = first.weight.reshape(groups, inner, *first.weight.shape[1:])
        b = second.weight.reshape(groups, -1, inner, *second.weight.shape[2:])
        product = np.einsum("gom...,gmi...->goi...", b, a, optimize=True)
        shifted = np.einsum("gom,gm->go", _taps(b, 3), first.bias.reshape(groups, inner)).reshape(-1)
        return Affine(product.reshape(-1, *product.shape[2:]), shifted + later.bias, groups)


def run(steps: Sequence[Step], operands: Sequence[Array | None]) -> Affine:
    """The map that the last step makes."""
    made: list[Affine] = []
    for step in steps:
        data = [None if index is None else operands[index] for index in step.get("with", ())]
        floats = [None if array is None else array.astype(np.float64) for array in data]
        made.append(_DO[step["do"]]([made[index] for index in step.get("of", ())], floats, step))
    return made[-1]


_Do: TypeAlias = Callable[[Sequence[Affine], Sequence[Array | None], Step], Affine]


def _input(_: Sequence[Affine], __: Sequence[Array | None], step: Step) -> Affine:
    channels = step["channels"]
    return Affine(np.ones((channels, 1, *(1,) * step["spatial"])), np.zeros(channels), channels)


def _conv(of: Sequence[Affine], data: Sequence[Array | None], step: Step) -> Affine:
    weight, bias = data
    assert weight is not None
    shift = np.zeros(weight.shape[0]) if bias is None else bias.reshape(-1)
    return of[0].then(Affine(weight, shift, step["groups"]))


def _linear(of: Sequence[Affine], data: Sequence[Array | None], step: Step) -> Affine:
    weight, bias = data
    assert weight is not None
    return _conv(of, [weight.T if step["transpose"] else weight, bias], {"groups": 1})


def _pool(of: Sequence[Affine], _: Sequence[Array | None], step: Step) -> Affine:
    channels, kernel = of[0].weight.shape[0], tuple(step["kernel"])
    return of[0].then(Affine(np.full((channels, 1, *kernel), 1 / math.prod(kernel)), np.zeros(channels), channels))


def _norm(of: Sequence[Affine], data: Sequence[Array | None], step: Step) -> Affine:
    gamma, beta, mean, variance = data
    assert mean is not None
    assert variance is not None
    factor = 1.0 / np.sqrt(variance + step["eps"])
    factor = factor if gamma is None else factor * gamma
    bias = (of[0].bias - mean) * factor
    return Affine(_rows_by(of[0].weight, factor), bias if beta is None else bias + beta, of[0].groups)


def _scale(of: Sequence[Affine], data: Sequence[Array | None], step: Step) -> Affine:
    given = data[0].reshape(-1) if data and data[0] is not None else np.ones(1)
    factor = step["factor"] * (1 / given if step["divide"] else given)
    return Affine(_rows_by(of[0].weight, factor), of[0].bias * factor, of[0].groups)


def _shift(of: Sequence[Affine], data: Sequence[Array | None], step: Step) -> Affine:
    (value,) = data
    assert value is not None
    return replace(of[0], bias=of[0].bias + step["factor"] * value.reshape(-1))


def _rows(of: Sequence[Affine], _: Sequence[Array | None], step: Step) -> Affine:
    dense = of[0].grouped(1)
    more = (step["before"], step["after"])
    weight = np.pad(dense.weight, [more] + [(0, 0)] * (dense.weight.ndim - 1))
    return Affine(weight, np.pad(dense.bias, more), 1)


def _place(of: Sequence[Affine], _: Sequence[Array | None], step: Step) -> Affine:
    weight = of[0].weight
    larger = np.zeros((*weight.shape[:2], *step["kernel"]))
    taps = zip(weight.shape[2:], step["offset"], step["dilation"], strict=True)
    where = tuple(slice(offset, offset + (count - 1) * apart + 1, apart) for count, offset, apart in taps)
    larger[(slice(None), slice(None), *where)] = weight
    return replace(of[0], weight=larger)


def _sum(of: Sequence[Affine], _: Sequence[Array | None], step: Step) -> Affine:
    groups = math.gcd(*(map_.groups for map_ in of))
    alike = [map_.grouped(groups) for map_ in of]
    scaled = list(zip(step["factors"], alike, strict=True))
    weight: Array = sum((factor * map_.weight for factor, map_ in scaled), np.zeros(()))
    bias: Array = sum((factor * map_.bias for factor, map_ in scaled), np.zeros(()))
    return Affine(weight, bias, groups)


def _stack(of: Sequence[Affine], _: Sequence[Array | None], __: Step) -> Affine:
    weight = np.zeros((sum(_outputs(map_) for map_ in of), _inputs(of[0]), *of[0].weight.shape[2:]))
    of[0].fill(weight[: _outputs(of[0])])
    of[1].fill(weight[_outputs(of[0]) :])
    return Affine(weight, np.concatenate([map_.bias for map_ in of]), 1)


def _beside(of: Sequence[Affine], _: Sequence[Array | None], __: Step) -> Affine:
    weight = np.zeros((_outputs(of[0]), sum(_inputs(map_) for map_ in of), *of[0].weight.shape[2:]))
    of[0].fill(weight[:, : _inputs(of[0])])
    of[1].fill(weight[:, _inputs(of[0]) :])
    return Affine(weight, of[0].bias + of[1].bias, 1)


def _diagonal(of: Sequence[Affine], _: Sequence[Array | None], step: Step) -> Affine:
    """`groups`: of the result, 1 or so many that each of them lies in one of the two maps."""
    groups, (first, second) = step["groups"], of
    bias = np.concatenate([first.bias, second.bias])
    if groups > 1:
        second = second.grouped(groups - first.groups)
        return Affine(np.concatenate([first.weight, second.weight]), bias, groups)
    outputs, inputs = (sum(size(map_) for map_ in of) for size in (_outputs, _inputs))
    weight = np.zeros((outputs, inputs, *first.weight.shape[2:]))
    first.fill(weight[: _outputs(first), : _inputs(first)])
    second.fill(weight[_outputs(first) :, _inputs(first) :])
    return Affine(weight, bias, 1)


def _outputs(map_: Affine) -> int:
    return int(map_.weight.shape[0])


def _inputs(map_: Affine) -> int:
    return int(map_.weight.shape[1]) * map_.groups


def _taps(weight: Array, leading: int) -> Array:
    """What kernels make of a constant: the sum of the elements behind the `leading` dimensions."""
    total: Array = weight.reshape(*weight.shape[:leading], -1).sum(axis=-1)
    return total


def _rows_by(weight: Array, factor: Array) -> Array:
    return weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))


_DO: dict[str, _Do] = {
    "input": _input,
    "conv": _conv,
    "linear": _linear,
    "pool": _pool,
    "norm": _norm,
    "scale": _scale,
    "shift": _shift,
    "rows": _rows,
    "place": _place,
    "sum": _sum,
    "stack": _stack,
    "beside": _beside,
    "diagonal": _diagonal,
}
