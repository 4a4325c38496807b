"""A stack between two placements: every block in both forms at once, mixed by one scalar λ of the model.

```
s = x + F((1−λ)·x + λ·N(x)),   y = (1−λ)·N(s) + λ·s        λ = 0: y = N(x + F(x)), to the bit;  λ = 1: y = x + F(N(x))
```
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rescompile.graph import Graph
from rescompile.kinds import OpKind
from rescompile.passes.norm_blocks import NormedBlock
from rescompile.passes.norm_ends import Ends
from rescompile.passes.norm_moves import copy_norm, new_norm, read
from rescompile.passes.sketch import Made, Sketch, Term
from rescompile.plans import FreshNames, Insert, ReadAlike, ReplaceUses, Rewrite, SetOperand

BLEND = "norm_blend"
"""What the scalar is called in the model's state."""


class Blender:
    """Writes blends. All of a plan's blends share one scalar."""

    def __init__(self, graph: Graph, fresh: FreshNames, dtypes: Sequence[str]) -> None:
        self.graph = graph
        self.fresh = fresh
        self.dtype = dtypes[0] if dtypes else "float32"
        self.empty = not dtypes
        self.scalar = Made(BLEND, (), self.dtype)
        self.rest = Made(BLEND, (), self.dtype)

    def scalars(self) -> Iterator[Rewrite]:
        """λ = 0, a buffer of the model, and 1 − λ."""
        if self.empty:
            return
        name = self.fresh(BLEND)
        sketch = Sketch(self.graph, self.fresh, name, self.dtype, 0)
        self.scalar = sketch.scalar(name, 0.0)
        one = sketch.literal(1.0)
        self.rest = Made(self.fresh(f"{name}_rest"), (), self.dtype)
        made = ((self.rest.name, (), self.dtype),)
        sketch.edits.append(Insert(OpKind.ADD.value, (one.name, self.scalar.name), made, {"scales": (1.0, -1.0)}))
        reason = f"set the model's '{name}' from 0 to 1 while it trains, then freeze-blend"
        yield Rewrite(name, "λ = 0", reason, tuple(sketch.edits))

    def blend(self, sketch: Sketch, normed: NormedBlock) -> Made:
        """Both forms of a block; what the stream behind it is then."""
        skip, unit = normed.skip, normed.units["close"]
        lead = copy_norm(sketch, unit, normed.fork)
        sketch.edits.append(ReadAlike(lead[0].name, 0, skip.op.name, skip.index))
        plain, entry = self._mix(sketch, normed.fork, lead[-1], "lead")
        sketch.edits.append(ReadAlike(plain.name, 0, skip.op.name, skip.index))
        for slot in normed.entries:
            read(sketch, slot, entry)
        return self._in_place(sketch, unit.output, unit.input, "stream")

    def blend_end(self, sketch: Sketch, normed: NormedBlock, stream: Made, ends: Ends) -> str:
        """The norm behind the stack, blended in, where the stack would end un-normed; in words."""
        name = ends.name_for(normed.block)
        if name is None:
            return ""
        final = Sketch(self.graph, self.fresh, name, sketch.dtype, 0)
        made = new_norm(final, stream, normed.norm)
        sketch.edits += final.edits
        sketch.parameters += final.parameters
        self._in_place(sketch, stream, made, "end", keep=made.name)
        return f"the stack ends in a new norm, {name}"

    def _in_place(self, sketch: Sketch, old: Term, new: Term, label: str, keep: str | None = None) -> Made:
        """Let what read `old` read (1−λ)·old + λ·new, except for `keep`, which makes `new` of it."""
        plain, mixed = self._mix(sketch, old, new, label)
        sketch.edits.append(ReplaceUses(old.name, mixed.name))
        for reader in filter(None, (plain.name, keep)):
            sketch.edits.append(SetOperand(reader, 0, old.name))
        return mixed

    def _mix(self, sketch: Sketch, old: Term, new: Term, label: str) -> tuple[Made, Made]:
        """(1−λ)·old, and (1−λ)·old + λ·new."""
        plain = sketch.op(OpKind.MUL, old, self.rest, label=f"{label}_old", shape=old.shape)
        moved = sketch.op(OpKind.MUL, new, self.scalar, label=f"{label}_new", shape=old.shape)
        return plain, sketch.op(OpKind.ADD, plain, moved, label=f"{label}_mixed", shape=old.shape)
