"""Whether rows of a batch are independent: only then may a call be padded to a size that code was compiled for.

For every value that depends on the inputs one axis holds the batch, outermost in it: entries r·k to r·k + k − 1 belong
to row r. The walk below follows that axis through the graph. It stops, with a reason, at the first operation that
brings rows together, or that is not known to keep them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod

from rescompile.backends.working import working_copy
from rescompile.errors import RescompileError
from rescompile.extents import extent_of
from rescompile.graph import Dim, Graph, Op, Value
from rescompile.kinds import OpKind, Trait

_SAMPLES = (2, 3, 7)  # values of the symbol at which an extent is looked at
K = OpKind


class _Mixes(Exception):
    """Rows meet here; says how."""


def batch_symbol(graph: Graph) -> str:
    """The extent that is the first of the inputs and of nothing else. RescompileError where there is none."""
    first = {value.shape[0] for value in graph.inputs if value.shape and isinstance(value.shape[0], str)}
    if len(first) != 1:
        found = ", ".join(sorted(map(str, first))) or "none"
        raise RescompileError(
            f"Sizes of the batch need one symbolic first extent of the inputs, and there is {found}: "
            f"capture the model with a dynamic batch."
        )
    symbol = str(first.pop())
    for value in graph.inputs:
        if any(_depends(dim, symbol) for dim in (value.shape or ())[1:]):
            raise RescompileError(f"'{value.name}' has the batch '{symbol}' in another place than its first axis, too.")
    return symbol


def dependence(graph: Graph, symbol: str) -> str:
    """Why an output's row would depend on other rows than its own; empty where it does not."""
    work = working_copy(graph)
    walk = _Walk(symbol)
    for value in work.inputs:
        walk.axes[value] = 0 if value.shape and _depends(value.shape[0], symbol) else None
    for op in work:
        try:
            for value, axis in zip(op.outputs, walk.step(op), strict=True):
                if axis is not None:
                    walk.factor(value, axis)
                walk.axes[value] = axis
        except _Mixes as mixed:
            return f"'{op.name}' ({op.kind.value}) {mixed}"
    for value in work.outputs:
        axis = walk.axes.get(value)
        if axis not in (None, 0) or (axis == 0 and walk.factor(value, 0) != 1):
            return f"the output '{value.name}' does not have the batch as its first axis"
    return ""


class _Walk:
    """The axis of the batch by value; None where a value is the same for every batch."""

    def __init__(self, symbol: str) -> None:
        self.symbol = symbol
        self.axes: dict[Value, int | None] = {}

    def step(self, op: Op) -> list[int | None]:
        """The axes of an operation's outputs."""
        given = {value: axis for value in op.operands if (axis := self.axes.get(value)) is not None}
        if op.kind is K.SHAPE and given:
            raise _Mixes("reads how large the batch is")
        if op.has(Trait.RANDOM):
            raise _Mixes("draws other numbers for a larger batch")
        if not given:
            return [self._fresh(value) for value in op.outputs]
        rule = _RULES.get(op.kind)
        if rule is None and op.kind.has(Trait.ELEMENTWISE):
            rule = _elementwise
        if rule is None:
            raise _Mixes("is not known to keep the rows of a batch apart")
        axis = rule(self, op, given)
        return [axis] * len(op.outputs)

    def factor(self, value: Value, axis: int) -> int:
        """How many entries of the axis belong to one row."""
        shape = value.shape
        if shape is None or axis >= len(shape):
            raise _Mixes("has an unknown shape")
        counts = {(extent_of(shape[axis], {self.symbol: rows}) or 0) / rows for rows in _SAMPLES}
        count = counts.pop()
        if counts or count < 1 or count != int(count):
            raise _Mixes(f"makes an axis of {shape[axis]} of the batch")
        return int(count)

    def _fresh(self, value: Value) -> int | None:
        """A value that no input goes into can still have rows: a mask, positions."""
        places = [axis for axis, dim in enumerate(value.shape or ()) if _depends(dim, self.symbol)]
        if len(places) > 1:
            raise _Mixes("has the batch in two axes")
        return places[0] if places else None


_Given = Mapping[Value, int]
_Rule = Callable[[_Walk, Op, _Given], int]


def _depends(dim: Dim, symbol: str) -> bool:
    return isinstance(dim, str) and extent_of(dim, {symbol: 2}, 2) != extent_of(dim, {symbol: 3}, 2)


def _rank(value: Value) -> int:
    if value.shape is None:
        raise _Mixes("has an unknown shape")
    return len(value.shape)


def _aligned(op: Op, given: _Given) -> int:
    """The batch's axis of the output, where operands are broadcast from the last axis."""
    places = {_rank(value) - axis for value, axis in given.items()}
    if len(places) != 1:
        raise _Mixes("joins rows of one value with other axes of another")
    axis = _rank(op.outputs[0]) - places.pop()
    if axis < 0:
        raise _Mixes("loses the axis of the batch")
    return axis


def _elementwise(_: _Walk, op: Op, given: _Given) -> int:
    return _aligned(op, given)


def _only(op: Op, given: _Given, *operands: int) -> int:
    """The axis, where the batch is in these operands alone, at one place in all of them."""
    allowed = [op.inputs[index] for index in operands if index < len(op.inputs)]
    axes = set(given.values())
    if any(value not in allowed for value in given) or len(axes) != 1:
        raise _Mixes("has weights that depend on the batch")
    return axes.pop()


def _first(_: _Walk, op: Op, given: _Given) -> int:
    axis = _only(op, given, 0, 3)
    if axis != 0:
        raise _Mixes("has another axis than the batch first")
    return 0


def _not_training(walk: _Walk, op: Op, given: _Given) -> int:
    if op.attr("training"):
        raise _Mixes("normalises by the batch's statistics")
    axis = _only(op, given, 0)
    if axis == 1:
        raise _Mixes("has the batch as its channels")
    return axis


def _linear(_: _Walk, op: Op, given: _Given) -> int:
    axis = _only(op, given, 0, 3)
    if axis == _rank(op.operands[0]) - 1:
        raise _Mixes("sums over the batch")
    return axis


def _matmul(_: _Walk, op: Op, given: _Given) -> int:
    a, b = op.operands[:2]
    if (a in given and given[a] == _rank(a) - 1) or (b in given and given[b] == max(_rank(b) - 2, 0)):
        raise _Mixes("sums over the batch")
    if len(given) == 2 and (given[a] == _rank(a) - 2 or given[b] == _rank(b) - 1):
        raise _Mixes("multiplies every row with every other")
    if min(_rank(a), _rank(b)) < 2:
        raise _Mixes("is not known to keep the rows of a batch apart")
    return _aligned(op, given)


def _einsum(_: _Walk, op: Op, given: _Given) -> int:
    equation = str(op.attr("equation")).replace(" ", "")
    left, arrow, right = equation.partition("->")
    if not arrow or "." in equation:
        raise _Mixes("is not known to keep the rows of a batch apart")
    terms = left.split(",")
    letters = {terms[place][given[value]] for place, value in enumerate(op.operands) if value in given}
    if len(letters) != 1 or (letter := letters.pop()) not in right:
        raise _Mixes("sums over the batch")
    if any(letter in term for term, value in zip(terms, op.operands, strict=True) if value not in given):
        raise _Mixes("joins rows with another axis")
    return right.index(letter)


def _attention(_: _Walk, op: Op, given: _Given) -> int:
    if any(axis >= _rank(value) - 2 for value, axis in given.items()):
        raise _Mixes("attends across the batch")
    return _aligned(op, given)


def _rows_normed(_: _Walk, op: Op, given: _Given) -> int:
    axis = _only(op, given, 0, 1) if op.kind is K.ADD_NORM else _only(op, given, 0)
    if axis >= op.attr("axis") % _rank(op.operands[0]):
        raise _Mixes("normalises over the batch")
    return axis


def _along(_: _Walk, op: Op, given: _Given) -> int:
    """Softmax, cumulative sums and splits, which work along one axis."""
    axis = _only(op, given, 0)
    if axis == op.attr("axis") % _rank(op.operands[0]):
        raise _Mixes("works along the batch")
    return axis


def _concat(_: _Walk, op: Op, given: _Given) -> int:
    axis = _aligned(op, given)
    if axis == op.attr("axis") % _rank(op.outputs[0]):
        raise _Mixes("joins batches one behind the other")
    return axis


def _reduced(_: _Walk, op: Op, given: _Given) -> int:
    axis, rank = _only(op, given, 0), _rank(op.operands[0])
    axes = {place % rank for place in _numbers(op.attr("axes"))}
    if axis in axes or not axes:
        raise _Mixes("reduces over the batch")
    return axis if op.attr("keepdims") else axis - sum(place < axis for place in axes)


def _moved(_: _Walk, op: Op, given: _Given) -> int:
    """Slices, rolls and flips along other axes."""
    axis, rank = _only(op, given, 0), _rank(op.operands[0])
    axes = {place % rank for place in _numbers(op.attr("axes"))}
    if axis in axes or not axes:
        raise _Mixes("moves rows of the batch")
    return axis


def _padded(_: _Walk, op: Op, given: _Given) -> int:
    axis, rank, pads = _only(op, given, 0), _rank(op.operands[0]), _numbers(op.attr("pads"))
    if len(pads) != 2 * rank or pads[axis] or pads[axis + rank]:
        raise _Mixes("adds rows to the batch")
    return axis


def _tiled(_: _Walk, op: Op, given: _Given) -> int:
    axis, rank, repeats = _only(op, given, 0), _rank(op.operands[0]), _numbers(op.attr("repeats"))
    at = axis + len(repeats) - rank
    if at >= 0 and repeats[at] != 1:
        raise _Mixes("repeats rows of the batch")
    return axis + _rank(op.outputs[0]) - rank


def _permuted(_: _Walk, op: Op, given: _Given) -> int:
    return _numbers(op.attr("perm")).index(_only(op, given, 0))


def _reshaped(walk: _Walk, op: Op, given: _Given) -> int:
    """The batch stays outermost behind as many elements as before: then rows stay together."""
    axis = _only(op, given, 0)
    source, target = op.operands[0].shape, op.outputs[0].shape
    places = [place for place, dim in enumerate(target or ()) if _depends(dim, walk.symbol)]
    if source is None or target is None or len(places) != 1:
        raise _Mixes("is reshaped into a shape that does not name the batch once")
    before, behind = _product(source[:axis]), _product(target[: places[0]])
    if before is None or before != behind:
        raise _Mixes("moves the batch behind another axis")
    return places[0]


def _looked_up(_: _Walk, op: Op, given: _Given) -> int:
    return _only(op, given, 1)


def _gathered(_: _Walk, op: Op, given: _Given) -> int:
    x, indices = op.operands[:2]
    along = op.attr("axis") % _rank(x)
    if len(given) != 1:
        raise _Mixes("takes places of one row by another value's rows")
    if indices in given:
        return int(along + given[indices])
    axis = given[x]
    if axis == along:
        raise _Mixes("takes rows out of the batch")
    return axis if axis < along else axis + _rank(indices) - 1


def _product(extents: Sequence[Dim]) -> int | None:
    numbers = [extent for extent in extents if isinstance(extent, int)]
    return prod(numbers) if len(numbers) == len(extents) else None


def _numbers(attribute: object) -> list[int]:
    return [int(number) for number in attribute] if isinstance(attribute, list | tuple) else []


_RULES: dict[OpKind, _Rule] = {
    **dict.fromkeys((K.CONV, K.CONV_TRANSPOSE, K.FUSED_CONV, K.MAX_POOL, K.AVG_POOL, K.ADAPTIVE_AVG_POOL), _first),
    **dict.fromkeys((K.GROUP_NORM, K.INSTANCE_NORM, K.LOCAL_RESPONSE_NORM, K.INTERPOLATE), _first),
    K.BATCH_NORM: _not_training,
    **dict.fromkeys((K.LINEAR, K.FUSED_LINEAR), _linear),
    K.MATMUL: _matmul,
    K.EINSUM: _einsum,
    K.ATTENTION: _attention,
    **dict.fromkeys((K.LAYER_NORM, K.RMS_NORM, K.ADD_NORM), _rows_normed),
    K.NORMALISE: _moved,
    **dict.fromkeys((K.SOFTMAX, K.CUMSUM, K.SPLIT), _along),
    K.CONCAT: _concat,
    **dict.fromkeys((K.MEAN, K.SUM, K.AMAX, K.AMIN, K.PROD, K.ARGMAX), _reduced),
    **dict.fromkeys((K.SLICE, K.ROLL, K.FLIP), _moved),
    K.PAD: _padded,
    K.TILE: _tiled,
    K.PERMUTE: _permuted,
    K.RESHAPE: _reshaped,
    K.EXPAND: _elementwise,
    K.EMBEDDING: _looked_up,
    K.GATHER: _gathered,
}
