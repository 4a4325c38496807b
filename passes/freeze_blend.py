"""The end of a gradual conversion: the blend's scalar goes, and with it the form that it switched off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind
from rescompile.passes.norm_blend import BLEND
from rescompile.plans import Edit, Erase, Plan, Preserves, Refusal, ReplaceUses, Rewrite, gather


@dataclass(frozen=True)
class FreezeBlend:
    """y = (1−λ)·a + λ·b  →  y = b where λ = 1, y = a where λ = 0

    1. `scalar` names λ, a parameter without dimensions; `pre-norm{mode=gradual}` makes one.
    2. λ is 0 or 1 to the bit: in between the blend is the model, and nothing is frozen.
    3. What only the other side was made of goes too.
    """

    name: ClassVar[str] = "freeze-blend"
    preserves: ClassVar[Preserves] = "values"
    scalar: str = BLEND

    def plan(self, graph: Graph) -> Plan:
        """One rewrite for all mixes of the scalar, or a refusal."""
        return gather(self.name, self.preserves, graph, [self._decide(graph)])

    def _decide(self, graph: Graph) -> Rewrite | Refusal:
        scalar = next((value for value in graph.parameters if value.name == self.scalar), None)
        if scalar is None:
            return Refusal(graph.name or "model", f"the model has no parameter '{self.scalar}', so no blend")
        number = graph.scalar(scalar)
        if number not in (0.0, 1.0):
            shown = "no number" if number is None else f"{number:g}"
            return Refusal(self.scalar, f"it is {shown}: a blend is frozen at 1, or at 0 for the original form")
        rest = {op.output for op in scalar.users if _is_rest(graph, op, scalar)}
        mixes = list(_mixes(scalar, rest))
        readers = {op for value in (scalar, *rest) for op in value.users}
        known = {op for mix in mixes for op in mix.products} | {value.producer for value in rest}
        stranger = next((op for op in readers if op not in known), None)
        if stranger is not None:
            return Refusal(self.scalar, f"'{stranger.name}' reads it, which is no blend of two values")
        stand_ins = _followed({mix.sum.output: mix.new if number else mix.old for mix in mixes})
        edits: list[Edit] = [ReplaceUses(old.name, new.name) for old, new in stand_ins.items()]
        dropped: dict[Op, None] = {mix.sum: None for mix in mixes}
        _drop_unread(graph, dropped, stand_ins)
        edits += [Erase(op.name) for op in sorted(dropped, key=lambda op: -op.order)]
        side = "λ = 1: y = (1−λ)·a + λ·b  →  y = b" if number else "λ = 0: y = (1−λ)·a + λ·b  →  y = a"
        return Rewrite(self.scalar, side, f"{len(mixes)} blends, {len(dropped)} operations go", tuple(edits))


@dataclass(frozen=True, slots=True, eq=False)
class _Mix:
    """(1−λ)·old + λ·new."""

    sum: Op
    old: Value
    new: Value
    products: tuple[Op, Op]


def _is_rest(graph: Graph, op: Op, scalar: Value) -> bool:
    """Whether an operation is 1 − λ."""
    if op.kind is not OpKind.ADD or len(op.inputs) != 2:
        return False
    other = next(index for index, value in enumerate(op.inputs) if value is not scalar)
    return graph.scalar(op.inputs[other]) == 1.0 and op.scales[other] == 1.0 and op.scales[1 - other] == -1.0


def _mixes(scalar: Value, rest: set[Value]) -> Iterator[_Mix]:
    for product in scalar.users:
        new = _factor(product, {scalar})
        for total in product.output.users if new is not None else ():
            others = [value for value in total.operands if value is not product.output]
            twin = others[0].producer if total.kind is OpKind.ADD and len(others) == 1 else None
            old = None if twin is None else _factor(twin, rest)
            if new is not None and twin is not None and old is not None:
                yield _Mix(total, old, new, (twin, product))


def _factor(op: Op, scalars: set[Value]) -> Value | None:
    """What an operation multiplies by one of the scalars."""
    if op.kind is not OpKind.MUL:
        return None
    others = [value for value in op.operands if value not in scalars]
    return others[0] if len(others) == 1 and len(op.operands) == 2 else None


def _followed(stand_ins: dict[Value, Value]) -> dict[Value, Value]:
    """The same, where a stand-in is replaced itself, by what replaces it."""
    found = {}
    for old, new in stand_ins.items():
        while new in stand_ins:
            new = stand_ins[new]
        found[old] = new
    return found


def _drop_unread(graph: Graph, dropped: dict[Op, None], stand_ins: dict[Value, Value]) -> None:
    """Add what nothing reads any more once the dropped operations are gone, their readers moved to the stand-ins."""
    moved: dict[Value, int] = {}
    for old, new in stand_ins.items():
        moved[new] = moved.get(new, 0) + len([op for op in old.users if op not in dropped]) + graph.is_output(old)
    pending = list(dropped)
    while pending:
        op = pending.pop()
        for value in op.operands:
            made = value.producer
            if made is None or made in dropped or any(out in moved and moved[out] for out in made.outputs):
                continue
            if any(graph.is_output(out) or any(user not in dropped for user in out.users) for out in made.outputs):
                continue
            dropped[made] = None
            pending.append(made)
