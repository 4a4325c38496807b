"""From ONNX nodes to kinds: the table of readers.

A reader answers with the logical operations that the node is, or with the reason why it has no kind; defaults and
opset changes are resolved there, so that nobody else has to know them. An operator that is not in the table is opaque.
"""

from __future__ import annotations

import onnx_ir as ir

from rescompile import onnx_blocked
from rescompile.onnx_contrib import CONTRIB_READERS
from rescompile.onnx_read_math import MATH_READERS
from rescompile.onnx_read_moves import MOVES_READERS
from rescompile.onnx_read_nn import NN_READERS
from rescompile.onnx_site import Reader

READERS: dict[str, Reader] = {**MATH_READERS, **MOVES_READERS, **NN_READERS}
_DOMAINS = {"": READERS, "com.microsoft": CONTRIB_READERS}


def reader_of(node: ir.Node) -> Reader | None:
    """The reader of the node's operator, None when it has no kind."""
    if onnx_blocked.is_blocked(node):
        return lambda site: onnx_blocked.REASON
    return _DOMAINS.get(node.domain, {}).get(node.op_type)
