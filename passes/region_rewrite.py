"""What the rules that make fused regions share: which sums they take, and how they tell what they did or why not."""

from __future__ import annotations

from collections.abc import Sequence

from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind, Trait
from rescompile.passes.joins import spread
from rescompile.passes.one_pass import Kernel, Place, carries, computed, edit_of, unable
from rescompile.plans import Refusal, Rewrite, same_shape

_INTEGERS = ("int", "uint", "bool")
_WRITTEN = frozenset((OpKind.ADD, OpKind.MUL, OpKind.DIV, OpKind.POW, OpKind.PRELU))
_LONGEST = 160  # characters of an equation


def unsuited(join: Op, skip: Value | None) -> Refusal | None:
    """Why no kernel takes the sum; None where one may.

    1. It adds up two computed values or more, each once; a constant counts where the stream starts at it.
    2. All of them have the dtype of the sum, a float, and its shape; or some do, and the others are broadcast to it.
    """
    moving = computed(join)
    if skip is not None and skip.constant:
        moving = [*moving, skip]
    if len(set(moving)) < len(moving):
        return Refusal(join.name, "it adds a value to itself")
    if not computed(join):
        return Refusal(join.name, "nothing that it adds depends on the model's inputs: it is computed once")
    if len(moving) < 2:
        constant = next((value.name for value in join.operands if value.constant), join.name)
        return Refusal(join.name, f"'{constant}' is a constant: a bias, not a skip")
    if (join.output.dtype or "?").startswith(_INTEGERS):
        return Refusal(join.name, f"it adds numbers of type {join.output.dtype}: positions or sizes, not features")
    types = {value.dtype for value in (join.output, *moving)}
    if len(types) > 1 or None in types:
        told = " and ".join(sorted(dtype or "unknown" for dtype in types))
        return Refusal(join.name, f"the operands have dtypes {told}")
    if not spread(join.output, moving):
        shapes = " and ".join(dict.fromkeys(_shape(value) for value in moving))
        return Refusal(join.name, f"the operands have shapes {shapes}: extents that are unknown may differ")
    return None


def rewrite_of(place: Place, join: Op, kernel: Kernel, reason: str) -> Rewrite | Refusal:
    """The rewrite that makes one operation of the kernel; the refusal where the graph cannot hold it."""
    edit = edit_of(place, kernel)
    if isinstance(edit, str):
        return Refusal(join.name, edit)
    dropout = next((op.attr("dropout") for op in kernel.ops if op.kind is OpKind.IDENTITY and op.attr("dropout")), None)
    if dropout is not None:
        reason += f"; a dropout of {dropout:g}, which only training applies, goes"
    others = [f"'{value.name}'" for value in kernel.outputs[1:]]
    if others:
        reason += f"; returns {' and '.join(others)} too"
    return Rewrite(join.name, f"{_equation(place.graph, kernel)}  →  fused_region(...)", reason, (edit,))


def branch_end(place: Place, join: Op, skip: Value | None) -> str:
    """What the branch ends in, as the reason why no kernel computes it up to the sum."""
    told = []
    for value in computed(join):
        if value is skip and len(computed(join)) > 1:
            continue
        op, readers = value.producer, value
        while op is not None and carries(place, op) and not _is_shared(place.graph, readers):
            moving = computed(op)
            readers = next((inner for inner in moving if same_shape(inner, op.output)), moving[0])
            op = readers.producer
        told.append(_end(place, op, readers))
    return "; ".join(dict.fromkeys(told))


def readers_of(graph: Graph, value: Value, but: Op | None = None) -> str:
    """Who reads a value, by name."""
    found = []
    for user in value.users:
        if user is not but:
            found.append(f"a graph inside '{user.name}'" if graph.bodies(user) else f"'{user.name}'")
    if graph.is_output(value):
        found.append("the model's output")
    return " and ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _is_shared(graph: Graph, value: Value) -> bool:
    return len(value.users) > 1 or graph.is_output(value)


def _end(place: Place, op: Op | None, value: Value) -> str:
    if op is None:
        return f"'{value.name}' is an input of the model, and nothing computes on it before the sum"
    if op.name in place.closed:
        return place.closed[op.name]
    if op.kind is OpKind.RECURRENT:
        return "the branch ends in a recurrent operation, which keeps its kernel"
    if op.kind is OpKind.DROPOUT:
        return f"the dropout '{op.name}' draws anew on each call"
    if op.kind in (OpKind.QUANTIZE, OpKind.DEQUANTIZE):
        return f"the branch ends in '{op.name}' ({op.kind.value}): quantised neighbours keep their kernels"
    if _is_shared(place.graph, value):
        return f"'{value.name}' ({op.kind.value}) is read by {readers_of(place.graph, value)}"
    if op.has(Trait.ELEMENTWISE) or op.has(Trait.FREE):
        return unable(place, op) or f"'{op.name}' ({op.kind.value}) mixes types that the model does not cast"
    what = op.kind.value if op.kind is not OpKind.OPAQUE else str(op.attr("target")) or "an unknown operation"
    return f"the branch ends in '{op.name}' ({what}), which keeps its kernel"


def _equation(graph: Graph, kernel: Kernel) -> str:
    """The first output, written out in what the kernel reads; the kinds in order where that is long."""
    texts: dict[Value, str] = {}
    for op in kernel.ops:
        told = op.operands if op.kind in _WRITTEN else computed(op)  # weights go without saying
        args = [texts.get(value) or _name(graph, value) for value in told]
        if op.kind is OpKind.ADD:
            text = _sum(args, op.scales)
        elif op.kind is OpKind.IDENTITY:
            text = args[0]
        elif op.kind in (OpKind.MUL, OpKind.DIV):
            text = {OpKind.MUL: "·", OpKind.DIV: " / "}[op.kind].join(_closed(arg) for arg in args)
        else:
            text = f"{op.kind.value}({', '.join(args)})"
        texts[op.output] = text if len(text) <= _LONGEST else op.output.name
    text = texts[kernel.outputs[0]]
    if text == kernel.outputs[0].name:
        text = " · ".join(op.kind.value for op in kernel.ops if op.kind is not OpKind.IDENTITY)
    return f"{kernel.outputs[0].name} = {text}"


def _sum(args: Sequence[str], scales: Sequence[float]) -> str:
    text = ""
    for arg, scale in zip(args, scales, strict=True):
        sign = "−" if scale < 0 else "+"
        term = arg if abs(scale) == 1 else f"{abs(scale):g}·{_closed(arg)}"
        text += f" {sign} {term}" if text else ("−" if scale < 0 else "") + term
    return text


def _closed(text: str) -> str:
    return f"({text})" if " + " in text or " − " in text or " / " in text else text


def _name(graph: Graph, value: Value) -> str:
    number = graph.scalar(value) if value.constant and value.shape == () else None
    return value.name if number is None else f"{number:g}"


def _shape(value: Value) -> str:
    return "unknown" if value.shape is None else "[" + ",".join(str(extent) for extent in value.shape) + "]"
