"""Plans: what a pass wants to do to a graph, as data that can be printed, saved, edited, and applied later.

A pass is a pure function from a graph to a `Plan`: rewrites in order, each a small transaction of edits in the neutral
vocabulary with its equation and reason, and refusals with theirs. Edits name operations and values, so a plan made on
one copy of a model applies to another, and the same plan reads the same for both IRs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import msgspec
import numpy as np

from rescompile.errors import RescompileError, nearest
from rescompile.fused_region import describe
from rescompile.graph import Graph, Op, Shape, Value, ValueType
from rescompile.kinds import OpKind, Trait
from rescompile.recipes import RECIPES

Preserves: TypeAlias = Literal["values", "interface"]


class Insert(msgspec.Struct, frozen=True, tag="insert", tag_field="edit"):
    """A new operation. `outputs`: name, shape and dtype of each value that it produces."""

    kind: str
    inputs: tuple[str | None, ...]
    outputs: tuple[tuple[str, tuple[int | str, ...] | None, str | None], ...]
    attrs: dict[str, Any] = {}

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        outputs = [(name, ValueType(shape, dtype)) for name, shape, dtype in self.outputs]
        inputs = _values(graph, self.inputs)
        graph.insert(_kind(self.kind), inputs, outputs, _attrs(self.attrs), provenance=provenance)


class Erase(msgspec.Struct, frozen=True, tag="erase", tag_field="edit"):
    """Remove an operation that nobody reads any more.

    `for_good`: training is to do without it too. Otherwise a model from which it takes a norm or a dropout only infers.
    """

    op: str
    for_good: bool = False

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        graph.erase(graph.op(self.op), for_good=self.for_good)


class SetShape(msgspec.Struct, frozen=True, tag="set_shape", tag_field="edit"):
    """Give a value the shape that it has now that what its operation reads has another."""

    value: str
    shape: tuple[int | str, ...] | None

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        graph.set_shape(graph.value(self.value), self.shape)


class SetOperand(msgspec.Struct, frozen=True, tag="set_operand", tag_field="edit"):
    """Let one operand of an operation be another value."""

    op: str
    index: int
    value: str

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        op = graph.op(self.op)
        if not 0 <= self.index < len(op.inputs):
            raise RescompileError(f"'{self.op}' has {len(op.inputs)} operands, so none of index {self.index}.")
        graph.set_operand(op, self.index, graph.value(self.value))


class ReadAlike(msgspec.Struct, frozen=True, tag="read_alike", tag_field="edit"):
    """Let one operand of an operation be what another operation reads when the edit is applied.

    An edit that follows the stream by way of one of its readers holds whatever earlier edits made of the stream.
    """

    op: str
    index: int
    like: str
    like_index: int

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        operands = graph.op(self.like).inputs
        value = operands[self.like_index] if 0 <= self.like_index < len(operands) else None
        if value is None:
            raise RescompileError(f"'{self.like}' has no operand {self.like_index} that '{self.op}' could read.")
        SetOperand(self.op, self.index, value.name).apply(graph, provenance)


class ReplaceUses(msgspec.Struct, frozen=True, tag="replace_uses", tag_field="edit"):
    """Let every reader of one value, the graph's outputs included, read another."""

    old: str
    new: str

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        graph.replace_uses(graph.value(self.old), graph.value(self.new))


class AddParameter(msgspec.Struct, frozen=True, tag="add_parameter", tag_field="edit"):
    """A new parameter, computed from others by a recipe of `rescompile.recipes`; a buffer where not `trainable`."""

    name: str
    recipe: str
    operands: tuple[str | None, ...] = ()
    attrs: dict[str, Any] = {}
    trainable: bool = True

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        data = _computed(graph, self.recipe, self.operands, self.attrs)
        graph.add_parameter(self.name, data, trainable=self.trainable)


class AddLiteral(msgspec.Struct, frozen=True, tag="add_literal", tag_field="edit"):
    """A number, as a tensor without dimensions that no training changes."""

    name: str
    number: float
    dtype: str

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        graph.add_literal(self.name, self.number, self.dtype)


class SetParameter(msgspec.Struct, frozen=True, tag="set_parameter", tag_field="edit"):
    """New contents for a parameter, computed from its own and others' by a recipe; its name stays."""

    name: str
    recipe: str
    operands: tuple[str | None, ...] = ()
    attrs: dict[str, Any] = {}

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        graph.set_data(graph.value(self.name), _computed(graph, self.recipe, self.operands, self.attrs))


class Fuse(msgspec.Struct, frozen=True, tag="fuse", tag_field="edit"):
    """One operation in the place of several. `outputs` are values that those produce; names and readers stay."""

    ops: tuple[str, ...]
    kind: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    attrs: dict[str, Any] = {}

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        ops = [graph.op(name) for name in self.ops]
        outputs = [graph.value(name) for name in self.outputs]
        inputs = _values(graph, self.inputs)
        graph.fuse(ops, _kind(self.kind), inputs, outputs, _attrs(self.attrs), provenance=provenance)


class Unfuse(msgspec.Struct, frozen=True, tag="unfuse", tag_field="edit"):
    """The operations that a fused one stands for, in its place.

    Where only one runtime has the operators that an operation is written in, it is written in standard ones.
    """

    op: str

    def apply(self, graph: Graph, provenance: str) -> None:
        """Edit `graph`."""
        op = graph.op(self.op)
        if op.has(Trait.FUSED):
            graph.unfuse(op, provenance=provenance)
        elif graph.foreign(op):
            graph.respell(op, provenance=provenance)
        else:
            raise RescompileError(f"'{self.op}' is a {op.kind.value}, which is not a fused operation.")


Edit: TypeAlias = (
    Insert
    | Erase
    | SetShape
    | SetOperand
    | ReadAlike
    | ReplaceUses
    | AddParameter
    | AddLiteral
    | SetParameter
    | Fuse
    | Unfuse
)


class Refusal(msgspec.Struct, frozen=True):
    """Why a pass leaves one place alone. False in a condition, so that a rule can return it instead of a rewrite."""

    where: str
    reason: str
    pass_name: str = msgspec.field(default="", name="pass")

    def __bool__(self) -> bool:
        return False

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class Rewrite(msgspec.Struct, frozen=True):
    """One transaction: all of its edits, or none."""

    where: str
    equation: str
    reason: str
    edits: tuple[Edit, ...]
    preserves: Preserves = "values"
    pass_name: str = msgspec.field(default="", name="pass")

    def apply(self, graph: Graph) -> None:
        """Edit `graph`; RescompileError says which rewrite does not fit it."""
        try:
            for edit in self.edits:
                edit.apply(graph, self.pass_name)
        except RescompileError as error:
            raise RescompileError(f"The rewrite '{self.pass_name}' at '{self.where}' does not fit: {error}") from error

    def __str__(self) -> str:
        return f"{self.where}: {self.equation}  ({self.reason})"


class Plan(msgspec.Struct):
    """What to do, in order, and what was left alone and why."""

    model: str = ""
    ir: str = ""
    rewrites: list[Rewrite] = []
    refusals: list[Refusal] = []
    schema: int = 1

    def apply(self, graph: Graph) -> None:
        """Edit `graph` by every rewrite, then commit. The graph is unusable after an error: edit a clone."""
        for rewrite in self.rewrites:
            rewrite.apply(graph)
        graph.commit()

    def extend(self, other: Plan) -> None:
        """Append the rewrites and refusals of a plan that was made on the graph as this one leaves it."""
        self.rewrites.extend(other.rewrites)
        self.refusals.extend(other.refusals)

    def to_json(self) -> str:
        """As indented JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2).decode()

    @classmethod
    def from_json(cls, text: bytes | str) -> Plan:
        """From JSON; RescompileError names the place where it is not a plan."""
        try:
            plan = msgspec.json.decode(text, type=cls)
        except msgspec.MsgspecError as error:
            raise RescompileError(f"This is not a plan of rescompile: {error}.") from error
        if plan.schema != 1:
            raise RescompileError(f"The plan has schema {plan.schema}; this version reads schema 1: plan again.")
        return plan

    def __str__(self) -> str:
        lines = [f"{len(self.rewrites)} rewrites, {len(self.refusals)} refusals"]
        lines += [f"  {rewrite.pass_name:<18} {rewrite}" for rewrite in self.rewrites]
        lines += [f"  {refusal.pass_name:<18} refused {refusal}" for refusal in self.refusals]
        return "\n".join(lines)


@runtime_checkable
class Pass(Protocol):
    """A rewrite rule with its options: a frozen dataclass whose fields are the options."""

    name: ClassVar[str]

    @property
    def preserves(self) -> Preserves:
        """What the pass keeps: the values that the model computes, or its interface."""
        ...

    def plan(self, graph: Graph) -> Plan:
        """What the pass would do to `graph`, which it does not change."""
        ...


@runtime_checkable
class Pipeline(Protocol):
    """A pass that is several others in order, each planned on the graph that the one before leaves."""

    name: ClassVar[str]

    @property
    def preserves(self) -> Preserves:
        """What all of its stages keep."""
        ...

    def stages(self) -> Sequence[Pass]:
        """The passes, in order."""
        ...


def gather(name: str, preserves: Preserves, graph: Graph, decisions: Iterable[Rewrite | Refusal]) -> Plan:
    """A plan out of the decisions that a pass took, each stamped with the pass's name."""
    plan = Plan(graph.name, graph.ir)
    for decision in decisions:
        if isinstance(decision, Rewrite):
            plan.rewrites.append(msgspec.structs.replace(decision, pass_name=name, preserves=preserves))
        else:
            plan.refusals.append(msgspec.structs.replace(decision, pass_name=name))
    return plan


def names(values: Iterable[Value | None]) -> tuple[str | None, ...]:
    """Names of operands, None where absent: what edits hold."""
    return tuple(None if value is None else value.name for value in values)


def fuse_edit(
    ops: Sequence[Op], kind: OpKind, inputs: Sequence[Value | str | None], outputs: Sequence[Value], **attrs: Any
) -> Fuse:
    """A `Fuse` edit for operations and values of a graph; an operand by name may be one that an earlier edit makes."""
    operands = tuple(value.name if isinstance(value, Value) else value for value in inputs)
    return Fuse(tuple(op.name for op in ops), kind.value, operands, tuple(value.name for value in outputs), attrs)


def region_edit(graph: Graph, ops: Sequence[Op], outputs: Sequence[Value]) -> Fuse | str:
    """A `Fuse` edit that makes one region of `ops`, returning `outputs`; or the reason why there is none.

    1. Every operation is of a kind that a region may hold, and nothing outside reads what is not an output.
    2. What a region reads comes before it: nothing that it reads is computed from what it returns.
    3. The model's IR can hold fused operations.
    4. In 16 bits, none is a part of a native operation (`lerp`, `addcmul`) that rounds its result alone.
    """
    inside, kept = set(ops), set(outputs)
    for op in ops:
        if op.group is not None and op.output.dtype in ("float16", "bfloat16"):
            return f"'{op.name}' is a part of one operation that rounds once, and would round by itself in a region"
        unable = graph.cannot_emit(OpKind.FUSED_REGION) or graph.cannot_emit(op.kind)
        if unable:
            return unable
        for value in op.outputs:
            reader = next((user for user in value.users if user not in inside), None)
            if value not in kept and (reader is not None or graph.is_output(value)):
                who = f"'{reader.name}'" if reader is not None else "the model's output"
                return f"'{value.name}' is also read by {who}"
    try:
        operands, attrs = describe(ops, outputs, graph.scalar)
    except RescompileError as error:
        return str(error)
    late = depends_on(operands, inside)
    if late is not None:
        return f"'{late.name}', which it reads, is computed from what it returns"
    return fuse_edit(sorted(ops, key=lambda op: op.order), OpKind.FUSED_REGION, operands, outputs, **attrs)


def depends_on(values: Iterable[Value], ops: set[Op]) -> Value | None:
    """The first of `values` that is computed from a result of `ops`, by operations outside them; None for none."""
    first = min(op.order for op in ops)
    for start in values:
        pending, seen = [start], {start}
        while pending:
            producer = pending.pop().producer
            if producer is None or producer.order < first:
                continue
            if producer in ops:
                return start
            for operand in producer.operands:
                if operand not in seen:
                    seen.add(operand)
                    pending.append(operand)
    return None


def same_shape(*values: Value) -> bool:
    """Whether all have one known shape; symbolic extents are equal when their names are."""
    shapes: set[Shape | None] = {value.shape for value in values}
    return len(shapes) == 1 and None not in shapes


class FreshNames:
    """Names for what a plan makes: unlike any in the graph, and unlike each other."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._given: set[str] = set()

    def __call__(self, stem: str) -> str:
        """`stem`, or the first of `stem_1`, `stem_2`, ... that is free."""
        name, count = stem, 0
        while name in self._given or self._graph.has_name(name):
            count += 1
            name = f"{stem}_{count}"
        self._given.add(name)
        return name


# A rule: what to do about one join. The value is the operand that the shortcut ends in, None where none is known.
Decide: TypeAlias = Callable[[Graph, Op, Value | None], Rewrite | Refusal]


def _computed(graph: Graph, recipe: str, operands: Sequence[str | None], attrs: dict[str, Any]) -> np.ndarray[Any, Any]:
    if recipe not in RECIPES:
        raise RescompileError(f"There is no parameter recipe '{recipe}'{nearest(recipe, RECIPES)}.")
    data = [None if value is None else graph.data(value) for value in _values(graph, operands)]
    result = RECIPES[recipe](data, _attrs(attrs))
    # Of a number numpy would make a vector of one element.
    return result if result.ndim == 0 else np.ascontiguousarray(result)


def _values(graph: Graph, labels: Sequence[str | None]) -> list[Value | None]:
    return [None if label is None else graph.value(label) for label in labels]


def _kind(name: str) -> OpKind:
    try:
        return OpKind(name)
    except ValueError:
        known = [kind.value for kind in OpKind]
        raise RescompileError(f"There is no operation kind '{name}'{nearest(name, known)}.") from None


def _attrs(attrs: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only; attributes are tuples."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in attrs.items()}
