"""Operations that the vocabulary does not know, read one at a time by TVM's own frontends."""

from __future__ import annotations

from rescompile.backends.emitter import Emitter
from rescompile.graph import Graph, Op


def unsupported(graph: Graph, op: Op) -> str | None:
    """Why no frontend reads the operation, None when one does."""
    return f"{op.attrs.get('target') or op.kind.value}"


def lower(e: Emitter, op: Op) -> None:
    """Emit the operation as its IR's frontend translates it."""
