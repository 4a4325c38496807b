"""How passes compute new parameters from old ones: a table of named functions, so that a plan stays small and readable.

Each takes the operands' contents (None where absent) and the recipe's attributes, computes in float64, and returns an
array in the dtype of its first operand, or, where it has none, of the shape and dtype that the attributes say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from rescompile import affine
from rescompile.values import numpy_dtype

Array: TypeAlias = np.ndarray[Any, Any]


def batch_norm_bias(operands: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """b' = (b − μ) · γ / √(σ² + ε) + β. Operands: weight (for its dtype), bias, gamma, beta, mean, variance."""
    weight, bias, gamma, beta, mean, variance = operands
    assert weight is not None
    assert mean is not None
    start: Any = 0.0 if bias is None else bias.astype(np.float64)
    moved: Array = (start - mean.astype(np.float64)) * _norm_factor(gamma, variance, attrs["eps"])
    if beta is not None:
        moved = moved + beta.astype(np.float64)
    return moved.astype(weight.dtype)


def _norm_factor(gamma: Array | None, variance: Array | None, eps: float) -> Array:
    assert variance is not None
    factor: Array = 1.0 / np.sqrt(variance.astype(np.float64) + eps)
    return factor if gamma is None else factor * gamma.astype(np.float64)


def scaled(operands: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """`factor` times the first operand, or times its `rows` from one index to another."""
    (weight,) = operands
    assert weight is not None
    product: Array = weight.astype(np.float64)
    product[slice(*attrs.get("rows", ()) or (None,))] *= attrs["factor"]
    return product.astype(weight.dtype)


def constant(_: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """`value` everywhere."""
    return np.full(tuple(attrs["shape"]), attrs["value"], numpy_dtype(attrs["dtype"]))


def kaiming_normal(_: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """N(0, gain²/fan_in), drawn from `seed` (He et al. 2015, section 2.2: gain √2 before a rectifier)."""
    random = np.random.default_rng(attrs["seed"])
    spread = attrs["gain"] / np.sqrt(attrs["fan_in"])
    drawn: Array = random.standard_normal(tuple(attrs["shape"])) * spread
    return drawn.astype(numpy_dtype(attrs["dtype"]))


def select_last(_: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """[0 | I]: a 1×1 contraction that hands on the last of its input channels. Shape [out, in, 1, ...]."""
    shape = tuple(attrs["shape"])
    matrix = np.eye(shape[0], shape[1], shape[1] - shape[0])
    return matrix.reshape(shape).astype(numpy_dtype(attrs["dtype"]))


def affine_weight(operands: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """W of the affine map that a program of `rescompile.affine` makes of the operands. [in, out] where `transpose`."""
    weight = affine.run(attrs["steps"], operands).weight
    return (weight.T if attrs["transpose"] else weight).astype(numpy_dtype(attrs["dtype"]))


def affine_bias(operands: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """b of that map."""
    return affine.run(attrs["steps"], operands).bias.astype(numpy_dtype(attrs["dtype"]))


def concatenated(operands: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """[A; B; …] along `axis`; zeros in the place of an operand that is absent. `sizes`: the extent of each along it."""
    like = next(operand for operand in operands if operand is not None)
    axis = attrs["axis"]
    parts = []
    for operand, size in zip(operands, attrs["sizes"], strict=True):
        shape = (*like.shape[:axis], size, *like.shape[axis + 1 :])
        parts.append(np.zeros(shape, like.dtype) if operand is None else operand.reshape(shape))
    joined: Array = np.concatenate(parts, axis)
    return joined


def summed(operands: Sequence[Array | None], _: dict[str, Any]) -> Array:
    """a + b + …, of those operands that are present."""
    present = [operand for operand in operands if operand is not None]
    total: Array = np.sum([operand.astype(np.float64) for operand in present], axis=0)
    return total.astype(present[0].dtype)


def centred(operands: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """W − E W along `axis`; of γ ⊙ W with a second operand γ, one number for each place along it."""
    weight, factor = operands
    assert weight is not None
    axis, wide = attrs["axis"], weight.astype(np.float64)
    if factor is not None:
        shape = [1] * weight.ndim
        shape[axis] = -1
        wide = wide * factor.astype(np.float64).reshape(shape)
    moved: Array = wide - wide.mean(axis=axis, keepdims=True)
    return moved.astype(weight.dtype)


def folded_weight(operands: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """W·diag(γ), γ / √(σ² + ε) for γ where there is a variance; `axis` and `groups`: of the weight's inputs.

    Operands: weight, gamma, variance.
    """
    weight, gamma, variance = operands
    assert weight is not None
    scaled: Array = weight.astype(np.float64) * _over_inputs(_gain(gamma, variance, attrs), weight, attrs)
    return scaled.astype(weight.dtype)


def folded_bias(operands: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """b + W·(number·β − μ·γ/√(σ² + ε)). Operands: weight, bias, gamma, beta, mean, variance."""
    weight, bias, gamma, beta, mean, variance = operands
    assert weight is not None
    shift: Any = 0.0 if beta is None else beta.reshape(-1).astype(np.float64) * attrs.get("number", 1.0)
    if mean is not None:
        shift = shift - mean.astype(np.float64) * _gain(gamma, variance, attrs)
    spread = weight.astype(np.float64) * _spread(shift, weight, attrs)
    kept = 1 - attrs["axis"]  # the weight's outputs are the other one of its first two axes
    total: Array = spread.sum(axis=tuple(axis for axis in range(weight.ndim) if axis != kept))
    if bias is not None:
        total = total + bias.astype(np.float64)
    return total.astype(weight.dtype)


def scaled_by(operands: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """number·γ ⊙ W, or number·W/γ where `divide`; γ is one number, or one for each feature of `axis` in `groups`.

    Operands: weight, γ where there is one.
    """
    weight, *rest = operands
    assert weight is not None
    factor: Any = 1.0
    if rest and rest[0] is not None:
        factor = _spread(rest[0].reshape(-1).astype(np.float64), weight, attrs)
        factor = 1.0 / factor if attrs["divide"] else factor
    product: Array = weight.astype(np.float64) * (attrs["number"] * factor)
    return product.astype(weight.dtype)


def moved_bias(operands: Sequence[Array | None], attrs: dict[str, Any]) -> Array:
    """b + number·c, c one number or one for each output (`axis`, `groups`). Operands: weight, bias, c."""
    weight, bias, moved = operands
    assert weight is not None
    assert moved is not None
    start = np.zeros(weight.shape[attrs["axis"]] * attrs["groups"]) if bias is None else bias.astype(np.float64)
    total: Array = start + attrs["number"] * moved.reshape(-1).astype(np.float64)
    return total.astype(weight.dtype)


def _spread(numbers: Array, weight: Array, attrs: dict[str, Any]) -> Any:
    """As `_over_inputs`, or the number itself where it is one."""
    return float(numbers[0]) if numbers.size == 1 else _over_inputs(numbers, weight, attrs)


def _gain(gamma: Array | None, variance: Array | None, attrs: dict[str, Any]) -> Any:
    gain: Any = 1.0 if gamma is None else gamma.reshape(-1).astype(np.float64)
    return gain if variance is None else gain / np.sqrt(variance.astype(np.float64) + attrs["eps"])


def _over_inputs(numbers: Array, weight: Array, attrs: dict[str, Any]) -> Array:
    """One number for each input feature, shaped to multiply the weight with; group g of the outputs reads group g."""
    axis, groups = attrs["axis"], attrs["groups"]
    shape = [1] * weight.ndim
    shape[axis] = weight.shape[axis]
    if groups == 1:
        return numbers.reshape(shape)
    shape[1 - axis] = weight.shape[1 - axis]
    parts = np.repeat(numbers.reshape(groups, -1), weight.shape[1 - axis] // groups, axis=0)
    return (parts if axis == 1 else parts.T).reshape(shape)


RECIPES: dict[str, Callable[[Sequence[Array | None], dict[str, Any]], Array]] = {
    "batch_norm_bias": batch_norm_bias,
    "scaled": scaled,
    "constant": constant,
    "kaiming_normal": kaiming_normal,
    "select_last": select_last,
    "affine_weight": affine_weight,
    "affine_bias": affine_bias,
    "concatenated": concatenated,
    "summed": summed,
    "centred": centred,
    "folded_weight": folded_weight,
    "folded_bias": folded_bias,
    "scaled_by": scaled_by,
    "moved_bias": moved_bias,
}
