"""A fused region as kernels of a processor could run it: which form it has, and why it has none.

contraction   conv, linear          →  the contraction's kernel, the rest as its tail
window        max or average pool   →  the pool's kernel, the rest as its tail
rows          norms                 →  one sweep for each mean, over rows that stay in the cache
elements      anything else         →  one loop nest
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from rescompile.backends.kernels import Place, Program
from rescompile.backends.kernels.region import unfollowed, unpulled
from rescompile.backends.kernels.row_region import GROUPED, ROW_NORMS
from rescompile.fused_region import Region, Step, parse, step_types
from rescompile.graph import Op, Role, Value, ValueType
from rescompile.kinds import OpKind

K = OpKind
CONTRACTIONS = frozenset((K.CONV, K.CONV_TRANSPOSE, K.LINEAR, K.MATMUL))
WINDOWS = frozenset((K.MAX_POOL, K.AVG_POOL))
FLOATS = ("float32", "float64", "float16", "bfloat16")
_DTYPES = (*FLOATS, "bool", "int64", "int32", "int16", "int8", "uint8")
_MOVES = frozenset((K.RESHAPE, K.PERMUTE, K.SLICE, K.ROLL, K.FLIP, K.PAD, K.CONCAT))
Extents = tuple[int | None, ...]


@dataclass(frozen=True)
class Draft:
    """A region's steps with the types of all its values.

    Attributes:
        form: contraction, window, rows or elements.
        root: the contraction, the window, or the first norm; None where there is none.
        norms: the norms of `rows`.
        operands: types of what it reads, steps: types of what each step makes.
        dynamic: whether the leading dimensions are one of unknown extent.
    """

    region: Region
    form: str
    root: int | None
    norms: tuple[int, ...]
    operands: tuple[tuple[Extents, str] | None, ...]
    steps: tuple[tuple[Extents, str], ...]
    dynamic: bool = False

    def type(self, number: int) -> tuple[Extents, str]:
        """Shape and dtype of a value."""
        found = self.operands[number] if number < len(self.operands) else self.steps[number - len(self.operands)]
        return found or ((), "float32")

    def step(self, number: int) -> Step:
        """The step that makes a value."""
        return self.region.steps[number - self.region.operands]

    def program(self, operands: Sequence[Place | None], results: Sequence[Place]) -> Program:
        """With places for what is read and written."""
        return Program(self.region.text(), tuple(operands), tuple(results), self.steps)

    @property
    def plain(self) -> Program:
        """As if everything lay as the graph says: to ask what elements can be followed."""
        operands = [None if known is None else Place.plain(*known) for known in self.operands]
        return self.program(operands, [Place.plain(*self.type(made)) for made in self.region.outputs])

    @property
    def anchor(self) -> int:
        """The value that the kernel walks over."""
        if self.form == "rows" and self.root is not None:
            return self.step(self.root).inputs[0] or 0
        if self.root is not None:
            return self.root
        program = self.plain
        made = [number for number, step in enumerate(self.region.steps, self.region.operands)]
        joints = [number for number in made if self.step(number).kind is K.CONCAT]
        candidates = [*joints[-1:], *sorted(set(self.region.outputs))]
        fitting = [number for number in candidates if not self._unanchored(program, number)]
        return fitting[0] if fitting else candidates[-1]

    def _unanchored(self, program: Program, anchor: int) -> str:
        """Why the region cannot be walked over that value."""
        reached = {anchor, *program.following(anchor)}
        lost = [made for made in self.region.outputs if made not in reached]
        if any(program.shape(made) != program.shape(anchor) for made in lost):
            return "its results have no element order in common"
        return unfollowed(program, anchor, self.norms)

    def refusal(self) -> str:
        """Why there is no kernel; empty when there is."""
        program, anchor = self.plain, self.anchor
        known = {self.root, *self.norms} if self.root is not None else set()
        steps = range(self.region.operands, self.region.operands + len(self.region.steps))
        return self._unanchored(program, anchor) or unpulled(program, (n for n in steps if n not in known))


def draft(region: Region, inputs: Sequence[Value | None], outputs: Sequence[Value], onnx: bool = False) -> Draft | str:
    """The region in the form that a kernel has for it, or why none has."""
    given = [None if value is None else value.type for value in inputs]
    made = step_types(region, given, [value.type for value in outputs])
    region, made = _upsampling(region, given, made)
    if any(type_.shape is None or type_.dtype is None for type_ in [*made, *(t for t in given if t is not None)]):
        return "the shape of a value in it is not known"
    # Extents may still have names here: _flat gives them numbers.
    operands: list[Any] = [None if t is None else (tuple(t.shape or ()), str(t.dtype)) for t in given]
    steps: list[Any] = [(tuple(t.shape or ()), str(t.dtype)) for t in made]
    used = {value for step in region.steps for value in step.inputs}
    read = {t[1] for n, t in enumerate(operands) if t is not None and n in used}
    strange = {*read, *(dtype for _, dtype in steps)} - set(_DTYPES)
    if strange:
        return f"no kernel computes in {sorted(strange)[0]}"
    numbered = list(enumerate(region.steps, region.operands))
    roots = [number for number, step in numbered if step.kind in CONTRACTIONS | WINDOWS]
    norms = [number for number, step in numbered if step.kind in ROW_NORMS]
    if len(roots) + bool(norms) > 1:
        return "it holds two contractions, or one and a norm"
    form = "elements"
    if roots:
        form = "window" if region.steps[roots[0] - region.operands].kind in WINDOWS else "contraction"
    elif norms:
        form = "rows"
    root = roots[0] if roots else norms[0] if norms else None
    found = Draft(region, form, root, tuple(norms), tuple(operands), tuple(steps))
    flat = _flat(found)
    if isinstance(flat, str):
        return flat
    reason = (
        _strange_slice(flat)
        or _strange_slope(flat, onnx)
        or (_no_contraction(flat, inputs) if form == "contraction" else "")
        or (_no_window(flat) if form == "window" else "")
        or (_no_rows(flat) if form == "rows" else "")
        or flat.refusal()
    )
    return reason or flat


def _upsampling(
    region: Region, given: Sequence[ValueType | None], made: list[ValueType]
) -> tuple[Region, list[ValueType]]:
    """A transposed convolution of stride 1 is one with mirrored weights; one whose windows do not overlap a product.

    y[n, c, s·h + i, s·w + j] = Σ x[n, k, h, w]·W[k, c, i, j]   →   columns (i, j, c) of a 1×1 convolution, moved
    """
    number = next((n for n, step in enumerate(region.steps) if step.kind is K.CONV_TRANSPOSE), None)
    if number is None:
        return region, made
    step, types = region.steps[number], [*given, *made]
    attrs, x = with_defaults(step), types[step.inputs[0] or 0]
    weight, out = types[step.inputs[1] or 0], made[number]
    if x is None or weight is None or None in (x.shape, weight.shape, out.shape):
        return region, made
    kernel = (weight.shape or ())[2:]
    space = (x.shape or ())[2:]
    d = len(kernel)
    if attrs["groups"] == 1 and set(attrs["stride"][:d]) == {1} and not any(attrs["output_padding"]) and d in (1, 2):
        reach = [int(step_) * (int(k) - 1) for step_, k in zip(attrs["dilation"], kernel, strict=False)]
        pads = tuple(way - pad for way, pad in zip([*reach, *reach], attrs["pads"], strict=False))
        if len(pads) == 2 * d and min(pads) >= 0:
            mirrored = {"pads": pads, "dilation": tuple(attrs["dilation"])[:d], "stride": (1,) * d, "turned": "mirror"}
            steps = [*region.steps]
            steps[number] = Step(K.CONV, step.inputs, mirrored)
            return Region(region.operands, tuple(steps), region.outputs), made
    known = all(isinstance(extent, int) for extent in (*(x.shape or ()), *(out.shape or ())))
    apart = tuple(attrs["stride"])[: len(kernel)] == kernel and not any((*attrs["pads"], *attrs["output_padding"]))
    if not known or not apart or attrs["groups"] != 1 or set(attrs["dilation"]) != {1} or len(kernel) > 2:
        return region, made
    batch, channels = (out.shape or ())[:2]
    apart_shape = (batch, *kernel, channels, *space)
    perm = (0, 1 + d, *(axis for i in range(d) for axis in (2 + d + i, 1 + i)))
    turned = tuple(apart_shape[axis] for axis in perm)
    columns = (batch, prod(int(k) for k in (*kernel, channels)), *space)
    first = region.operands + number
    ones = (1,) * d
    steps = [
        Step(K.CONV, step.inputs, {"stride": ones, "pads": (0,) * (2 * d), "dilation": ones, "turned": "columns"}),
        Step(K.RESHAPE, (first,), {"shape": apart_shape}),
        Step(K.PERMUTE, (first + 1,), {"perm": perm}),
        Step(K.RESHAPE, (first + 2,), {"shape": out.shape}),
    ]

    def at(value: int | None) -> int | None:
        return value if value is None or value < first else value + 3

    after = [Step(s.kind, tuple(at(v) for v in s.inputs), s.attrs) for s in region.steps[number + 1 :]]
    shapes = [ValueType(shape, out.dtype) for shape in (columns, apart_shape, turned, out.shape)]
    outputs = tuple(made_ if (made_ := at(value)) is not None else value for value in region.outputs)
    changed = Region(region.operands, (*region.steps[:number], *steps, *after), outputs)
    return changed, [*made[:number], *shapes, *made[number + 1 :]]


def _strange_slice(found: Draft) -> str:
    for number, step in enumerate(found.region.steps, found.region.operands):
        read = found.type(step.inputs[0] or 0)[0] if step.inputs else ()
        if step.kind is K.SLICE:
            steps = step.attrs.get("steps") or (1,)
            if min(steps) < 1 or min(step.attrs["starts"], default=0) < 0 or len(read) != len(found.type(number)[0]):
                return "a slice that counts backwards"
        if step.kind is K.PAD and min(step.attrs.get("pads", ()), default=0) < 0:
            return "a pad that cuts off"
    return ""


def _strange_slope(found: Draft, onnx: bool) -> str:
    """torch counts the slopes along the channels, ONNX from the last dimension."""
    for number, step in enumerate(found.region.steps, found.region.operands):
        if step.kind is K.PRELU and not onnx:
            slope, rank = found.type(step.inputs[1] or 0)[0], len(found.type(number)[0])
            if len(slope) == 1 and slope != (1,) and rank not in (1, 2):
                return "a prelu with a slope for each channel"
    return ""


def _literal(value: Value | None) -> bool:
    return value is not None and value.role in (Role.PARAMETER, Role.CONSTANT)


def _no_contraction(found: Draft, inputs: Sequence[Value | None]) -> str:
    root = found.root or 0
    step = found.step(root)
    if step.kind is K.CONV_TRANSPOSE:
        return "there is no kernel for a conv_transpose with what follows it"
    if step.kind is K.MATMUL:
        return _no_product(found, step)
    x, weight, *rest = step.inputs
    bias = rest[0] if rest else None
    if any(value is not None and value >= found.region.operands for value in step.inputs):
        return f"what the {step.kind.value} reads is computed in the region"
    if x is None or weight is None or not _literal(inputs[weight]) or (bias is not None and not _literal(inputs[bias])):
        return f"the weights of the {step.kind.value} are not known when compiling"
    shape, dtype = found.type(x)
    types = {found.type(value)[1] for value in step.inputs if value is not None} | {found.type(root)[1]}
    if types != {dtype} or dtype not in FLOATS:
        return f"the {step.kind.value} mixes types"
    if step.kind is K.CONV and (len(shape) not in (3, 4) or len(step.attrs.get("pads", ())) > 4 or found.dynamic):
        return f"a conv over {len(shape) - 2} dimensions" if not found.dynamic else "a conv with a dynamic extent"
    if step.kind is K.LINEAR and len(found.type(weight)[0]) != 2:
        return "a linear whose weight is no matrix"
    return ""


def _no_product(found: Draft, step: Step) -> str:
    a, b = (found.type(value or 0) for value in step.inputs)
    shape, dtype = found.type(found.root or 0)
    if any(value is None or value >= found.region.operands for value in step.inputs):
        return "what the matmul reads is computed in the region"
    if found.dynamic or a[1] != b[1] or a[1] != dtype or dtype not in FLOATS or min(len(a[0]), len(b[0])) < 2:
        return "a matmul of vectors, of mixed types or of unknown size"
    for lead in (a[0][:-2], b[0][:-2]):
        if lead != shape[:-2] and any(extent != 1 for extent in lead):
            return "a matmul that broadcasts some of its batches"
    return ""


def _no_window(found: Draft) -> str:
    step = found.step(found.root or 0)
    shape, dtype = found.type(step.inputs[0] or 0)
    if (step.inputs[0] or 0) >= found.region.operands:
        return "what the pool reads is computed in the region"
    if found.dynamic or len(shape) not in (3, 4) or dtype not in FLOATS or len(step.attrs.get("pads", ())) > 4:
        return "a pool over three dimensions, or of unknown size"
    return ""


def _no_rows(found: Draft) -> str:
    steps = [found.step(norm) for norm in found.norms]
    shapes = {found.type(step.inputs[0] or 0)[0] for step in steps}
    dtypes = {found.type(norm)[1] for norm in found.norms} | {found.type(step.inputs[0] or 0)[1] for step in steps}
    if len(shapes) > 1:
        return "its norms are over different rows"
    shape = shapes.pop()
    if any(dtype not in FLOATS for dtype in dtypes):
        return "a norm of integers"
    if any(step.attrs.get("stash_type") for step in steps):
        return "a norm that computes in a narrower type"

    def row(step: Step) -> tuple[Any, ...]:
        if step.kind in GROUPED:
            return "group", shape[1] if step.kind is K.INSTANCE_NORM else step.attrs.get("groups", 1)
        return "row", int(step.attrs.get("axis", -1)) % len(shape)

    kinds = {row(step) for step in steps}
    if len(kinds) > 1:
        return "its norms are over different rows"
    which, detail = kinds.pop()
    if which == "group" and (found.dynamic or len(shape) < 2 or None in shape):
        return "a group norm of unknown size"
    if which == "row" and found.dynamic and detail != len(shape) - 1:
        return "a norm over several axes with a dynamic extent"
    program, anchor = found.plain, steps[0].inputs[0] or 0
    following = program.following(anchor)
    for norm, step in zip(found.norms[1:], steps[1:], strict=True):
        way = [n for n in following if n <= norm and _leads(found, n, step.inputs[0] or 0)]
        if any(found.step(n).kind in _MOVES for n in way) or (step.inputs[0] or 0) not in {anchor, *following}:
            return "a move between two norms"
    return ""


def _leads(found: Draft, number: int, to: int) -> bool:
    """Whether the value is `to`, or `to` depends on it."""
    return number == to or to in found.plain.following(number)


def _flat(found: Draft) -> Draft | str:
    """The draft with numbers for extents; where some are dynamic, with all leading dimensions as one."""
    shapes = [t[0] for t in (*found.operands, *found.steps) if t is not None]
    if all(isinstance(extent, int) for shape in shapes for extent in shape):
        return found
    if any(step.kind in _MOVES or step.kind is K.BATCH_NORM or step.kind in GROUPED for step in found.region.steps):
        return "moves, or channels, with a dynamic extent"
    if found.form not in ("elements", "rows", "contraction"):
        return "a window with a dynamic extent"
    whole = next((shape[:-1] for shape in shapes if any(isinstance(extent, str) for extent in shape)), ())
    trailing = {shape[-1] for shape in shapes if shape[:-1] == whole}
    if not whole or any(isinstance(extent, str) for extent in trailing):
        return "a last dimension that is dynamic"
    result: list[tuple[Extents, str] | None] = []
    for known in (*found.operands, *found.steps):
        if known is None:
            result.append(None)
            continue
        shape, dtype = known
        if shape[:-1] == whole and shape:
            result.append(((None, *shape[-1:]), dtype))
        elif all(extent == 1 for extent in shape[:-1]):
            result.append((shape[-1:], dtype))
        elif len(shape) == 2 and all(isinstance(extent, int) for extent in shape):  # a matrix of weights
            result.append((shape, dtype))
        else:
            return "a dynamic extent that is broadcast"
    count = len(found.operands)
    region = found.region
    steps = tuple(replace_axis(step, 1) if step.kind in ROW_NORMS else step for step in region.steps)
    ranks = {len(found.type(found.step(norm).inputs[0] or 0)[0]) - 1 for norm in found.norms}
    axes = {int(found.step(norm).attrs.get("axis", -1)) for norm in found.norms}
    if any(axis not in (-1, rank) for axis in axes for rank in ranks):
        return "a norm over several axes with a dynamic extent"
    return replace(
        found,
        region=Region(region.operands, steps, region.outputs),
        operands=tuple(result[:count]),
        steps=tuple(known for known in result[count:] if known is not None),
        dynamic=True,
    )


def replace_axis(step: Step, axis: int) -> Step:
    """The norm over another first axis."""
    return Step(step.kind, step.inputs, {**step.attrs, "axis": axis})


def with_defaults(step: Step) -> dict[str, Any]:
    """A step's attributes, all of them."""
    return {**step.kind.spec.attrs, **step.attrs}


def why_not(op: Op, onnx: bool = False) -> str:
    """Why a processor has no kernel for a fused region; empty when it has."""
    found = draft(parse(op.attr("steps")), op.inputs, op.outputs, onnx)
    return found if isinstance(found, str) else ""
