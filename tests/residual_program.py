"""A program: one residual network as a list of terms, from which each IR's graph is written.

A term is an operation of the neutral vocabulary on earlier terms, or a leaf: an input, a parameter, a number. Programs
can be permuted (any topological order), renamed and commuted, which must not change what detection says of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from rescompile.blocks import Scale
from rescompile.kinds import OpKind, Trait

K = OpKind
INPUT, PARAM, NUMBER = "input", "param", "number"

Extents = tuple[int, ...]


@dataclass(frozen=True)
class Term:
    """One operation or leaf. `spelling` picks one of the ways in which an IR can write it; `known`: whether the IR says
    of what shape and dtype the result is."""

    kind: OpKind | str
    operands: tuple[int, ...] = ()
    shape: Extents = ()
    dtype: str = "float32"
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    spelling: int = 0
    known: bool = True


@dataclass(frozen=True)
class Made:
    """What the generator meant a join to be; terms by index. `norm` None: more than one answer is right."""

    join: int
    fork: int
    kind: str
    shortcut: str = "identity"
    parent: int | None = None
    norm: str | None = "none"
    scale: tuple[str, str, float | int] | None = None  # on, type, the number or the parameter


@dataclass(frozen=True, repr=False)
class Program:
    """Terms in topological order, and the blocks that they make."""

    terms: tuple[Term, ...]
    outputs: tuple[int, ...]
    made: tuple[Made, ...] = ()

    def __repr__(self) -> str:
        lines = []
        for term in self.terms:
            if isinstance(term.kind, OpKind):
                read = ", ".join(self.name(x) for x in term.operands if self.terms[x].kind != PARAM)
                lines.append(
                    f"{term.name}{list(term.shape)} = {term.kind.value}({read}) {term.attrs.get('scales', '')}"
                )
        meant = [
            f"{entry.kind} {self.name(entry.fork)} → {self.name(entry.join)}: {entry.shortcut}, norm {entry.norm}, "
            f"scale {self.scale(entry)}, in {None if entry.parent is None else self.name(entry.parent)}"
            for entry in self.made
        ]
        return "\n".join(["", *lines, *meant, ""])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    def name(self, index: int) -> str:
        """The name under which every IR knows the term."""
        return self.terms[index].name

    def scale(self, made: Made) -> Scale | None:
        """The expected scale, with the parameter's name."""
        if made.scale is None:
            return None
        on, kind, factor = made.scale
        return Scale(on, kind, float(factor) if kind == "constant" else self.name(int(factor)))

    def without_types(self, seed: int) -> Program:
        """The same network, with half of the results' shapes and dtypes left out, or all of them.

        What is padded keeps its own: torch counts axes from the last one on.
        """
        random = Random(seed)
        kept = random.choice((0.0, 0.5))
        needed = {*self.outputs, *(term.operands[0] for term in self.terms if term.kind is K.PAD)}
        terms = [
            replace(term, known=not isinstance(term.kind, OpKind) or index in needed or random.random() < kept)
            for index, term in enumerate(self.terms)
        ]
        return replace(self, terms=tuple(terms))

    def varied(self, seed: int) -> Program:
        """The same network in another order, under other names, with operands swapped and operations respelt."""
        random = Random(seed)
        order = _some_order(self.terms, random)
        place = {old: new for new, old in enumerate(order)}
        labels = random.sample(range(10 * len(order)), len(order))
        terms = []
        for old, label in zip(order, labels, strict=True):
            term = self.terms[old]
            term = replace(
                term,
                operands=tuple(place[operand] for operand in term.operands),
                name=f"{random.choice('abcdvxyz')}{label}_{random.choice(('add', 'x', 'relu', 'n'))}",
                spelling=random.randrange(12),
            )
            terms.append(_commuted(term, random))
        made = tuple(_moved(entry, place) for entry in self.made)
        return Program(tuple(terms), tuple(place[output] for output in self.outputs), made)


class Writer:
    """A program under construction. Methods return the index of the new term."""

    def __init__(self) -> None:
        self.terms: list[Term] = []

    def term(self, kind: OpKind | str, *operands: int, shape: Sequence[int] = (), **attrs: Any) -> int:
        dtype = attrs.pop("dtype", None) or (self.terms[operands[0]].dtype if operands else "float32")
        name = f"t{len(self.terms)}"
        self.terms.append(Term(kind, operands, tuple(shape), dtype, attrs, name))
        return len(self.terms) - 1

    def shape(self, x: int) -> Extents:
        return self.terms[x].shape

    def input(self, *shape: int, dtype: str = "float32") -> int:
        return self.term(INPUT, shape=shape, dtype=dtype)

    def param(self, *shape: int) -> int:
        return self.term(PARAM, shape=shape)

    def number(self, value: float) -> int:
        return self.term(NUMBER, value=value, dtype="int64" if isinstance(value, int) else "float32")

    def unary(self, kind: OpKind, x: int, **attrs: Any) -> int:
        return self.term(kind, x, shape=self.shape(x), **attrs)

    def _broadcast(self, kind: OpKind, operands: Sequence[int], **attrs: Any) -> int:
        shapes = [self.shape(x) for x in operands]
        rank = max(map(len, shapes))
        padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
        kinds = [self.terms[x].dtype for x in operands if self.shape(x)] or [self.terms[operands[0]].dtype]
        return self.term(
            kind, *operands, shape=[max(column) for column in zip(*padded, strict=True)], dtype=kinds[0], **attrs
        )

    def add(self, *operands: int, scales: tuple[float, ...] = ()) -> int:
        return self._broadcast(K.ADD, operands, **({"scales": scales} if scales else {}))

    def mul(self, a: int, b: int) -> int:
        return self._broadcast(K.MUL, (a, b))

    def div(self, a: int, b: int) -> int:
        return self._broadcast(K.DIV, (a, b))

    def linear(self, x: int, width: int) -> int:
        shape = self.shape(x)
        return self.term(K.LINEAR, x, self.param(width, shape[-1]), self.param(width), shape=(*shape[:-1], width))

    def conv(self, x: int, channels: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> int:
        batch, width, *spatial = self.shape(x)
        weight = self.param(channels, width // groups, kernel, kernel)
        shape = (batch, channels, *((n - 1) // stride + 1 for n in spatial))
        pads = (kernel // 2,) * 4
        attrs: dict[str, Any] = {"stride": (stride,) * 2, "pads": pads, "dilation": (1, 1), "groups": groups}
        return self.term(K.CONV, x, weight, shape=shape, **attrs)

    def norm(self, x: int, rms: bool = False) -> int:
        """Batch norm of images, layer norm or RMS norm of tokens."""
        shape = self.shape(x)
        if len(shape) == 4:
            return self.term(K.BATCH_NORM, x, *(self.param(shape[1]) for _ in range(4)), shape=shape)
        if rms:
            return self.term(K.RMS_NORM, x, self.param(shape[-1]), shape=shape, axis=len(shape) - 1)
        return self.term(
            K.LAYER_NORM, x, self.param(shape[-1]), self.param(shape[-1]), shape=shape, axis=len(shape) - 1
        )

    def pool(self, x: int, kind: OpKind = K.MAX_POOL) -> int:
        batch, width, *spatial = self.shape(x)
        shape = (batch, width, *(n // 2 for n in spatial))
        return self.term(kind, x, shape=shape, kernel=(2, 2), stride=(2, 2), pads=(0, 0, 0, 0))

    def upsample(self, x: int) -> int:
        batch, width, *spatial = self.shape(x)
        return self.term(K.INTERPOLATE, x, shape=(batch, width, *(2 * n for n in spatial)))

    def concat(self, *operands: int, axis: int) -> int:
        shape = list(self.shape(operands[0]))
        shape[axis] = sum(self.shape(x)[axis] for x in operands)
        return self.term(K.CONCAT, *operands, shape=shape, axis=axis)

    def slice(self, x: int, axis: int, start: int, stop: int, step: int = 1) -> int:
        shape = list(self.shape(x))
        shape[axis] = -(-(stop - start) // step)
        return self.term(K.SLICE, x, shape=shape, axes=(axis,), starts=(start,), stops=(stop,), steps=(step,))

    def reshape(self, x: int, *shape: int) -> int:
        return self.term(K.RESHAPE, x, shape=shape)

    def permute(self, x: int, *perm: int) -> int:
        return self.term(K.PERMUTE, x, shape=[self.shape(x)[axis] for axis in perm], perm=perm)

    def matmul(self, a: int, b: int) -> int:
        return self.term(K.MATMUL, a, b, shape=(*self.shape(a)[:-1], self.shape(b)[-1]))


def _moved(made: Made, place: dict[int, int]) -> Made:
    scale = made.scale
    if scale is not None and scale[1] != "constant":
        scale = (scale[0], scale[1], place[int(scale[2])])
    parent = None if made.parent is None else place[made.parent]
    return replace(made, join=place[made.join], fork=place[made.fork], parent=parent, scale=scale)


def _some_order(terms: Sequence[Term], random: Random) -> list[int]:
    """A random topological order; half of them go deep first, the others broad."""
    readers: list[list[int]] = [[] for _ in terms]
    waiting = [len(set(term.operands)) for term in terms]
    for index, term in enumerate(terms):
        for operand in set(term.operands):
            readers[operand].append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    deep = random.random() < 0.5
    order = []
    while ready:
        index = ready.pop(-1 if deep and random.random() < 0.8 else random.randrange(len(ready)))
        order.append(index)
        for reader in readers[index]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    return order


def _commuted(term: Term, random: Random) -> Term:
    if not isinstance(term.kind, OpKind) or not term.kind.has(Trait.COMMUTATIVE):
        return term
    order = random.sample(range(len(term.operands)), len(term.operands))
    attrs = dict(term.attrs)
    if "scales" in attrs:
        attrs["scales"] = tuple(attrs["scales"][index] for index in order)
    return replace(term, operands=tuple(term.operands[index] for index in order), attrs=attrs)
