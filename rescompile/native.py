"""What an adapter implements: how the edits of a graph change the object that it stands for.

The defaults are those of a graph in memory, which stands for none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from rescompile.errors import GraphError
from rescompile.values import Op, Value

if TYPE_CHECKING:
    from rescompile.graph import Body

Evaluator: TypeAlias = Callable[[Sequence[np.ndarray[Any, Any] | None]], list[np.ndarray[Any, Any]]]


class Native:
    """Hooks that `Graph` calls before or after it changes the view, as each says."""

    def native_data(self, value: Value) -> np.ndarray[Any, Any]:
        """Contents of a parameter or literal."""
        return np.asarray(value.native)

    def native_bodies(self, op: Op) -> tuple[Body, ...]:
        """The graphs inside the native nodes of an opaque operation, read anew on each call."""
        return ()

    def native_evaluator(self, op: Op) -> Evaluator:
        """What computes an operation that no kind describes: its results for its operands."""
        raise GraphError(f"'{op.name}' cannot be computed: a graph in memory has nothing that runs it.")

    def native_emit(self, op: Op) -> None:
        """Create native nodes for `op`, set `op.native` and every output's `native`, stamp `op.provenance`."""

    def native_set_shape(self, value: Value) -> None:
        """Declare `value.shape` natively."""

    def native_forgo(self, op: Op) -> None:
        """Note that no form of the model has `op`, which is removed next."""

    def native_respell(self, op: Op) -> None:
        """Replace the native nodes of `op`, which no other operation shares, by those of `native_emit`."""

    def native_erase(self, op: Op) -> None:
        """Remove the native nodes that `op` covers."""
        self.native_erase_nodes(op.native)

    def native_erase_nodes(self, nodes: tuple[Any, ...]) -> None:
        """Remove native nodes that nothing reads."""

    def native_redirect(self, old: Any, value: Value) -> None:
        """Let every reader of the native value `old`, graph outputs included, read `value.native`; names stay."""

    def native_set_operand(self, op: Op, index: int, value: Value) -> None:
        """Change one operand of the native nodes of `op`; `op.inputs[index]` still is the old value."""

    def native_ask_shape(self, old: Value, new: Value) -> None:
        """Let native nodes that the view does not show, and that ask for the shape of `old`, ask `new`.

        Else they would keep what makes `old` from going anywhere behind what they serve.
        """

    def native_replace_output(self, old: Value, new: Value) -> None:
        """Let `new` be a graph output in the place of `old`; the output's outward name stays."""

    def native_add_parameter(self, value: Value, data: np.ndarray[Any, Any], trainable: bool) -> None:
        """Register a new tensor and set `value.native`."""
        value.native = data

    def native_add_literal(self, value: Value, number: float) -> None:
        """Make the number known and set `value.native`."""
        value.native = np.asarray(number)

    def native_set_data(self, value: Value, data: np.ndarray[Any, Any]) -> None:
        """Replace the tensor, not its contents: other graphs may share it."""
        value.native = data

    def native_drop(self, value: Value) -> None:
        """Remove a parameter that nothing reads."""

    def native_commit(self) -> None:
        """Sort and check the native object."""
