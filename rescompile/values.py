"""What a graph is made of: values and the operations that produce and read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from rescompile.errors import GraphError
from rescompile.kinds import OpKind, Trait

Dim: TypeAlias = int | str  # an extent, or the name of a symbolic one
Shape: TypeAlias = tuple[Dim, ...]
PartialShape: TypeAlias = tuple[Dim | None, ...]  # None: an extent that nobody has named yet
Attrs: TypeAlias = dict[str, Any]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of that name, bfloat16 and the others of ml_dtypes included."""
    try:
        return np.dtype(name)
    except TypeError:
        extra: type[np.generic] = vars(ml_dtypes)[name]
        return np.dtype(extra)


class Role(Enum):
    """Where a value comes from."""

    INPUT = "input"
    PARAMETER = "parameter"  # a named tensor of the model's state
    CONSTANT = "constant"  # a literal, or an unnamed tensor
    RESULT = "result"  # an operation's output


@dataclass(frozen=True, slots=True)
class ValueType:
    """Shape (symbolic extents by name; None when unknown) and dtype ("float32", "int64", ...; None when unknown)."""

    shape: Shape | None
    dtype: str | None


class Value:
    """One value of a graph. Compared by identity; `name` is unique in its graph and stable under edits elsewhere."""

    __slots__ = ("constant", "dtype", "name", "native", "producer", "role", "shape", "uses")

    def __init__(self, name: str, shape: Shape | None, dtype: str | None, role: Role, native: Any = None) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.role = role
        self.native = native
        self.producer: Op | None = None
        self.uses: dict[tuple[Op, int], None] = {}
        # True when the value does not depend on any graph input: a parameter, a literal, or computed from such only.
        self.constant = role in (Role.PARAMETER, Role.CONSTANT)

    @property
    def type(self) -> ValueType:
        """Shape and dtype together."""
        return ValueType(self.shape, self.dtype)

    @property
    def rank(self) -> int | None:
        """Number of dimensions, None when the shape is unknown."""
        return None if self.shape is None else len(self.shape)

    @property
    def users(self) -> list[Op]:
        """The operations that read the value, each once, in the order in which they came to read it."""
        return list(dict.fromkeys(op for op, _ in self.uses))

    def __repr__(self) -> str:
        return f"%{self.name}"


class Op:
    """One logical operation. `inputs` has one entry for each operand of the kind's signature, None where absent."""

    __slots__ = ("attrs", "group", "inputs", "kind", "module", "name", "native", "order", "outputs", "provenance")

    def __init__(
        self,
        kind: OpKind,
        name: str,
        inputs: Sequence[Value | None],
        outputs: Sequence[Value],
        attrs: Attrs,
        native: tuple[Any, ...] = (),
        module: str = "",
    ) -> None:
        self.kind = kind
        self.name = name
        self.inputs: list[Value | None] = list(inputs)
        self.outputs: list[Value] = list(outputs)
        self.attrs = attrs
        self.native = native  # the native nodes that this operation covers
        self.group: list[Op] | None = None  # the operations that together stand for one native node
        self.module = module  # dotted path of the module that the user's code ran, "" when unknown
        self.provenance = ""  # name of the pass that made the operation
        self.order = 0  # position in topological order, valid after commit

    def operand(self, name: str) -> Value | None:
        """The operand of that name in the kind's signature (`weight`, `bias`, ...), None when absent."""
        names = self.kind.spec.operands
        for index, spelled in enumerate(names):
            if spelled.rstrip("?") == name:
                return self.inputs[index] if index < len(self.inputs) else None
        raise GraphError(f"{self.kind.value} has no operand '{name}': it has {', '.join(names)}.")

    @property
    def operands(self) -> list[Value]:
        """The operands that are present."""
        return [value for value in self.inputs if value is not None]

    @property
    def output(self) -> Value:
        """The first output."""
        return self.outputs[0]

    @property
    def scales(self) -> tuple[float, ...]:
        """The factor of each operand, of an ADD."""
        return tuple(self.attrs.get("scales", ())) or (1.0,) * len(self.inputs)

    def has(self, trait: Trait) -> bool:
        """Whether the operation's kind has all of `trait`."""
        wanted = trait._value_
        return self.kind.bits & wanted == wanted

    def attr(self, name: str) -> Any:
        """An attribute, by its schema's default where the operation does not set it."""
        if name in self.attrs:
            return self.attrs[name]
        return self.kind.spec.attrs[name]

    def __repr__(self) -> str:
        return f"<{self.name}: {self.kind.value}>"
