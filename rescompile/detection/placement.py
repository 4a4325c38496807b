"""Where a block has its norms, and what scales its paths.

post      y = N(x + F(x))          pre    y = x + F(N(x))          branch  y = x + N(F(x))
sandwich  y = x + N(F(N(x)))       inner  norms inside F only      none
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from collections.abc import Set as AbstractSet

from rescompile.blocks import Scale
from rescompile.detection.flavours import is_random_factor
from rescompile.detection.judgement import Draft, Judgement
from rescompile.graph import Graph, Op, Role, Shape, Value
from rescompile.kinds import OpKind, Trait

_PASSED = (OpKind.IDENTITY, OpKind.CAST, OpKind.DROPOUT, OpKind.QUANTIZE, OpKind.DEQUANTIZE)
_TURNED = (OpKind.PERMUTE, OpKind.RESHAPE)  # channels brought to the axis that a norm works on, and back
_NORMS = frozenset(kind for kind in OpKind if kind.has(Trait.NORM))
_PRODUCTS = frozenset((OpKind.MUL, OpKind.DIV))


def norm_placement(
    judgement: Judgement, draft: Draft, forks: Collection[Value], carried: AbstractSet[Value]
) -> tuple[str, list[Op]]:
    """The placement, and the norms that it speaks of. `forks`: where blocks start; `carried`: where identity skips do.

    Blocks are asked about in the order of their joins: a norm that closes one opens none behind it.
    """
    inner: list[Op] = []
    if not draft.kinds.isdisjoint(_NORMS):
        inside = set(draft.branch_ops)
        first = _entries(judgement, draft)
        last = [norm for end in draft.branches if (norm := _exit(end, inside)) is not None]
        if first is not None:
            closing = [norm for norm in last if norm not in first]
            if len(closing) == len(draft.branches):
                return "sandwich", [*first, *closing]
            return "pre", first
        if last and len(last) == len(draft.branches):
            return "branch", list(dict.fromkeys(last))
        inner = [op for op in draft.branch_ops if op.has(Trait.NORM)]
    after = _after(judgement, draft.join_value)
    before = _before(draft)
    if before in judgement.closing:
        before = None
    if before is not None and (after is None or _activates_next(judgement, draft, after, carried)):
        return "pre", [before]
    if after is not None and (not inner or _goes_on(judgement, after, forks)):
        judgement.closing.add(after)
        return "post", [after]
    if before is not None:
        return "pre", [before]
    return ("inner", inner) if inner else ("none", [])


def _entries(judgement: Judgement, draft: Draft) -> list[Op] | None:
    """The norms through which the branch reads the fork; None when it reads it in another way too."""
    found: list[Op] = []
    raw = {draft.fork}
    for op in draft.branch_ops:
        if raw.isdisjoint(judgement.reach.sources(op.outputs[0])):
            continue
        if op.has(Trait.NORM):
            found.append(op)
        elif op.has(Trait.FREE) or op.kind is OpKind.CONCAT:
            raw.update(op.outputs)
        else:
            return None
    return found or None


def _exit(end: Value, inside: Collection[Op]) -> Op | None:
    """The norm that a branch ends in, behind at most free operations, a scale and a shift."""
    while (op := end.producer) is not None and op in inside:
        if op.has(Trait.NORM):
            return op
        step = _through_affine(op)
        if step is None:
            return None
        end = step
    return None


def _through_affine(op: Op) -> Value | None:
    """The operand, of a free operation, a factor, or an addition of a constant: a norm's own gain and shift."""
    if op.kind is OpKind.ADD:
        moving = [value for value in op.operands if not value.constant]
        return moving[0] if len(moving) == 1 and len(op.operands) == 2 else None
    return _through_scale(op)


def _through_scale(op: Op) -> Value | None:
    """The operand, of a free operation or a factor that carries no stream of its own."""
    if op.has(Trait.FREE) or op.kind is OpKind.DROPOUT:
        return op.operands[0]
    if op.kind in (OpKind.MUL, OpKind.DIV):
        first, second = op.operands[:2] if len(op.operands) > 1 else (op.operands[0], op.operands[0])
        if second.constant or is_random_factor(second):
            return first
        return second if (first.constant or is_random_factor(first)) and op.kind is OpKind.MUL else None
    return None


def _after(judgement: Judgement, joined: Value) -> Op | None:
    """The norm that alone reads the join."""
    value = joined
    while (op := judgement.only_user(value)) is not None:
        if op.has(Trait.NORM):
            return op if op.inputs[0] is value else None
        if op.kind not in _PASSED and op.kind not in _TURNED:
            return None
        value = op.outputs[0]
    return None


def _goes_on(judgement: Judgement, norm: Op, forks: Collection[Value]) -> bool:
    """Whether the norm's output is the stream: an output of the graph, or what a block starts from."""
    value = norm.outputs[0]
    while value not in judgement.outputs and value not in forks:
        op = judgement.only_user(value)
        if op is None:
            return False
        if not (op.kind in (*_PASSED, *_TURNED) or op.has(Trait.ACTIVATION) or _through_affine(op) is value):
            return False
        value = op.outputs[0]
    return True


def _activates_next(judgement: Judgement, draft: Draft, after: Op, carried: AbstractSet[Value]) -> bool:
    """Whether y = P(h) + F(h) with h = σ(N(x)) leaves the norm behind its sum to the next block, or to the head.

    Both are followed by σ(N(·)), whether that is the block's own or not. It is where an identity skip starts from it.
    """
    if draft.fork.producer is None or not draft.fork.producer.has(Trait.ACTIVATION):
        return False
    act = judgement.only_user(after.outputs[0])
    return act is not None and act.has(Trait.ACTIVATION) and carried.isdisjoint(act.outputs)


def _before(draft: Draft) -> Op | None:
    """The norm that made the fork, when only this block reads it: y = P(N(x)) + F(N(x)) with a projection P."""
    if draft.shortcut == "identity":
        return None
    own = {*draft.branch_ops, *draft.shortcut_ops, draft.join_op}
    value = draft.fork
    while all(user in own for user, _ in value.uses) and (op := value.producer) is not None:
        if op.has(Trait.NORM):
            return op
        if not (op.has(Trait.ACTIVATION) or op.kind in _PASSED):
            return None
        own = {op}
        value = op.operands[0]
    return None


def find_scale(graph: Graph, draft: Draft) -> Scale | None:
    """The factor on the branch, else on the skip; one that is trained before a literal one."""
    op = draft.join_op
    if op.kind not in (OpKind.ADD, OpKind.SCATTER):
        return None
    factors: dict[str, list[tuple[str, float | str]]] = {"branch": [], "skip": []}
    if not draft.kinds.isdisjoint(_PRODUCTS):
        inside = set(draft.branch_ops)
        factors["branch"] = [factor for end in draft.branches for factor in _factors(graph, end, inside)]
    if draft.shortcut_ops:
        factors["skip"] = list(_factors(graph, draft.skip, set(draft.shortcut_ops)))
    for index, scale in enumerate(op.attrs.get("scales", ()) if op.kind is OpKind.ADD else ()):
        value = op.inputs[index]
        if scale not in (1.0, -1.0) and value is not None and not value.constant:
            factors["skip" if index == draft.skip_index else "branch"].append(("constant", float(scale)))
    for on, found in factors.items():
        if found:
            trained = [factor for factor in found if factor[0] != "constant"]
            return Scale(on, *(trained or found)[0])
    return None


def _factors(graph: Graph, end: Value, inside: Collection[Op]) -> Iterator[tuple[str, float | str]]:
    """What multiplies a path, from its end on as far as it is nothing but factors and free operations."""
    while (op := end.producer) is not None and op in inside:
        step = _through_scale(op)
        if step is None:
            return
        if op.kind in (OpKind.MUL, OpKind.DIV) and not _is_gain(op, step):
            constant = next(value for value in op.operands if value is not step)
            if not is_random_factor(constant):  # stochastic depth's factor is none of the model's
                yield _describe(graph, constant, inverse=op.kind is OpKind.DIV)
        end = step


def _is_gain(op: Op, value: Value) -> bool:
    """Whether a factor is the weight of the norm before it, which has none of its own."""
    while (before := value.producer) is not None and before.kind in (OpKind.IDENTITY, OpKind.CAST, *_TURNED):
        value = before.operands[0]
    own = before is not None and before.has(Trait.NORM) and len(before.operands) == 1
    return own and op.kind is OpKind.MUL


def _describe(graph: Graph, constant: Value, inverse: bool) -> tuple[str, float | str]:
    number = graph.scalar(constant) if constant.role is Role.CONSTANT else None
    if number is not None and number != 0.0:
        return "constant", 1.0 / number if inverse else number
    size = _size(_known_shape(constant))
    return ("vector" if size != 1 else "scalar"), constant.name


def _known_shape(constant: Value) -> Shape:
    """Shape of a constant; where it is unknown, of the one that it is computed from element by element."""
    while constant.shape is None and (op := constant.producer) is not None and op.operands:
        constant = op.operands[0]
    return constant.shape or ()


def _size(shape: Iterable[int | str]) -> int:
    size = 1
    for extent in shape:
        size *= extent if isinstance(extent, int) else 2
    return size
