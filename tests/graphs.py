"""Builders of graphs in memory, written the way adapters present models: neutral operations, named values, shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

from rescompile.graph import Graph, Op, Role, Shape, Value, ValueType
from rescompile.kinds import OpKind, Trait

K = OpKind


class Builder:
    """A graph under construction. Methods return values; shapes follow from the operands where that is simple."""

    def __init__(self, name: str = "test") -> None:
        self.graph = Graph(name)
        self.module = ""
        self._count = 0

    def input(self, *shape: int | str, name: str = "", dtype: str = "float32") -> Value:
        return self.graph.add_input(name or f"input_{len(self.graph.inputs)}", tuple(shape), dtype)

    def param(self, *shape: int, name: str = "") -> Value:
        self._count += 1
        data = np.ones(shape, dtype=np.float32)
        return self.graph.add_constant(name or f"p_{self._count}", tuple(shape), "float32", data, Role.PARAMETER)

    def literal(self, number: float | np.ndarray, dtype: str = "float32") -> Value:
        self._count += 1
        data = np.asarray(number)
        return self.graph.add_constant(f"c_{self._count}", data.shape, dtype, data, Role.CONSTANT)

    def op(
        self, kind: OpKind, *inputs: Value | float | None, shape: Shape | None = None, name: str = "", **attrs: Any
    ) -> Value:
        return self.ops(kind, *inputs, shapes=[shape], name=name, **attrs).output

    def ops(
        self,
        kind: OpKind,
        *inputs: Value | float | None,
        shapes: list[Shape | None],
        name: str = "",
        dtype: str | None = None,
        **attrs: Any,
    ) -> Op:
        operands = [self.literal(x) if isinstance(x, int | float) else x for x in inputs]
        present = [x for x in operands if x is not None]
        self._count += 1
        stem = name or f"{kind.value}_{self._count}"
        if shapes == [None] and present:
            shapes = [_shape(kind, present)]
        dtype = dtype or attrs.get("dtype") or (present[0].dtype if present else "float32")
        outputs = [
            (stem if index == 0 else f"{stem}_out{index}", ValueType(shape, dtype))
            for index, shape in enumerate(shapes)
        ]
        return self.graph.add_op(kind, operands, outputs, attrs, module=self.module)

    def output(self, *values: Value) -> Graph:
        self.graph.set_outputs(values)
        self.graph.commit()
        return self.graph

    # ---- shorthands --------------------------------------------------------------------------------------------

    def add(self, *inputs: Value | float, scales: tuple[float, ...] = (), name: str = "") -> Value:
        attrs = {"scales": scales} if scales else {}
        return self.op(K.ADD, *inputs, name=name, **attrs)

    def sub(self, a: Value | float, b: Value | float) -> Value:
        return self.add(a, b, scales=(1.0, -1.0))

    def mul(self, a: Value | float, b: Value | float, name: str = "") -> Value:
        return self.op(K.MUL, a, b, name=name)

    def linear(self, x: Value, width: int, name: str = "", bias: bool = True) -> Value:
        assert x.shape is not None
        weight = self.param(width, int(x.shape[-1]))
        return self.op(
            K.LINEAR, x, weight, self.param(width) if bias else None, shape=(*x.shape[:-1], width), name=name
        )

    def conv(self, x: Value, channels: int, kernel: int = 3, stride: int = 1, groups: int = 1, name: str = "") -> Value:
        assert x.shape is not None
        batch, width, *spatial = x.shape
        weight = self.param(channels, int(width) // groups, *[kernel] * len(spatial))
        pad = kernel // 2
        shape = (batch, channels, *((int(n) + 2 * pad - kernel) // stride + 1 for n in spatial))
        rank = len(spatial)
        attrs = {"stride": (stride,) * rank, "pads": (pad,) * (2 * rank), "dilation": (1,) * rank, "groups": groups}
        return self.op(K.CONV, x, weight, None, shape=shape, name=name, **attrs)

    def batch_norm(self, x: Value, name: str = "") -> Value:
        assert x.shape is not None
        width = int(x.shape[1])
        return self.op(K.BATCH_NORM, x, *(self.param(width) for _ in range(4)), shape=x.shape, name=name)

    def layer_norm(self, x: Value, name: str = "") -> Value:
        assert x.shape is not None
        width = int(x.shape[-1])
        return self.op(K.LAYER_NORM, x, self.param(width), self.param(width), shape=x.shape, name=name)

    def relu(self, x: Value, name: str = "") -> Value:
        return self.op(K.RELU, x, name=name)

    def permute(self, x: Value, *perm: int) -> Value:
        assert x.shape is not None
        return self.op(K.PERMUTE, x, shape=tuple(x.shape[axis] for axis in perm), perm=perm)

    def reshape(self, x: Value, *shape: int) -> Value:
        return self.op(K.RESHAPE, x, shape=shape)

    def matmul(self, a: Value, b: Value) -> Value:
        assert a.shape is not None
        assert b.shape is not None
        return self.op(K.MATMUL, a, b, shape=(*a.shape[:-1], b.shape[-1]))

    def mean(self, x: Value, *axes: int, keepdims: bool = True) -> Value:
        assert x.shape is not None
        shape = tuple(1 if axis in axes else n for axis, n in enumerate(x.shape))
        if not keepdims:
            shape = tuple(n for axis, n in enumerate(x.shape) if axis not in axes)
        return self.op(K.MEAN, x, shape=shape, axes=axes, keepdims=keepdims)

    def concat(self, *values: Value, axis: int = 1, name: str = "") -> Value:
        shapes = [list(value.shape or ()) for value in values]
        shape = list(shapes[0])
        shape[axis] = sum(int(other[axis]) for other in shapes)
        return self.op(K.CONCAT, *values, shape=tuple(shape), axis=axis, name=name)

    def slice(self, x: Value, axis: int, start: int, stop: int) -> Value:
        assert x.shape is not None
        shape = (*x.shape[:axis], stop - start, *x.shape[axis + 1 :])
        return self.op(K.SLICE, x, shape=shape, axes=(axis,), starts=(start,), stops=(stop,), steps=(1,))


def _shape(kind: OpKind, operands: list[Value]) -> Shape | None:
    shapes = [value.shape for value in operands]
    if kind.has(Trait.SHAPE_PRESERVING) or len(shapes) == 1:
        return shapes[0]
    if not kind.has(Trait.ELEMENTWISE) or any(shape is None for shape in shapes):
        return None
    rank = max(len(shape) for shape in shapes if shape is not None)
    padded = [(1,) * (rank - len(shape)) + tuple(shape) for shape in shapes if shape is not None]
    return tuple(next((n for n in column if n != 1), 1) for column in zip(*padded, strict=True))


# ---- networks ------------------------------------------------------------------------------------------------------


def residual_mlp(depth: int = 3, width: int = 8) -> Graph:
    """x + W₂·relu(W₁·x), `depth` times."""
    b = Builder("mlp")
    x = b.input(2, width)
    for index in range(depth):
        b.module = f"blocks.{index}"
        x = b.add(x, b.linear(b.relu(b.linear(x, 2 * width)), width), name=f"join_{index}")
    return b.output(x)


def resnet_block(b: Builder, x: Value, channels: int, stride: int = 1, name: str = "") -> Value:
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x)))))), with a 1×1 projection where the shape changes."""
    y = b.relu(b.batch_norm(b.conv(x, channels, 3, stride)))
    y = b.batch_norm(b.conv(y, channels, 3))
    if stride != 1 or x.shape is None or x.shape[1] != channels:
        x = b.batch_norm(b.conv(x, channels, 1, stride))
    return b.relu(b.add(y, x, name=name))


def attention(b: Builder, x: Value, memory: Value | None = None, mask: Value | None = None) -> Value:
    """Self-attention, or attention to a memory, as one operation between four linears."""
    memory = x if memory is None else memory
    width = int((x.shape or ())[-1])
    q, k, v = b.linear(x, width), b.linear(memory, width), b.linear(memory, width)
    return b.linear(b.op(K.ATTENTION, q, k, v, mask, shape=x.shape), width)


def mlp(b: Builder, x: Value) -> Value:
    width = int((x.shape or ())[-1])
    return b.linear(b.op(K.GELU, b.linear(x, 4 * width)), width)


def transformer_layer(
    b: Builder, x: Value, norm: str = "pre", memory: Value | None = None, mask: Value | None = None
) -> Value:
    """Attention (and attention to a memory) and an MLP, with norms before, behind, on or around the branches."""

    def around(x: Value, branch: Any) -> Value:
        y = branch(b.layer_norm(x) if norm in ("pre", "sandwich") else x)
        if norm in ("branch", "sandwich"):
            y = b.layer_norm(y)
        total = b.add(x, y)
        return b.layer_norm(total) if norm == "post" else total

    x = around(x, lambda x: attention(b, x, None, mask))
    if memory is not None:
        x = around(x, lambda x: attention(b, x, memory, mask))
    return around(x, lambda x: mlp(b, x))
