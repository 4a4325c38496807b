"""ONNX operators that spell one kind one to one, and the small vocabulary that reading and writing share.

`PLAIN` serves both directions: an operator of the table reads as its kind with its inputs as operands, and a kind of
the table is written as its operator from opset `since` on. Operators with attributes, or whose meaning changed between
opsets, have a reader in `onnx_read` and a writer in `onnx_emit`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir

from rescompile.errors import GraphError
from rescompile.graph import Attrs, Shape, ValueType
from rescompile.kinds import OpKind as K
from rescompile.values import Dim, PartialShape

FUNCTION_DOMAIN = "rescompile"  # the domain of the model-local functions that stand for fused kinds
CONTRIB_DOMAIN = "com.microsoft"  # ONNX Runtime's own operators
# Operators that ONNX Runtime writes into the standard domain of the models that it optimises, and the opset from which
# the standard has them.
RUNTIME_OPS: dict[str, float] = {
    "LayerNormalization": 17,
    "SimplifiedLayerNormalization": math.inf,
    "SkipSimplifiedLayerNormalization": math.inf,
    "MemcpyToHost": math.inf,
}
PROVENANCE_KEY = "rescompile.pass"
PARAMETER_KEY = "rescompile.parameter"
OLDEST_OPSET = 7  # broadcasting as numpy does it, and inference as the default, begin here
OLDEST_INITIALIZERS = 4  # the IR version from which initializers need not be inputs as well
LARGEST_CALL = 50_000  # nodes that a call of a model-local function may stand for, to be looked into
SMALL = 1024  # elements: constants up to this size may hold shapes, axes, scales
INT64_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Plain:
    """An operator whose inputs are a kind's operands, without attributes; `since`: the opset that brought it."""

    op_type: str
    kind: K
    since: int = 1


PLAIN: tuple[Plain, ...] = (
    Plain("Identity", K.IDENTITY),
    Plain("Add", K.ADD),
    Plain("Mul", K.MUL),
    Plain("Div", K.DIV),
    Plain("Pow", K.POW),
    Plain("Where", K.WHERE, 9),
    Plain("Equal", K.EQUAL),
    Plain("Less", K.LESS),
    Plain("LessOrEqual", K.LESS_EQUAL, 12),
    Plain("Greater", K.GREATER),
    Plain("GreaterOrEqual", K.GREATER_EQUAL, 12),
    Plain("And", K.LOGICAL_AND),
    Plain("Or", K.LOGICAL_OR),
    Plain("Not", K.LOGICAL_NOT),
    Plain("Neg", K.NEG),
    Plain("Abs", K.ABS),
    Plain("Exp", K.EXP),
    Plain("Log", K.LOG),
    Plain("Sqrt", K.SQRT),
    Plain("Reciprocal", K.RECIPROCAL),
    Plain("Erf", K.ERF, 9),
    Plain("Sin", K.SIN, 7),
    Plain("Cos", K.COS, 7),
    Plain("Floor", K.FLOOR),
    Plain("Ceil", K.CEIL),
    Plain("Round", K.ROUND, 11),
    Plain("Sign", K.SIGN, 9),
    Plain("IsNaN", K.IS_NAN, 9),
    Plain("Relu", K.RELU),
    Plain("Sigmoid", K.SIGMOID),
    Plain("Tanh", K.TANH),
    Plain("Softplus", K.SOFTPLUS),
    Plain("HardSwish", K.HARDSWISH, 14),
    Plain("Mish", K.MISH, 18),
    Plain("Shape", K.SHAPE),
)

# Reductions over axes: the operator, its kind, and the opset from which its axes are an input.
REDUCTIONS: dict[str, tuple[K, int]] = {
    "ReduceMean": (K.MEAN, 18),
    "ReduceSum": (K.SUM, 13),
    "ReduceMax": (K.AMAX, 18),
    "ReduceMin": (K.AMIN, 18),
    "ReduceProd": (K.PROD, 18),
}

PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


@dataclass(slots=True, eq=False)
class Step:
    """One logical operation that a native node is read as.

    `inputs`: native values, literals, or earlier steps of the same node (their first output). `outputs`: which of the
    node's outputs the step produces, empty for an inner step, whose result has `type`. `extents`: what the reader knows
    of an output's shape beyond the model's own declaration. `virtual`: an operation that no native node computes,
    because the nodes of the next step do it on the way.
    """

    kind: K
    inputs: Sequence[ir.Value | Step | np.ndarray[Any, Any] | None]
    attrs: Attrs = field(default_factory=dict)
    outputs: tuple[int, ...] = ()
    extents: PartialShape | None = None
    virtual: bool = False
    type: ValueType = field(default_factory=lambda: ValueType(None, None))


# What a reader answers: one step, several, or the reason why the node has no kind.
Reading: TypeAlias = Step | list[Step] | str


class Arg(NamedTuple):
    """A native value on its way into a written node, with what is known of its type."""

    value: ir.Value
    shape: Shape | None
    dtype: str | None

    @property
    def rank(self) -> int | None:
        """Number of dimensions, None when unknown."""
        return None if self.shape is None else len(self.shape)


_DTYPE_NAMES: dict[ir.DataType, str] = {}
for _dtype in ir.DataType:
    if _dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        continue
    _DTYPE_NAMES[_dtype] = str(_dtype.numpy())
_DTYPES = {name: dtype for dtype, name in _DTYPE_NAMES.items()}


def dtype_name(dtype: ir.DataType | None) -> str | None:
    """The protocol's name of an ONNX element type."""
    if dtype is None:
        return None
    return _DTYPE_NAMES.get(dtype, "string" if dtype is ir.DataType.STRING else None)


def dtype_of(name: str) -> ir.DataType:
    """The ONNX element type of that name; GraphError when ONNX has none."""
    try:
        return _DTYPES[name]
    except KeyError:
        raise GraphError(f"ONNX has no element type '{name}': cast to one of {', '.join(sorted(_DTYPES))}.") from None


def is_static(shape: Sequence[Dim] | None) -> bool:
    """Whether every extent is known."""
    return shape is not None and all(isinstance(extent, int) for extent in shape)


def literal(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or of a Constant node, not yet read; None for anything else."""
    if value.const_value is not None:
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain != "":
        return None
    return constant_tensor(node)


def constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    """The tensor that a Constant node holds, whichever of its attributes spells it."""
    for name, attribute in node.attributes.items():
        if name == "value":
            return attribute.as_tensor()
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.asarray(attribute.value, dtype=np.float32))
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.asarray(attribute.value, dtype=np.int64))
    return None


def is_runtimes_own(node: ir.Node, opset: int) -> bool:
    """Whether the node is one of ONNX Runtime's own operators, in a model of that opset."""
    return node.domain == CONTRIB_DOMAIN or (node.domain == "" and opset < RUNTIME_OPS.get(node.op_type, 0))


def own_graphs(node: ir.Node) -> list[ir.Graph]:
    """The graphs that a node holds: the branches of an If, the body of a Loop."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type is ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def nodes_within(nodes: Iterable[ir.Node]) -> Iterator[ir.Node]:
    """The nodes and those of the graphs that they hold, at any depth."""
    for node in nodes:
        yield node
        if node.attributes:
            for graph in own_graphs(node):
                yield from nodes_within(graph)


def can_be_written_out(functions: Mapping[ir.OperatorIdentifier, ir.Function], root: ir.Function) -> bool:
    """Whether a call of the function stands for a number of nodes that can be looked at."""
    return 0 <= expanded_size(functions, root) <= LARGEST_CALL


def expanded_size(functions: Mapping[ir.OperatorIdentifier, ir.Function], root: ir.Function) -> int:
    """How many nodes a call of the function stands for, all calls written out; −1 where it ends up calling itself.

    Functions that call each other twice at every level stand for exponentially many.
    """
    sizes: dict[ir.OperatorIdentifier, int] = {}
    entered: set[ir.OperatorIdentifier] = set()
    stack = [root]
    while stack:
        function = stack[-1]
        key = function.identifier()
        entered.add(key)
        nodes = list(nodes_within(function))
        called = [name for node in nodes if (name := node.op_identifier()) in functions]
        missing = next((name for name in called if name not in sizes), None)
        if missing is None:
            sizes[key] = len(nodes) + sum(sizes[name] for name in called)
            stack.pop()
        elif missing in entered:
            return -1
        else:
            stack.append(functions[missing])
    return sizes[root.identifier()]
