"""Residual blocks with their norms, as the passes that move norms see them.

```
s = x + F(x)     fork x, skip, branch F from its entries to its end, sum s
```

Around these a norm has three places: the *lead*, what the branch reads (pre); the *tail*, between the branch's end and
the sum; and the *close*, behind the sum (post). A placement is a set of these, and a block is described once, whatever
its own is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from rescompile.blocks import Block
from rescompile.graph import Op, Shape, Value
from rescompile.kinds import OpKind

Spot: TypeAlias = Literal["lead", "tail", "close"]

SPOTS: dict[str, tuple[Spot, ...]] = {
    "pre": ("lead",),
    "post": ("close",),
    "branch": ("tail",),
    "sandwich": ("lead", "tail"),
    "deepnorm": ("close",),
}
"""Where each placement has its norms."""

EQUATIONS = {
    "pre": "y = x + F(N(x))",
    "post": "y = N(x + F(x))",
    "branch": "y = x + N(F(x))",
    "sandwich": "y = x + N₂(F(N(x)))",
    "deepnorm": "y = N(αx + F(x))",
}


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """One operand of one operation."""

    op: Op
    index: int

    @property
    def value(self) -> Value:
        """What is read there."""
        value = self.op.inputs[self.index]
        assert value is not None  # slots are made of operands that are there
        return value


@dataclass(frozen=True, slots=True, eq=False)
class NormUnit:
    """A norm with the casts and the gain beside it: one value in, one of the same shape out."""

    norm: Op
    ops: tuple[Op, ...]
    readers: tuple[Slot, ...]  # where it reads its input

    @property
    def input(self) -> Value:
        """What is normalised."""
        return self.readers[0].value

    @property
    def output(self) -> Value:
        """What comes out."""
        return self.ops[-1].outputs[0]


@dataclass(frozen=True, slots=True, eq=False)
class NormedBlock:
    """A residual block, and where its norms are.

    `entries`: where the branch reads the stream, or the lead norm. `ends`: where the sum, or the scale before it, reads
    the branch's result, or the tail norm. `skip`: where the shortcut reads the stream. `scaled`: where the factor of a
    scaled skip stands.
    """

    block: Block
    placement: str
    units: dict[Spot, NormUnit]
    entries: tuple[Slot, ...]
    ends: tuple[Slot, ...]
    skip: Slot
    sum: Value
    factor: Op | None = None
    weights: frozenset[Value] = field(default=frozenset())  # parameters of the branch, its norms' aside

    @property
    def name(self) -> str:
        """What reports call the block."""
        return self.block.join

    @property
    def fork(self) -> Value:
        """The stream before the block."""
        return self.block.fork_value

    @property
    def out(self) -> Value:
        """The stream behind the block."""
        return self.units["close"].output if "close" in self.units else self.sum

    @property
    def end(self) -> Value:
        """The branch's result, before a tail norm."""
        return self.units["tail"].input if "tail" in self.units else self.ends[0].value

    @property
    def placed(self) -> str:
        """The placement; `deepnorm` for a post-norm block with a factor on its skip."""
        return "deepnorm" if self.placement == "post" and self.factor is not None else self.placement

    @property
    def norm(self) -> NormUnit:
        """The one norm of a placement that has one."""
        return next(iter(self.units.values()))


def fits(unit: NormUnit, shape: Shape | None) -> bool:
    """Whether a norm can work on a value of that shape: the same, or the same features in other rows."""
    own = unit.input.shape
    if own is None or shape is None or unit.norm.kind is OpKind.GROUP_NORM:
        return own is not None and own == shape
    return bool(own) and bool(shape) and own[-1] == shape[-1]


def keeps_features(op: Op) -> bool:
    """Whether an operation only rearranges rows: the last axis stays what and where it is."""
    before, after = op.operands[0].shape, op.output.shape
    if op.kind is OpKind.RESHAPE:
        return bool(before) and bool(after) and before[-1] == after[-1]  # type: ignore[index]
    if op.kind is OpKind.PERMUTE:
        perm = op.attr("perm")
        return bool(perm) and perm[-1] == len(perm) - 1
    return op.kind is OpKind.IDENTITY and not op.attr("dropout")
