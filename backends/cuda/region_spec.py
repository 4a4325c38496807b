"""What a kernel of a fused region depends on: the program, the tensors and how they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from rescompile.backends.cuda.index import Extent, product
from rescompile.backends.kernels import NormSpec
from rescompile.errors import GraphError
from rescompile.fused_region import Region, Step, parse, step_types
from rescompile.kinds import OpKind
from rescompile.values import Dim, ValueType

K = OpKind

BYTES = {
    "float64": 8,
    "int64": 8,
    "float32": 4,
    "int32": 4,
    "float16": 2,
    "bfloat16": 2,
    "bool": 1,
    "int8": 1,
    "uint8": 1,
}
# Elements of the widest access, by type: 16 bytes, as far as the code generator has a vector type.
ACCESS = {**{dtype: 16 // size for dtype, size in BYTES.items()}, "bool": 1, "int8": 4, "uint8": 4}
NORMS = frozenset((K.LAYER_NORM, K.RMS_NORM, K.GROUP_NORM, K.INSTANCE_NORM))
VIEWS = frozenset((K.RESHAPE, K.PERMUTE, K.SLICE, K.ROLL, K.FLIP, K.PAD))


@dataclass(frozen=True)
class Tensor:
    """A buffer: the shape that the program speaks of, and the order in which its dimensions lie in memory."""

    shape: tuple[Dim, ...]
    dtype: str
    order: tuple[int, ...] = ()

    @property
    def lying(self) -> tuple[Dim, ...]:
        """The shape as it lies in memory."""
        return tuple(self.shape[axis] for axis in self.order) if self.order else self.shape


@dataclass(frozen=True)
class RegionSpec:
    """A region over operands that lie in memory in some order; `slopes_last`: PRELU's slopes count along the last axis.

    A dimension is a number, or a name that stands for an extent that is known when the kernel runs.
    """

    steps: str
    operands: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    slopes_last: bool = False

    @cached_property
    def region(self) -> Region:
        """The program."""
        return parse(self.steps)

    @cached_property
    def values(self) -> tuple[ValueType, ...]:
        """Types of the operands and of what each step makes."""
        given = [ValueType(tensor.shape, tensor.dtype) for tensor in self.operands]
        made = [ValueType(tensor.shape, tensor.dtype) for tensor in self.outputs]
        return (*given, *step_types(self.region, given, made))

    @property
    def wide(self) -> str:
        """The type in which floats are computed."""
        return "float64" if any(tensor.dtype == "float64" for tensor in self.operands) else "float32"

    @property
    def names(self) -> list[str]:
        """Extents that are known only when the kernel runs."""
        tensors = (*self.operands, *self.outputs)
        return sorted({dim for tensor in tensors for dim in tensor.shape if isinstance(dim, str)})

    def shape(self, value: int) -> tuple[Dim, ...]:
        """Extents of a value. GraphError where they do not follow from the operands'."""
        shape = self.values[value].shape
        if shape is None:
            raise GraphError("the shape of a value inside is not known")
        return shape

    def dtype(self, value: int) -> str:
        """The element type of a value. GraphError where it does not follow from the operands'."""
        dtype = self.values[value].dtype
        if dtype is None:
            raise GraphError("the element type of a value inside is not known")
        return dtype

    def size(self, value: int) -> Extent:
        """The number of elements of a value."""
        return product(self.shape(value))

    def step(self, value: int) -> Step | None:
        """The step that makes a value; None for an operand."""
        return None if value < self.region.operands else self.region.steps[value - self.region.operands]


def norm_spec(spec: NormSpec) -> RegionSpec:
    """A norm over rows, perhaps of a sum, as a region: y, and the sum where it is wanted.

    Operands: x, [residual], [weight], [bias], in the order of their names in `NormSpec`.
    """
    rows: Dim = "rows" if spec.rows is None else spec.rows
    matrix, vector = Tensor((rows, spec.width), spec.dtype), Tensor((spec.width,), spec.dtype)
    operands = [matrix, *([matrix] if spec.residual else []), *[vector] * (spec.weight + spec.bias)]
    count = len(operands)
    affine: list[int | None] = [*range(1 + spec.residual, count)]
    if spec.bias and not spec.weight:
        affine.insert(0, None)
    affine += [None] * ((2 if spec.kind == "layer" else 1) - len(affine))
    steps = [Step(K.ADD, (0, 1))] if spec.residual else []
    kind = K.LAYER_NORM if spec.kind == "layer" else K.RMS_NORM
    source = count if spec.residual else 0
    steps.append(Step(kind, (source, *affine), {"axis": 1, "eps": spec.eps}))
    made = [count + len(steps) - 1, *([source] if spec.sum_output else [])]
    region = Region(count, tuple(steps), tuple(made))
    return RegionSpec(region.text(), tuple(operands), (matrix,) * len(made))


def tensors(shapes: Sequence[tuple[Dim, ...]], dtype: str) -> tuple[Tensor, ...]:
    """Tensors of one element type that lie as their shapes say."""
    return tuple(Tensor(shape, dtype) for shape in shapes)
