"""Four ways to write the conversion of a block: at once, not at all, by and by, and in proportion."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rescompile.blocks import Block
from rescompile.graph import Graph, Role
from rescompile.passes.deep_scales import DeepScales
from rescompile.passes.norm_blend import Blender
from rescompile.passes.norm_blocks import EQUATIONS, SPOTS, NormedBlock, NormUnit
from rescompile.passes.norm_calibration import proportions, scale_branch
from rescompile.passes.norm_ends import Ends
from rescompile.passes.norm_moves import put_new, put_on, scale_skip, take_off, unscale_skip
from rescompile.passes.norm_stacks import Stacks
from rescompile.passes.sketch import Sketch
from rescompile.plans import Erase, FreshNames, Refusal, Rewrite

CHANGES = "this changes the function"
EXACT = "exact: the function stays the same"


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One conversion of a graph: the blocks that take part, and where their norms go."""

    graph: Graph
    stacks: Stacks
    target: str
    converted: Mapping[Block, NormedBlock]
    fresh: FreshNames
    ends: Ends

    def sketch(self, normed: NormedBlock, suffix: str) -> Sketch:
        """Edits for one block. New parameters are named after its norm, with a suffix."""
        own = next((value.name for value in normed.norm.norm.operands if value.role is Role.PARAMETER), "")
        prefix = own.rpartition(".")[0] or f"norms.{normed.block.id}"
        return Sketch(self.graph, self.fresh, f"{prefix}_{suffix}", normed.sum.dtype or "float32", normed.block.id)


class Writer(Protocol):
    """A way to write conversions."""

    def against(self, normed: NormedBlock) -> str:
        """Why this way does not do for a block; empty when it does."""
        ...

    def begin(self, task: Task) -> Iterable[Rewrite]:
        """What comes before the first block."""
        ...

    def write(self, task: Task, normed: NormedBlock) -> Rewrite | Refusal:
        """The conversion of one block."""
        ...


class Convert:
    """The norms move, now."""

    def __init__(self) -> None:
        self._deep: DeepScales | None = None

    def against(self, normed: NormedBlock) -> str:
        """Nothing."""
        return ""

    def begin(self, task: Task) -> Iterable[Rewrite]:
        """Nothing comes before the first block."""
        self._deep = DeepScales(task.graph, task.stacks) if task.target == "deepnorm" else None
        return ()

    def write(self, task: Task, normed: NormedBlock) -> Rewrite:
        """Norms off where the target has none, and on where it has some; then the end of the stack."""
        sketch = task.sketch(normed, "lead" if "tail" in normed.units else "tail")
        notes = list(_move(sketch, normed, task.target))
        equation = EQUATIONS[task.target]
        if self._deep is not None:
            alpha, beta = self._deep.factors(normed.block)
            scale_skip(sketch, normed, alpha)
            scaled = self._deep.shrink(sketch, normed, beta)
            equation = equation.replace("F(", "βF(")
            notes.append(f"α = {alpha:.4g}, β = {beta:.4g} on {scaled}")
        stream = normed.units.get("close", normed.norm)
        notes += [task.ends.add(sketch, normed), task.ends.drop(sketch, normed, stream.output)]
        return _rewrite(normed, equation, notes, CHANGES, sketch)


class Reblock:
    """Nothing moves: y = N(x + F(x)) is read as n = N(x), y = n + F(n), with the norm of the block before."""

    def against(self, normed: NormedBlock) -> str:
        """Only a post-norm block can be read so."""
        return "" if normed.placed == "post" else "only post-norm blocks are re-blocked"

    def begin(self, task: Task) -> Iterable[Rewrite]:
        """Nothing comes before the first block."""
        return ()

    def write(self, task: Task, normed: NormedBlock) -> Rewrite:
        """No edit; in words where the norm belongs now."""
        following = task.stacks.next_blocks(normed.block)
        place = f"opens block '{following[0][0].join}'" if following else "is the final norm"
        note = f"'{normed.norm.norm.name}' {place}, whose skip is taken after it"
        return Rewrite(normed.name, f"{EQUATIONS['post']}  →  n = N(x), y = n + F(n)", f"{note}; {EXACT}", ())


class Blend:
    """Both forms at once, mixed by a scalar of the model that starts at the original."""

    def __init__(self) -> None:
        self._blender: Blender | None = None

    def against(self, normed: NormedBlock) -> str:
        """Only from post-norm."""
        return "" if normed.placed == "post" else "only post-norm blocks are blended into pre-norm ones"

    def begin(self, task: Task) -> Iterable[Rewrite]:
        """The scalar, if any block will need it."""
        self._blender = Blender(task.graph, task.fresh, [normed.sum.dtype or "" for normed in task.converted.values()])
        return self._blender.scalars()

    def write(self, task: Task, normed: NormedBlock) -> Rewrite:
        """The branch reads (1−λ)·x + λ·N(x), and the stream goes on as (1−λ)·N(s) + λ·s."""
        assert self._blender is not None  # begin comes first
        sketch = task.sketch(normed, "lead")
        made = self._blender.blend(sketch, normed)
        note = self._blender.blend_end(sketch, normed, made, task.ends)
        equation = f"{EQUATIONS['post']}  →  s = x + F((1−λ)x + λN(x)), y = (1−λ)N(s) + λs"
        return _rewrite(normed, equation, [note], f"{EXACT} while λ = 0", sketch)


class Calibrate:
    """The norms move, and every branch gets the factor by which the stream has grown before it."""

    def __init__(self, data: str | Mapping[str, Any] | None) -> None:
        self.data = data
        self._factors: Mapping[Block, float] = {}

    def against(self, normed: NormedBlock) -> str:
        """Only from post-norm, and with one branch."""
        if normed.placed != "post":
            return "only post-norm blocks are calibrated"
        return "" if len(normed.ends) == 1 else f"it has {len(normed.ends)} branches, which meet in the sum only"

    def begin(self, task: Task) -> Iterable[Rewrite]:
        """One forward pass over the data."""
        self._factors = proportions(task.graph, task.stacks, list(task.converted.values()), self.data)
        return ()

    def write(self, task: Task, normed: NormedBlock) -> Rewrite:
        """As `Convert`, with the factor as a trained scalar."""
        sketch = task.sketch(normed, "branch")
        notes = list(_move(sketch, normed, task.target))
        factor = self._factors[normed.block]
        scale_branch(sketch, normed, factor)
        notes += [f"branch × {factor:.4g}", task.ends.add(sketch, normed, like=True)]
        return _rewrite(normed, "y = x + c·F(N(x))", notes, CHANGES, sketch)


def made_here(unit: NormUnit) -> bool:
    """Whether a conversion added the norm, so that another one may take it away."""
    return unit.norm.provenance == "sandwich"


def _move(sketch: Sketch, normed: NormedBlock, target: str) -> Iterator[str]:
    """Norms off and on; in words what went where."""
    wanted, units = SPOTS[target], normed.units
    surplus = {spot for spot in units if made_here(units[spot])} if len(units) > len(wanted) else set()
    leaving = sorted((spot for spot in units if spot not in wanted or spot in surplus), key=surplus.__contains__)
    coming = [spot for spot in wanted if spot not in units or spot in leaving]
    model = next(units[spot] for spot in units if spot not in surplus)
    free = [take_off(sketch, normed, spot) for spot in leaving]
    for spot in coming:
        if free:
            unit = free.pop(0)
            put_on(sketch, normed, spot, unit)
            yield f"'{unit.norm.name}' {_PLACES[spot]}"
        else:
            put_new(sketch, normed, spot, model)
            yield f"a new norm {_PLACES[spot]}"
    if normed.placed == "deepnorm" and target != "deepnorm":
        unscale_skip(sketch, normed)  # last: norms at the entry read what the factor reads
        yield "α goes from the skip, β stays in the weights"
    for unit in free:
        sketch.edits += [Erase(op.name) for op in reversed(unit.ops)]
        yield f"'{unit.norm.name}' goes"


_PLACES = {"lead": "to the branch's entry", "tail": "to the branch's end", "close": "behind the sum"}


def _rewrite(normed: NormedBlock, equation: str, notes: Iterable[str], verdict: str, sketch: Sketch) -> Rewrite:
    source = EQUATIONS[normed.placed]
    text = equation if "→" in equation else f"{source}  →  {equation}"
    if sketch.parameters:
        notes = [*notes, f"{sketch.parameters:,} new parameters"]
    return Rewrite(normed.name, text, "; ".join([*filter(None, notes), verdict]), tuple(sketch.edits))
