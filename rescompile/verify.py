"""Comparing a rewritten graph with the original, on random and on adversarial inputs.

A difference is measured relative to the largest magnitude of the output. The tolerance goes by dtype. Where a model
itself amplifies rounding (an attention over huge logits), a difference above the tolerance is still accepted, and the
check says so, when

1. it is no larger than what the *original* does to its output under a perturbation of its float inputs by a few units
   in the last place (of an input below the smallest normal number: by its last place), or
2. the rewritten model is no further from the original's outputs in float64 than twice what the original is, which is
   a hundredth of the output at most. Float64 runs happen for this question alone, once for each kind of input.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import ml_dtypes
import msgspec
import numpy as np

from rescompile.effects import Effect, measure_effects
from rescompile.errors import RescompileError
from rescompile.extents import extent_of
from rescompile.graph import Graph, Value
from rescompile.kinds import OpKind, Trait
from rescompile.values import numpy_dtype

Array: TypeAlias = np.ndarray[Any, Any]
Inputs: TypeAlias = dict[str, Array]

# Relative to the largest magnitude of an output.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}
_EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
_SYMBOLIC_EXTENT = 2
_ULPS_OF_NOISE = 4.0
_LUCK = 2.0  # how much further from float64 two equally exact orders of operations may be than one another
_CREDIBLE = 1e-2  # a model further from float64 than this tells nothing of what it should compute


class Check(msgspec.Struct, frozen=True):
    """One comparison: of one output, on one kind of input."""

    inputs: str
    output: str
    difference: float
    tolerance: float
    ok: bool
    note: str = ""


class Verification(msgspec.Struct, frozen=True):
    """All comparisons of a rewrite, or the reason why there were none."""

    preserves: str
    checks: tuple[Check, ...] = ()
    skipped: str = ""
    vacuous: bool = False  # the original gives the same outputs for all inputs, so equality proves little
    effects: tuple[Effect, ...] = ()  # how far the outputs moved, of a rewrite that keeps the interface only

    @property
    def ok(self) -> bool:
        """Whether every comparison held. A verification that was skipped proves nothing and is not ok."""
        return not self.skipped and all(check.ok for check in self.checks)

    @property
    def worst(self) -> Check | None:
        """The comparison with the largest difference relative to its tolerance."""
        return max(self.checks, key=lambda check: check.difference / check.tolerance, default=None)

    def __str__(self) -> str:
        if self.skipped:
            return f"not verified: {self.skipped}"
        worst = self.worst
        if worst is None:
            return "verified: nothing to compare"
        verdict = "verified" if self.ok else "FAILED"
        if self.preserves == "interface" and self.ok:
            return f"{verdict} (interface): names, shapes and dtypes are the same; {self._effect()}"
        kinds = len({check.inputs for check in self.checks})
        text = (
            f"{verdict} ({self.preserves}): {len(self.checks)} comparisons on {kinds} kinds of input, largest relative "
            f"difference {worst.difference:.1e} (output '{worst.output}', {worst.inputs} inputs, "
            f"tolerance {worst.tolerance:.0e})"
        )
        if self.vacuous:
            text += "; with these weights the model gives the same outputs for every input, so this proves little"
        return text

    def _effect(self) -> str:
        """In words, whether the function changed."""
        if not self.effects:
            return "how far the function changed was not measured: the inputs' shapes or dtypes are not known"
        if all(effect.difference == 0.0 for effect in self.effects):
            return "on random inputs the function is the same to the bit"
        return f"the function changed, on random inputs: {'; '.join(map(str, self.effects))}"


def interface_of(graph: Graph) -> tuple[Any, ...]:
    """What a caller sees: names, shapes and dtypes of inputs and outputs."""
    return (
        tuple((value.name, value.shape, value.dtype) for value in graph.inputs),
        tuple((value.shape, value.dtype) for value in graph.outputs),
    )


def _same_interface(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether a caller sees the same. An unknown extent of an output, if no input has it, may go by any name."""
    (inputs, outputs), (inputs_after, outputs_after) = before, after
    own = {extent for _, shape, _ in inputs for extent in shape or ()}

    def same(one: Any, other: Any) -> bool:
        unknown = not isinstance(one, int) and not isinstance(other, int)
        return bool(one == other or (unknown and (one not in own or other not in own)))

    def alike(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
        (shape, dtype), (there, dtype_there) = one, other
        if shape is None or there is None or len(shape) != len(there):
            return one == other
        return bool(dtype == dtype_there and all(map(same, shape, there)))

    return inputs == inputs_after and len(outputs) == len(outputs_after) and all(map(alike, outputs, outputs_after))


class Reference:
    """What the original computes in float64, by kind of input: asked for only where a plain comparison fails."""

    def __init__(self, original: Graph) -> None:
        self._original = original
        self._known: dict[str, list[Array] | None] = {}
        self._runner: Any = None

    def outputs(self, label: str, inputs: Inputs) -> list[Array] | None:
        """The outputs in order; None where torch is not installed or cannot compute them."""
        if label not in self._known:
            try:
                from rescompile import fx_reference
            except ImportError:
                return None
            self._runner = self._runner or fx_reference.Reference(self._original)
            self._known[label] = self._runner.outputs(inputs)
        return self._known[label]


def verify(
    original: Graph,
    rewritten: Graph,
    preserves: str = "values",
    *,
    seed: int = 0,
    reference: Reference | None = None,
) -> Verification:
    """Compare the interfaces and, when `preserves` is "values", the outputs of the two graphs.

    `reference`: of `original` with this seed, to be used again where several graphs are compared with it.
    """
    reference = reference or Reference(original)
    if not _same_interface(interface_of(original), interface_of(rewritten)):
        return Verification(
            preserves, (Check("interface", "signature", float("inf"), 1.0, False, "interface differs"),)
        )
    if preserves == "interface":
        inputs = make_inputs(original, _random, seed)
        effects = () if inputs is None else measure_effects(original, original.run(inputs), rewritten.run(inputs))
        return Verification(preserves, (Check("interface", "signature", 0.0, 1.0, True),), effects=effects)
    if _draws(original, seed):
        return Verification(preserves, skipped="the model draws other random numbers on each call")
    checks: list[Check] = []
    seen: list[list[Array]] = []
    for label, make in ADVERSARIES.items():
        inputs = make_inputs(original, make, seed)
        if inputs is None:
            return Verification(preserves, skipped="an input of the model has no known shape or dtype")
        if label != "random" and not any(_is_float(array.dtype) for array in inputs.values()):
            continue  # integer inputs have no adversarial values that a model must take
        seen.append(list(original.run(inputs).values()))
        checks += _compare(original, rewritten, inputs, seen[-1], label, seed, reference)
    return Verification(preserves, tuple(checks), vacuous=_all_equal(seen))


def _draws(graph: Graph, seed: int) -> bool:
    """Whether two runs on the same inputs give different outputs."""
    if not any(op.has(Trait.RANDOM) for op in graph):
        return False
    inputs = make_inputs(graph, _random, seed)
    if inputs is None:
        return False
    first, second = graph.run(inputs), graph.run(inputs)
    return any(relative_difference(first[name], second[name]) > 0.0 for name in first)


def make_inputs(
    graph: Graph,
    make: Callable[[np.random.Generator, tuple[int, ...]], Array],
    seed: int,
    extents: Mapping[str, int] | None = None,
) -> Inputs | None:
    """One array for each input, None when a shape or dtype is unknown. Integers stay inside the tables they index.

    `extents`: what symbolic extents are, 2 otherwise.
    """
    arrays: Inputs = {}
    for value in graph.inputs:
        if value.shape is None or value.dtype is None:
            return None
        rng = np.random.default_rng([seed, zlib.crc32(value.name.encode())])
        shape = tuple(extent_of(dim, extents or {}, _SYMBOLIC_EXTENT) or _SYMBOLIC_EXTENT for dim in value.shape)
        dtype = numpy_dtype(value.dtype)
        if _is_float(dtype):
            arrays[value.name] = np.asarray(make(rng, shape)).astype(dtype)
        elif dtype == np.bool_:
            arrays[value.name] = np.ones(shape, dtype)
        else:
            arrays[value.name] = rng.integers(0, index_bound(value), shape).astype(dtype)
    return arrays


def index_bound(value: Value) -> int:
    """How many different integers an input may hold: the length of the table it indexes, 2 where it indexes none."""
    bound, stack, seen = None, [value], {value}
    while stack:
        for op, index in stack.pop().uses:
            table = op.operand("weight") if op.kind is OpKind.EMBEDDING and index == 1 else None
            table = op.operand("x") if op.kind is OpKind.GATHER and index == 1 else table
            if table is not None and table.shape and isinstance(table.shape[0], int):
                bound = table.shape[0] if bound is None else min(bound, table.shape[0])
            elif op.has(Trait.FREE):
                fresh = [out for out in op.outputs if out not in seen]
                seen.update(fresh)
                stack.extend(fresh)
    return max(bound or 2, 1)


def _random(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape)


def _zeros(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return np.zeros(shape)


def _large(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) * 1e3


def _negative(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return -np.abs(rng.standard_normal(shape))


def _denormal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.standard_normal(shape) * 1e-40


ADVERSARIES: Mapping[str, Callable[[np.random.Generator, tuple[int, ...]], Array]] = {
    "random": _random,
    "zero": _zeros,
    "large": _large,
    "negative": _negative,
    "denormal": _denormal,
}


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == np.dtype(ml_dtypes.bfloat16)


def relative_difference(expected: Array, actual: Array, dtype: np.dtype[Any] | None = None) -> float:
    """max |a − b| / max(max |a|, t); max |b| where all of a is 0; infinite where shapes, NaN or infinity differ.

    t is the smallest normal number of `dtype` (of the expected one's, where it is None): numbers below it have fewer
    digits the smaller they are.
    """
    if expected.shape != actual.shape:
        return float("inf")
    if expected.size == 0:
        return 0.0
    if not _is_float(expected.dtype):
        return 0.0 if np.array_equal(expected, actual) else float("inf")
    a, b = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)) or not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = float(np.abs(a[finite]).max())
    difference = float(np.abs(a[finite] - b[finite]).max())
    smallest = float(ml_dtypes.finfo(dtype or expected.dtype).smallest_normal)  # type: ignore[no-untyped-call]
    return difference / max(scale, smallest) if scale > 0 else difference


def _all_equal(runs: list[list[Array]]) -> bool:
    """Whether several runs gave the same finite outputs; one run tells nothing."""
    pairs = [pair for run in runs[1:] for pair in zip(runs[0], run, strict=True)]
    return bool(pairs) and all(np.array_equal(a, b) and np.isfinite(a.astype(np.float64)).all() for a, b in pairs)


def _compare(
    original: Graph,
    rewritten: Graph,
    inputs: Inputs,
    expected: list[Array],
    label: str,
    seed: int,
    reference: Reference,
) -> list[Check]:
    actual = list(rewritten.run(inputs).values())
    if len(expected) != len(actual):
        raise RescompileError(f"The rewritten graph has {len(actual)} outputs where the original has {len(expected)}.")
    noise: list[Array] | None = None
    checks = []
    for index, (output, a, b) in enumerate(zip(original.outputs, expected, actual, strict=True)):
        tolerance = TOLERANCES.get("bfloat16" if a.dtype == ml_dtypes.bfloat16 else str(a.dtype), 1e-12)
        difference = relative_difference(a, b)
        ok, note = difference <= tolerance, ""
        if not ok and np.isfinite(difference):
            noise = list(original.run(_perturbed(inputs, seed)).values()) if noise is None else noise
            own = relative_difference(a, noise[index])
            if difference <= own:
                ok, note = True, f"ill-conditioned: the original itself moves by {own:.1e} when its inputs are rounded"
            elif a.dtype != np.float64 and (exact := reference.outputs(label, inputs)) is not None:
                before, after = (relative_difference(exact[index], each, a.dtype) for each in (a, b))
                ok = before <= _CREDIBLE and after <= _LUCK * before
                note = f"from float64 the original is {before:.1e} away and this {after:.1e}"
        checks.append(Check(label, output.name, difference, tolerance, ok, note))
    return checks


def _perturbed(inputs: Inputs, seed: int) -> Inputs:
    rng = np.random.default_rng(seed)
    moved: Inputs = {}
    for name, array in inputs.items():
        if _is_float(array.dtype):
            step = _EPSILON.get(array.dtype.name, 2.0**-23) * _ULPS_OF_NOISE
            wide, info = array.astype(np.float64), ml_dtypes.finfo(array.dtype)  # type: ignore[no-untyped-call]
            last = np.where(np.abs(wide) < float(info.smallest_normal), float(info.smallest_subnormal), 0.0)
            relative, absolute = rng.uniform(-1, 1, array.shape), rng.integers(-1, 2, array.shape)
            moved[name] = (wide * (1 + step * relative) + last * (wide != 0) * absolute).astype(array.dtype)
        else:
            moved[name] = array
    return moved
