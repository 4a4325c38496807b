"""Several nodes that are one operation: a linear with its bias or transposed weight, the turned keys of attention."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from rescompile.graph import Shape, ValueType
from rescompile.kinds import OpKind as K
from rescompile.onnx_ops import Step
from rescompile.onnx_shapes import Facts


@dataclass(slots=True, eq=False)
class Item:
    """Native nodes and the logical operations that they are read as."""

    nodes: tuple[ir.Node, ...]
    steps: list[Step]
    outputs: tuple[ir.Value, ...]
    shown: bool = True


class Merger:
    """Joins an item that was just read with those before it that only it reads."""

    def __init__(self, items: MutableMapping[ir.Node, Item], facts: Facts, constants: set[ir.Value]) -> None:
        self._items = items
        self._facts = facts
        self._constants = constants

    def merge(self, item: Item) -> None:
        """Join `item`, which is one operation, with what belongs to it."""
        step = item.steps[0]
        if step.kind is K.LINEAR and step.attrs.get("transpose_weight") is False:
            self._transposed_weight(item, step)
        elif step.kind is K.ADD and len(step.inputs) == 2 and "scales" not in step.attrs:
            self._bias(item, step)
        elif step.kind is K.PERMUTE:
            self._split_permute(item, step)
        elif step.kind is K.RESHAPE:
            self._reshaped_keys(item, step)

    def type(self, operand: Any) -> ValueType:
        """Type of a native value, an earlier step or a literal."""
        if isinstance(operand, Step):
            return operand.type
        if isinstance(operand, ir.Value):
            return self._facts.type(operand)
        return ValueType(tuple(operand.shape), str(operand.dtype))

    # ---- linears -------------------------------------------------------------------------------------------------

    def _transposed_weight(self, item: Item, step: Step) -> None:
        """MatMul(x, Transpose(W)) = linear with the weight as torch keeps it"""
        before = self._sole(step.inputs[1])
        if before is not None and before.steps[0].kind is K.PERMUTE and before.steps[0].attrs["perm"] == (1, 0):
            step.inputs = [step.inputs[0], before.steps[0].inputs[0], *step.inputs[2:]]
            step.attrs = {"transpose_weight": True}
            self._absorb(item, before)

    def _bias(self, item: Item, step: Step) -> None:
        """MatMul(x, W) + b, either way round"""
        for product, bias in (step.inputs, reversed(step.inputs)):
            before = self._sole(product)
            linear = before.steps[0] if before is not None else None
            if before is None or linear is None or linear.kind is not K.LINEAR or linear.inputs[2] is not None:
                continue
            if bias in self._constants and self._fits(bias, linear):
                step.kind, step.attrs = K.LINEAR, linear.attrs
                step.inputs = [*linear.inputs[:2], bias]
                self._absorb(item, before)
                return

    def _fits(self, bias: Any, linear: Step) -> bool:
        weight = self.type(linear.inputs[1]).shape
        width = weight[0 if linear.attrs["transpose_weight"] else 1] if weight is not None else None
        return self.type(bias).shape == (width,)

    # ---- keys ----------------------------------------------------------------------------------------------------

    def _split_permute(self, item: Item, step: Step) -> None:
        """[N, S, H, D] → [N, H, D, S] for a product: the heads come forward, then keys are transposed.

        Exporters merge the two; apart, the transposition is part of an attention whose keys are a value.
        """
        perm = tuple(step.attrs["perm"])
        rank = len(perm)
        kind = self.type(step.inputs[0])
        if rank < 3 or kind.shape is None or perm[-2] != rank - 1 or not self._feeds_product(item):
            return
        first = (*perm[:-2], perm[-1], perm[-2])
        if first == tuple(range(rank)):
            return
        moved = ValueType(tuple(kind.shape[axis] for axis in first), kind.dtype)
        heads = Step(K.PERMUTE, step.inputs, {"perm": first}, type=moved, virtual=True)
        step.inputs, step.attrs = [heads], {"perm": _swap(rank)}
        item.steps = [heads, step]

    def _reshaped_keys(self, item: Item, step: Step) -> None:
        """[N, H, S, D] → [N·H, S, D] → [N·H, D, S] → [N, H, D, S]: the same as transposing where they are."""
        before = self._sole(step.inputs[0])
        out = self.type(item.outputs[0]).shape
        if before is None or before.steps[0].kind is not K.PERMUTE or out is None or not self._feeds_product(item):
            return
        turn = before.steps[0]
        turned, flat = self.type(before.outputs[0]).shape, turn.inputs[0]
        if turned is None or tuple(turn.attrs["perm"]) != _swap(len(turned)) or turned[-2:] != out[-2:] or len(out) < 3:
            return
        wanted: Shape = (*out[:-2], out[-1], out[-2])
        reshape = self._sole(flat)
        self._absorb(item, before)
        step.kind, step.attrs = K.PERMUTE, {"perm": _swap(len(out))}
        if reshape is not None and reshape.steps[0].kind is K.RESHAPE:
            source = reshape.steps[0].inputs[0]
            if self.type(source).shape == wanted:
                step.inputs = [source]
                self._absorb(item, reshape)
                return
        kept = Step(K.RESHAPE, [flat], type=ValueType(wanted, self.type(flat).dtype), virtual=True)
        step.inputs = [kept]
        item.steps = [kept, step]

    def _feeds_product(self, item: Item) -> bool:
        """Whether the only reader is a product, or a factor on the way to one."""
        uses = list(item.outputs[0].uses())
        if len(uses) != 1 or item.outputs[0].is_graph_output():
            return False
        reader, slot = uses[0]
        return (reader.op_type == "MatMul" and slot == 1) or reader.op_type in ("Mul", "Div")

    # ---- both ----------------------------------------------------------------------------------------------------

    def _sole(self, value: Any) -> Item | None:
        """The item that makes the value, when it is one operation and nothing else reads it."""
        producer = value.producer() if isinstance(value, ir.Value) else None
        item = self._items.get(producer) if producer is not None else None
        if item is None or len(item.steps) != 1 or len(value.uses()) != 1 or value.is_graph_output():
            return None
        return item

    def _absorb(self, item: Item, before: Item) -> None:
        del self._items[before.nodes[-1]]
        item.nodes = (*before.nodes, *item.nodes)


def _swap(rank: int) -> tuple[int, ...]:
    return (*range(rank - 2), rank - 1, rank - 2)
