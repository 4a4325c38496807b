"""Edits that change what an operation's parameters hold, where several rewrites of one plan may change the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import structs

from rescompile.graph import Graph, Op, Role, Value
from rescompile.plans import AddParameter, Edit, FreshNames, Fuse, SetOperand, SetParameter, fuse_edit


class Contents:
    """Who reads which contents, as the edits so far leave it.

    `stands`: values that are gone, by what is read instead.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.fresh = FreshNames(graph)
        self.stands: dict[str, str] = {}
        self._own: dict[tuple[Op, int], str] = {}
        self._called: dict[Op, str] = {}
        self._changed: set[Op] = set()
        self.biased: set[Op] = set()  # contractions that were given a bias

    def now(self, value: Value) -> str:
        """What is read in the place of a value of the graph."""
        name = value.name
        while name in self.stands:
            name = self.stands[name]
        return name

    def operands(self, op: Op) -> list[str]:
        """What an operation reads now."""
        return [self._own.get((op, index)) or self.now(value) for index, value in enumerate(op.operands)]

    def changed(self, op: Op) -> bool:
        """Whether it reads contents of its own by now."""
        return op in self._changed

    def shared(self, op: Op, index: int) -> Op | None:
        """Another operation that reads the same contents, of several dimensions, as they are."""
        value = op.inputs[index] if index < len(op.inputs) else None
        if value is None or (op, index) in self._own or (value.rank or 0) < 2 or self.graph.may_share(value):
            return None
        return next((user for user in value.users if user is not op), None)

    def change(
        self, op: Op, index: int, recipe: str, others: Sequence[Value | None], attrs: dict[str, Any]
    ) -> list[Edit]:
        """New contents for one operand, by a recipe whose first operand is what it holds."""
        rest = tuple(None if other is None else other.name for other in others)
        self._changed.add(op)
        own = self._owned(op, index)
        if own:
            return [SetParameter(own, recipe, (own, *rest), attrs)]
        value = op.inputs[index]
        assert value is not None  # a site has contents
        name = self.fresh(f"{value.name}_folded")
        self._own[op, index] = name
        return [
            AddParameter(name, recipe, (value.name, *rest), attrs),
            SetOperand(self._called.get(op, op.name), index, name),
        ]

    def shift(self, op: Op, recipe: str, others: Sequence[Value | None], attrs: dict[str, Any]) -> list[Edit]:
        """A new bias, by a recipe whose first operands are weight and bias; the operation gets one if it has none."""
        weight, bias = op.inputs[1], op.operand("bias")
        assert weight is not None  # a contraction has one
        rest = tuple(None if other is None else other.name for other in others)
        self._changed.add(op)
        kernel = self._own.get((op, 1), weight.name)
        own = self._owned(op, 2)
        if own:
            return [SetParameter(own, recipe, (kernel, own, *rest), attrs)]
        name = self.fresh(f"{bias.name}_folded" if bias is not None else _bias_name(weight.name))
        self._own[op, 2] = name
        if bias is None:
            self.biased.add(op)
        made = AddParameter(name, recipe, (kernel, None if bias is None else bias.name, *rest), attrs)
        if bias is not None:
            return [made, SetOperand(self._called.get(op, op.name), 2, name)]
        x = op.inputs[0]
        assert x is not None  # it reads something
        fused = fuse_edit([op], op.kind, [self.now(x), kernel, name], op.outputs, **op.attrs)
        return [made, self.replaced(fused, op)]

    def replaced(self, edit: Fuse, op: Op) -> Fuse:
        """An edit that puts one operation in the place of `op`, which edits before it may have given another name."""
        called = self._called.get(op, op.name)
        self._called[op] = op.output.name
        return structs.replace(edit, ops=(called,))

    def _owned(self, op: Op, index: int) -> str:
        """The parameter that a pass made for this operand alone; empty where there is none."""
        known = self._own.get((op, index))
        value = op.inputs[index] if index < len(op.inputs) else None
        if known or value is None or not op.provenance or value.role is not Role.PARAMETER:
            return known or ""
        return value.name if set(value.uses) == {(op, index)} else ""


def _bias_name(weight: str) -> str:
    """`layer.weight` → `layer.bias_folded`; a name without a leaf to replace gets one more."""
    stem, dot, _ = weight.removesuffix("_folded").rpartition(".")
    return f"{stem}.bias_folded" if dot else f"{weight}_bias_folded"
