"""Rules: what a spelled torch call means, as one or several operations of the vocabulary.

A rule takes the `Site` of a call and gives the `Step` whose output is the call's result, or None when the call has no
kind in the vocabulary. A step's operands may be further steps, so that `addcmul` is an add that reads a mul.
The rules are in `fx_rules_math`, `fx_rules_nn` and `fx_rules_shape`; `RULES` of `fx_read` is all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import fx

from rescompile.fx_ops import Attr
from rescompile.graph import Attrs, Shape, Value, ValueType
from rescompile.kinds import OpKind as K


class Step:
    """One operation to be read. `types`: of its outputs, None for the type of the native node's own result."""

    __slots__ = ("attrs", "inputs", "kind", "native", "suffix", "types")

    def __init__(
        self,
        kind: K,
        inputs: Sequence[Any],
        attrs: Attrs | None = None,
        *,
        suffix: str = "",
        types: Sequence[ValueType] | None = None,
        native: tuple[fx.Node, ...] = (),
    ) -> None:
        self.kind = kind
        self.inputs = inputs
        self.attrs = attrs if attrs is not None else {}
        self.suffix = suffix  # names the output of a step that is not the last
        self.types = types
        self.native = native  # nodes covered besides the one being read


class Lookup(Protocol):
    """Finds the value that an argument stands for."""

    def peek(self, argument: fx.Node | Attr) -> Value | None: ...


class Site:
    """A call in its graph: named arguments, what is known of the operands, and the type of the result."""

    __slots__ = ("args", "lookup", "name", "node", "out", "outs")

    def __init__(
        self, name: str, args: dict[str, Any], node: fx.Node, lookup: Lookup, outs: Sequence[ValueType]
    ) -> None:
        self.name = name
        self.args = args
        self.node = node
        self.lookup = lookup
        self.outs = outs  # one for each result of the native node
        self.out = outs[0] if outs else ValueType(None, None)

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, `default` where it is absent."""
        return self.args.get(name, default)

    def value(self, argument: Any) -> Value | None:
        """The value of an argument, None when it is not a tensor."""
        return self.lookup.peek(argument) if isinstance(argument, fx.Node | Attr) else None

    def shape(self, argument: Any = None) -> Shape | None:
        """Shape of an operand (`input` when not given)."""
        value = self.value(self.args["input"] if argument is None else argument)
        return None if value is None else value.shape

    def rank(self, argument: Any = None) -> int | None:
        """Number of dimensions of an operand."""
        shape = self.shape(argument)
        return None if shape is None else len(shape)

    def axis(self, dim: int, argument: Any = None) -> int:
        """A dimension counted from the front where the rank is known."""
        rank = self.rank(argument)
        return dim + rank if dim < 0 and rank is not None else dim

    def axes(self, dims: Any) -> tuple[int, ...]:
        """Dimensions counted from the front; all of them for None and for an empty list."""
        if isinstance(dims, int):
            return (self.axis(dims),)
        if not dims:
            return tuple(range(self.rank() or 0))
        return tuple(self.axis(dim) for dim in dims)

    def keeps_dtype(self, argument: Any) -> bool:
        """Whether an operand is known to have the result's dtype."""
        value = self.value(argument)
        return value is not None and value.dtype == self.out.dtype

    def retype(self, shape: Shape | None) -> tuple[ValueType]:
        """The result's dtype with another shape, for a step in between."""
        return (ValueType(shape, self.out.dtype),)


# Several steps: the results of a native node that has several.
Rule = Callable[[Site], Step | tuple[Step, ...] | None]


def is_number(argument: Any) -> bool:
    """Whether an argument is a Python number."""
    return isinstance(argument, int | float | bool)
