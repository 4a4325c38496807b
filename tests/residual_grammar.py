"""The grammar: random networks of every kind of residual block, nested, in a row, between joins that are none.

Networks are of images, [1, C, H, W], or of tokens, [N, T, C]. A draw makes a `Program`, with what each join was meant
to be; `tests.residual_realisers` writes it in each IR.
"""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from tests.residual_program import K, Made, Program, Writer

WIDTH = 8
ADD_NORMS = ("pre", "post", "branch", "sandwich", "inner", "none")


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """A stem, a stack of blocks and a head."""
    network = _Network(draw, images=draw(st.booleans()))
    x = network.stem()
    x = network.stack(x, draw(st.integers(0, 2)), None)
    head = network.work(x)
    return Program(tuple(network.w.terms), (head,), tuple(network.made))


class _Network:
    def __init__(self, draw: st.DrawFn, images: bool) -> None:
        self.draw = draw
        self.images = images
        self.rms = self.flip()
        self.w = Writer()
        self.made: list[Made] = []
        self.closed: set[int] = set()  # joins that a norm follows

    # ---- choices ---------------------------------------------------------------------------------------------------

    def flip(self) -> bool:
        return self.draw(st.booleans())

    def one_of(self, *choices: str) -> str:
        return self.draw(st.sampled_from(choices))

    # ---- parts -----------------------------------------------------------------------------------------------------

    def stem(self) -> int:
        w = self.w
        return w.unary(K.RELU, w.conv(w.input(1, 3, 8, 8), WIDTH)) if self.images else w.linear(w.input(2, 4, 6), WIDTH)

    def axis(self) -> int:
        return 1 if self.images else 2

    def width(self, x: int) -> int:
        return self.w.shape(x)[self.axis()]

    def work(self, x: int, width: int | None = None, kernel: int | None = None) -> int:
        """A contraction: linear, or convolution."""
        width = self.width(x) if width is None else width
        if self.images:
            return self.w.conv(x, width, kernel or self.draw(st.sampled_from((1, 3))))
        return self.w.linear(x, width)

    def act(self, x: int) -> int:
        kind = self.draw(st.sampled_from((K.RELU, K.TANH, K.GELU, K.SIGMOID)))
        return self.w.unary(kind, x)

    def norm(self, x: int) -> int:
        return self.w.norm(x, rms=self.rms)

    def passed(self, x: int) -> int:
        """The value itself, or a copy of it (dropout in evaluation)."""
        return self.w.unary(K.IDENTITY, x) if self.flip() else x

    def vector(self, x: int) -> int:
        """A parameter for each channel."""
        return self.w.param(self.width(x), 1, 1) if self.images else self.w.param(self.width(x))

    def attend(self, x: int, mask: bool) -> int:
        """Attention, taken apart; the mask is a trap."""
        w = self.w
        q, k, v = (w.linear(x, self.width(x)) for _ in range(3))
        scores = w.div(w.matmul(q, w.permute(k, 0, 2, 1)), w.number(2.0))
        if mask:
            scores = w.add(scores, w.input(1, 1, w.shape(x)[1]))
        return w.linear(w.matmul(w.unary(K.SOFTMAX, scores, axis=-1), v), self.width(x))

    def record(self, join: int, fork: int, kind: str, at: int, **facts: object) -> None:
        """A block; `at`: where the blocks nested in it begin in the list of all. They hear of their parent."""
        self.made[at:] = [replace(entry, parent=join) if entry.parent is None else entry for entry in self.made[at:]]
        self.made.append(Made(join, fork, kind, **facts))  # type: ignore[arg-type]

    def nested(self, x: int, depth: int) -> int:
        return self.stack(x, depth - 1, x) if depth and self.flip() else x

    # ---- stacks ----------------------------------------------------------------------------------------------------

    def stack(self, x: int, depth: int, inside: int | None) -> int:
        for _ in range(self.draw(st.integers(1, 3))):
            x = self.block(x, depth, inside is None)
            if self.flip():
                x = self.decoy(x)
            elif self.flip():
                x = self.w.unary(K.RELU, x)
        return x

    def block(self, x: int, depth: int, outermost: bool) -> int:
        kinds = ["add", "add", "gated", "dense", "parallel", "stochastic", "branches", "projection", "view", "part"]
        kinds += ["long"] if self.images else ["recurrent"]
        if self.images and outermost and self.w.shape(x)[2] >= 4:
            kinds += ["strided"]
        kind = self.draw(st.sampled_from(kinds))
        return int(getattr(self, f"_{kind}")(x, depth))

    def branch(self, x: int, depth: int, norm: str, width: int | None = None, stride: int = 1) -> int:
        """F(x): works and bends, so that no part of it is taken for a shortcut."""
        w = self.w
        y = self.norm(x) if norm in ("pre", "sandwich") else x
        attended = not self.images and self.flip()
        y = self.attend(y, mask=self.flip()) if attended else self.act(self.work(y))
        y = self.nested(y, depth)
        if norm == "inner":
            y = self.norm(self.work(y))
        y = self.act(y)
        y = w.conv(y, width or self.width(x), 3, stride) if self.images else self.work(y, width)
        return self.norm(y) if norm in ("branch", "sandwich") else y

    def placement(self, norm: str, at: int) -> str | None:
        """Norms that end nested blocks are inside this block's branch."""
        if any(entry.join in self.closed for entry in self.made[at:] if entry.parent is None):
            return {"none": "inner", "post": None}.get(norm, norm)
        return norm

    # ---- kinds -----------------------------------------------------------------------------------------------------

    def _add(self, x: int, depth: int) -> int:
        """x + F(x), the fork or the branch perhaps scaled"""
        w, at = self.w, len(self.made)
        norm = self.one_of(*ADD_NORMS)
        short = norm == "none" and self.flip()
        y = self.work(x) if short else self.branch(x, depth, norm)
        skip, scales, scale = x, (), None
        spelling = self.one_of("none", "none", "alpha", "vector", "scalar", "constant", "divisor", "skip", "minus")
        if spelling == "alpha":
            scales, scale = (1.0, 0.5), ("branch", "constant", 0.5)
        elif spelling == "vector":
            factor = self.vector(x)
            y, scale = w.mul(y, factor), ("branch", "vector", factor)
        elif spelling == "scalar":
            factor = w.param(1)
            y, scale = w.mul(y, factor), ("branch", "scalar", factor)
        elif spelling == "constant":
            y, scale = w.mul(y, w.number(0.25)), ("branch", "constant", 0.25)
        elif spelling == "divisor":
            y, scale = w.div(y, w.number(4.0)), ("branch", "constant", 0.25)
        elif spelling == "skip":
            skip, scale = w.mul(x, w.number(2.0)), ("skip", "constant", 2.0)
        elif spelling == "minus":
            scales = (1.0, -1.0)
        join = w.add(self.passed(skip), self.passed(y), scales=scales)
        self.record(join, x, "add", at, norm=self.placement(norm, at), scale=scale)
        if norm != "post":
            return join
        self.closed.add(join)
        return self.norm(join)

    def _projection(self, x: int, depth: int) -> int:
        """P(x) + F(x)"""
        w, at = self.w, len(self.made)
        norm = self.one_of("pre", "branch", "none")
        y = self.branch(x, depth, norm)
        skip = self.work(x, kernel=1)
        skip = self.norm(skip) if self.flip() else skip
        skip = w.unary(K.RELU, skip) if self.flip() else skip
        join = w.add(self.passed(y), self.passed(skip))
        self.record(join, x, "add", at, shortcut="projection", norm=self.placement(norm, at))
        return join

    def _strided(self, x: int, depth: int) -> int:
        """A block that halves the image, its shortcut by one of He's options"""
        w, at = self.w, len(self.made)
        norm = self.one_of("branch", "none")
        how = self.one_of("projection", "pooled projection", "pad", "concat", "max pool", "average pool")
        width = self.width(x)
        wide = width if "pool" in how.split()[-1] else 2 * width
        y = self.branch(x, depth, norm, wide, stride=2)
        if how == "projection":
            skip = w.conv(x, wide, 1, 2)
        elif how == "pooled projection":
            skip = w.conv(w.pool(x, K.AVG_POOL), wide, 1)
        elif how in ("pad", "concat"):
            skip = w.slice(w.slice(x, 2, 0, w.shape(x)[2], 2), 3, 0, w.shape(x)[3], 2)
            shape = w.shape(skip)
            if how == "pad":
                skip = w.term(K.PAD, skip, shape=(1, wide, *shape[2:]), pads=(0, 0, 0, 0, 0, width, 0, 0))
            else:
                skip = w.concat(skip, w.param(*shape), axis=1)
        else:
            skip = w.pool(x, K.MAX_POOL if how == "max pool" else K.AVG_POOL)
        kind = {"concat": "pad", "max pool": "pool", "average pool": "pool"}.get(how, how.split()[-1])
        if kind == "projection" and self.flip():
            skip = self.norm(skip)
        join = w.add(skip, y)
        self.record(join, x, "add", at, shortcut=kind, norm=self.placement(norm, at))
        return self.work(w.unary(K.RELU, join), WIDTH)

    def _view(self, x: int, depth: int) -> int:
        """The sum of what was moved, or relabelled"""
        w, at = self.w, len(self.made)
        shape = w.shape(x)
        y = self.branch(x, depth, "none")
        if self.flip():
            flat = (shape[0], shape[1], -1) if self.images else (shape[0] * shape[1], shape[2])
            flat = tuple(shape[2] * shape[3] if n == -1 else n for n in flat)
            join = w.add(w.reshape(y, *flat), w.reshape(x, *flat))
            after = w.reshape(join, *shape)
        else:
            axis = len(shape) - 2
            moved = w.unary(K.ROLL, x, axes=(axis,), shifts=(1,))
            join = after = w.add(moved, y)
        self.record(join, x, "add", at, shortcut="view", norm=self.placement("none", at))
        return after

    def _part(self, x: int, depth: int) -> int:
        """[x₁, F(x₂)]: the concatenation of one half and the work on the other (ShuffleNet v2)"""
        w, at, axis = self.w, len(self.made), self.axis()
        half = self.width(x) // 2
        if half < 2:  # halves of one channel each are a stack
            return self._add(x, depth)
        first, second = w.slice(x, axis, 0, half), w.slice(x, axis, half, 2 * half)
        y = self.branch(second, depth, "none")
        join = w.concat(*((first, y) if self.flip() else (y, first)), axis=axis)
        self.record(join, x, "dense", at, shortcut="view", norm=None)
        return join

    def _gated(self, x: int, depth: int) -> int:
        """T·F(x) + (1 − T)·x, in its spellings, or T·F(x) + C·x with a carry gate of its own"""
        w, at = self.w, len(self.made)
        y = self.branch(x, depth, "none")
        gate = w.unary(K.SIGMOID, self.work(x))
        spelling = self.one_of("difference", "coupled", "carry")
        if spelling == "difference":
            join = w.add(x, w.mul(gate, w.add(y, x, scales=(1.0, -1.0))))
        elif spelling == "carry":
            join = w.add(w.mul(gate, y), w.mul(w.unary(K.SIGMOID, self.work(x)), x))
        else:
            rest = w.add(w.number(1.0), gate, scales=(1.0, -1.0))
            first, second = (y, x) if self.flip() else (x, y)  # the gate opens the branch, or the skip
            join = w.add(w.mul(gate, first), w.mul(rest, second))
        self.record(join, x, "gated", at, norm=None)
        return join

    def _dense(self, x: int, depth: int) -> int:
        """[x, F₁(x), F₂([x, F₁(x)]), …], and a transition back"""
        w, axis, width = self.w, self.axis(), self.width(x)
        listed, front = self.flip(), self.flip()
        features, joined = [x], x
        for _ in range(self.draw(st.integers(1, 3))):
            at = len(self.made)
            y = self.act(self.norm(joined)) if self.flip() else joined
            y = self.act(self.work(y, 4))
            features = [y, *features] if front else [*features, y]
            parts = features if listed else [y, joined] if front else [joined, y]
            join = w.concat(*parts, axis=axis)
            self.record(join, joined, "dense", at, norm=None)
            joined = join
        return self.work(w.unary(K.RELU, joined), width, kernel=1)

    def _long(self, x: int, depth: int) -> int:
        """Down, work, up, and the earlier value joined by concat or add"""
        w, at = self.w, len(self.made)
        if w.shape(x)[2] < 2:
            return self._add(x, depth)
        y = self.act(w.conv(w.pool(x) if self.flip() else x, WIDTH, 3))
        if w.shape(y)[2] == w.shape(x)[2]:
            y = w.conv(y, self.width(x), 3, stride=2)
        y = self.act(self.work(self.nested(y, depth), self.width(x)))
        y = w.upsample(y)
        if self.flip():
            join = w.concat(*((x, y) if self.flip() else (y, x)), axis=1)
        else:
            join = w.add(x, self.work(y) if self.flip() else y)
        self.record(join, x, "long", at, norm=None)
        return self.act(self.work(join, self.width(x)))

    def _parallel(self, x: int, depth: int) -> int:
        """x + A(n(x)) + F(n(x)), in its spellings"""
        w, at = self.w, len(self.made)
        norm = self.one_of("pre", "none")
        shared = self.norm(x) if norm == "pre" else x
        a, f = (self.branch(shared, 0, "none") for _ in range(2))
        spelling = self.one_of("inner", "outer", "one")
        if spelling == "inner":
            join = w.add(x, w.add(a, f))
        elif spelling == "outer":
            join = w.add(w.add(x, a), f)
        else:
            join = w.add(x, a, f)
        self.record(join, x, "parallel", at, norm=norm)
        return join

    def _recurrent(self, x: int, depth: int) -> int:
        """x + LSTM(x)"""
        w, at, width = self.w, len(self.made), self.width(x)
        weights = [w.param(4 * width, width), w.param(4 * width, width)]
        y = w.term(K.RECURRENT, x, *weights, shape=w.shape(x), mode="lstm")
        join = w.add(x, self.work(y) if self.flip() else y)
        self.record(join, x, "recurrent", at)
        return join

    def _stochastic(self, x: int, depth: int) -> int:
        """x + b/p·F(x), with one random b a sample"""
        w, at = self.w, len(self.made)
        norm = self.one_of("pre", "none")
        y = self.branch(x, depth, norm)
        coin = w.term(K.RANDOM, shape=(w.shape(x)[0], *[1] * (len(w.shape(x)) - 1)))
        kept = w.div(coin, w.number(0.8)) if self.flip() else coin
        join = w.add(x, w.mul(y, kept))
        self.record(join, x, "stochastic", at, norm=self.placement(norm, at))
        return join

    def _branches(self, x: int, depth: int) -> int:
        """B₀(conv₃(x)) + B₁(conv₁(x)) (+ B₂(x)): every part affine"""
        w, at = self.w, len(self.made)
        x = w.unary(K.RELU, x)
        parts = [self.work(x, kernel=3), self.work(x, kernel=1)]
        if self.images:
            parts = [self.norm(part) for part in parts] if self.flip() else parts
            parts += [self.norm(x)] if self.flip() else []
        join = parts[0]
        for part in parts[1:]:
            join = w.add(join, part)
        self.record(join, x, "branches", at, shortcut="projection", norm=None)
        return w.unary(K.RELU, join)

    # ---- traps -----------------------------------------------------------------------------------------------------

    def decoy(self, x: int) -> int:
        """Something with a join that is none, or that looks as if it had one."""
        w, axis = self.w, self.axis()
        common = ["bias", "table", "constants", "twice", "polynomial", "inception", "two branches", "gate", "selection"]
        choice = self.one_of(*common, *([] if self.images else ["mask", "positions", "token"]))
        if choice == "bias":
            return w.add(self.work(x), self.vector(x))
        if choice == "table":
            return w.add(x, w.param(*w.shape(x)))
        if choice == "constants":
            return w.mul(x, w.add(self.vector(x), self.vector(x)))
        if choice == "twice":
            return w.add(x, x)
        if choice == "polynomial":
            y = self.work(x)
            cubed = w.mul(w.term(K.POW, y, w.number(3.0), shape=w.shape(y)), w.number(0.044715))
            return self.work(w.mul(y, w.unary(K.TANH, w.add(y, cubed))))
        if choice == "inception":
            half = self.width(x) // 2
            parts = [w.unary(K.RELU, self.work(x, width)) for width in (half, self.width(x) - half)]
            return w.concat(*parts, axis=axis)
        if choice == "two branches":
            kernel = self.draw(st.sampled_from((1, 3)))  # of two kernels the smaller could be a shortcut
            return w.add(*(w.unary(K.RELU, self.work(x, kernel=kernel)) for _ in range(2)))
        if choice == "gate":
            axes = (2, 3) if self.images else (1,)
            kept = [1 if index in axes else n for index, n in enumerate(w.shape(x))]
            squeezed = w.term(K.MEAN, x, shape=kept, axes=axes, keepdims=True)
            return w.mul(x, w.unary(K.SIGMOID, self.work(self.act(self.work(squeezed, 2, 1)), self.width(x), 1)))
        if choice == "selection":
            return self.selection(x)
        if choice == "mask":
            return self.attend(x, mask=True)
        if choice == "positions":
            ids = w.add(w.input(*w.shape(x)[:2], dtype="int64"), w.number(1))
            return w.add(x, w.term(K.EMBEDDING, w.param(16, self.width(x)), ids, shape=w.shape(x)))
        batch, length, width = w.shape(x)
        both = w.concat(w.param(batch, 1, width), x, axis=1)
        return w.slice(both, 1, 1, length + 1)

    def selection(self, x: int) -> int:
        """max(x, F(x)), min(x, F(x)), or x where F(x) is positive and F(x) elsewhere"""
        w, y = self.w, self.work(self.act(self.work(x)))
        kind = self.draw(st.sampled_from((K.MAXIMUM, K.MINIMUM, K.WHERE)))
        if kind is not K.WHERE:
            return w.term(kind, x, y, shape=w.shape(x))
        positive = w.term(K.GREATER, y, w.number(0.0), shape=w.shape(y), dtype="bool")
        return w.term(kind, positive, x, y, shape=w.shape(x), dtype="float32")
