"""What a tensor-core contraction computes: frozen, hashable, everything that its code depends on.

    acc[s, i, j] = sum over k of a[s, i, k]·b[s, j, k]           y[s, i, j] = cast(program(acc, operands))

`s` is a batch (or a group of a convolution), `i` a row (or an output pixel), `j` a column (or an output channel). Sums
are in float32. The program after them is a few elementwise steps over the sum and over operands that vary along all
axes or only some: bias by column, scale by column or row, residual in full. Which main loop computes acc (mma.sync,
wgmma) is another module's affair.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from rescompile.backends.cuda.scalars import refusal as scalar_refusal
from rescompile.backends.kernels import Argument
from rescompile.errors import RescompileError
from rescompile.kinds import OpKind
from rescompile.values import Attrs

NARROW = ("float16", "bfloat16")
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "bool": 1}
ACCESS = 16  # bytes: the widest load and store


@dataclass(frozen=True)
class EpilogueOperand:
    """A buffer that the epilogue reads, [batch?][rows?][columns?]; without any of these axes it is one number.

    Its row for the result's row i is (i // row_step) % row_cycle; a cycle of 0 leaves out the remainder.
    """

    name: str
    dtype: str
    batch: bool = False
    row: bool = False
    column: bool = False
    row_step: int = 1
    row_cycle: int = 0

    @staticmethod
    def full(name: str, dtype: str) -> EpilogueOperand:
        """One that has the result's shape."""
        return EpilogueOperand(name, dtype, batch=True, row=True, column=True)


@dataclass(frozen=True)
class EpilogueStep:
    """One elementwise operation. `inputs` are places of values: 0 the sum, then the operands, then earlier steps."""

    kind: OpKind
    inputs: tuple[int, ...]
    attrs: tuple[tuple[str, object], ...] = ()

    @staticmethod
    def of(kind: OpKind, inputs: tuple[int, ...], attrs: Attrs | None = None) -> EpilogueStep:
        """The step with attributes as a mapping."""
        return EpilogueStep(kind, inputs, tuple(sorted((attrs or {}).items())))

    @property
    def settings(self) -> Attrs:
        """The attributes as a mapping."""
        return dict(self.attrs)


@dataclass(frozen=True)
class EpilogueOutput:
    """A value of the program that is written, in full, in `dtype`."""

    value: int
    dtype: str
    name: str = "y"


@dataclass(frozen=True)
class EpilogueProgram:
    """Elementwise steps after the sum, each in float32; a CAST step rounds its value to its type."""

    outputs: tuple[EpilogueOutput, ...]
    operands: tuple[EpilogueOperand, ...] = ()
    steps: tuple[EpilogueStep, ...] = ()

    def __post_init__(self) -> None:
        known = 1 + len(self.operands)
        for step in self.steps:
            if step.kind is not OpKind.FULL and (why := scalar_refusal(step.kind)):
                raise RescompileError(f"No epilogue holds '{step.kind.value}': {why}; leave it outside of the kernel.")
            if any(not 0 <= place < known for place in step.inputs):
                raise RescompileError(f"The epilogue's step '{step.kind.value}' reads a value that is not there yet.")
            known += 1
        if not self.outputs or any(not 0 <= output.value < known for output in self.outputs):
            raise RescompileError("An epilogue writes a value that it does not have.")

    @staticmethod
    def plain(dtype: str) -> EpilogueProgram:
        """y = acc"""
        return EpilogueProgram((EpilogueOutput(0, dtype),))


@dataclass(frozen=True)
class ConvGeometry:
    """A convolution as a product: x [images, height, width, groups·depth/taps], weight [out, kernel, depth/taps].

    `images` None leaves their count to run time. `pads`: top, left, bottom, right.
    """

    images: int | None
    height: int
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def out_height(self) -> int:
        """Output rows."""
        reach = (self.kernel[0] - 1) * self.dilation[0] + 1
        return (self.height + self.pads[0] + self.pads[2] - reach) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        """Output columns."""
        reach = (self.kernel[1] - 1) * self.dilation[1] + 1
        return (self.width + self.pads[1] + self.pads[3] - reach) // self.stride[1] + 1

    @property
    def pixels(self) -> int:
        """Output pixels of one image."""
        return self.out_height * self.out_width

    @property
    def taps(self) -> int:
        """Input pixels that one output pixel reads."""
        return prod(self.kernel)

    @property
    def is_product(self) -> bool:
        """Whether each output pixel reads the input pixel of its own number: a product of matrices as they lie."""
        return self.taps == 1 and self.stride == (1, 1) and self.pads == (0, 0, 0, 0)


@dataclass(frozen=True)
class ContractionSpec:
    """acc[s, i, j] = sum over k of a[s, i, k]·b[s, j, k], then the epilogue.

    Attributes:
        rows, batch: None, at most one of them, leaves the extent to run time.
        depth: terms of each sum; of a convolution, the kernel's taps times the channels of a group.
        batch: products that are independent; of a convolution, its groups.
        dtype: of a and b. float32 is multiplied as tf32, with 10 bits after the point.
        a_depth_last: a lies as [batch, rows, depth], else as [batch, depth, rows].
        b_depth_last: b lies as [batch, columns, depth], as torch keeps weights, else as [batch, depth, columns].
        a_share, b_share: how many neighbouring products read the same matrix; 0: all of them.
        conv: how a is gathered from an image; b is [groups·columns, kernel, depth/taps] and y has groups·columns
            channels.
    """

    rows: int | None
    columns: int
    depth: int
    epilogue: EpilogueProgram
    batch: int | None = 1
    dtype: str = "float16"
    a_depth_last: bool = True
    b_depth_last: bool = True
    a_share: int = 1
    b_share: int = 1
    conv: ConvGeometry | None = field(default=None)

    def __post_init__(self) -> None:
        if min(self.columns, self.depth, 1 if self.rows is None else self.rows, self.batch or 1) < 1:
            raise RescompileError(f"The product {self} is empty; every extent must be at least 1.")
        if self.rows is None and self.batch is None:
            raise RescompileError("A product may leave its rows or its batch to run time, not both.")
        conv = self.conv
        if conv is None:
            return
        if self.rows != (None if conv.images is None else conv.images * conv.pixels) or self.depth % conv.taps:
            raise RescompileError(f"The convolution {self} has other pixels or taps than its geometry says.")
        if not self.a_depth_last or not self.b_depth_last or self.batch is None or conv.pixels < 1:
            raise RescompileError(
                f"The convolution {self} must have channels last, a known count of groups, an output."
            )

    @property
    def flops(self) -> int:
        """Floating point operations, two for each multiply-add; of one row or product where their count is dynamic."""
        return 2 * (self.batch or 1) * (self.rows or 1) * self.columns * self.depth

    @property
    def groups(self) -> int:
        """Products whose results lie side by side in y's columns: the groups of a convolution."""
        return (self.batch or 1) if self.conv is not None else 1

    @property
    def channels(self) -> int:
        """Columns of y: of all groups."""
        return self.columns * self.groups

    @property
    def vectors(self) -> tuple[int, int]:
        """Elements of the widest access of a and of b that no row breaks."""
        widest = ACCESS // BYTES[self.dtype]
        channels = self.depth // self.conv.taps if self.conv is not None else self.depth
        inner_a = channels if self.a_depth_last else self.rows
        inner_b = self.depth if self.b_depth_last else self.columns
        return dividing(inner_a, widest), dividing(inner_b, widest)

    @property
    def result_vector(self) -> int:
        """Neighbouring columns that a thread computes the epilogue of: one access of the narrowest output."""
        narrowest = min(BYTES[output.dtype] for output in self.epilogue.outputs)
        return dividing(self.columns, min(8, ACCESS // narrowest))


def dividing(extent: int | None, widest: int) -> int:
    """The largest power of two, at most `widest`, that divides an extent; 1 where that is not known."""
    while extent is not None and extent % widest:
        widest //= 2
    return 1 if extent is None else widest


def arguments(spec: ContractionSpec) -> list[Argument]:
    """a, b, the epilogue's operands, its outputs. An extent of None is the one left to run time.

    A convolution's a is [images, height, width, channels] and what has rows is [images, pixels, channels].
    """
    found = [Argument("a", _a_shape(spec), spec.dtype), Argument("b", _b_shape(spec), spec.dtype)]
    found += [
        Argument(operand.name, _operand_shape(spec, operand), operand.dtype) for operand in spec.epilogue.operands
    ]
    return [
        *found,
        *(Argument(output.name, _result_shape(spec), output.dtype, output=True) for output in spec.epilogue.outputs),
    ]


def _matrices(spec: ContractionSpec, share: int) -> tuple[int | None, ...]:
    """The leading extent of an operand that `share` neighbouring products read."""
    if share == 0 or spec.batch == 1:
        return ()
    return (spec.batch if share == 1 or spec.batch is None else spec.batch // share,)


def _a_shape(spec: ContractionSpec) -> tuple[int | None, ...]:
    conv = spec.conv
    if conv is not None:
        return conv.images, conv.height, conv.width, spec.depth // conv.taps * spec.groups
    inner = (spec.rows, spec.depth) if spec.a_depth_last else (spec.depth, spec.rows)
    return (*_matrices(spec, spec.a_share), *inner)


def _b_shape(spec: ContractionSpec) -> tuple[int | None, ...]:
    if spec.conv is not None:
        return spec.channels, *spec.conv.kernel, spec.depth // spec.conv.taps
    inner = (spec.columns, spec.depth) if spec.b_depth_last else (spec.depth, spec.columns)
    return (*_matrices(spec, spec.b_share), *inner)


def _result_shape(spec: ContractionSpec) -> tuple[int | None, ...]:
    if spec.conv is not None:
        return spec.conv.images, spec.conv.pixels, spec.channels
    return (*_matrices(spec, 1), spec.rows, spec.columns)


def _operand_shape(spec: ContractionSpec, operand: EpilogueOperand) -> tuple[int | None, ...]:
    plain = operand.row_step == 1 and not operand.row_cycle
    if operand.batch and operand.row and operand.column and plain:
        return _result_shape(spec)
    lead = _matrices(spec, 1) if operand.batch and spec.conv is None else ()
    rows: tuple[int | None, ...] = ()
    if operand.row and operand.row_cycle:
        rows = (operand.row_cycle,)
    elif operand.row:
        rows = (spec.conv.images,) if not plain and spec.conv is not None else (_steps(spec.rows, operand.row_step),)
    return (*lead, *rows, *((spec.channels,) if operand.column else ())) or (1,)


def _steps(rows: int | None, step: int) -> int | None:
    return None if rows is None else -(-rows // step)
