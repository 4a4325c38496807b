"""Running a module's graph node by node: as it is, or leaving no trace on the model and on torch's random state."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from rescompile.fx_tree import copy_module


def run_nodes(module: fx.GraphModule, arguments: Sequence[Any]) -> Any:
    """What the graph returns for its placeholders' values, in order."""
    return fx.Interpreter(module).run(*arguments, enable_io_processing=False)


def run_apart(module: fx.GraphModule, arguments: Sequence[Any]) -> Any:
    """As `run_nodes`, with running statistics and torch's random state as they were before.

    What a node draws follows from its name alone, so that a rewrite that keeps a dropout can be compared with its
    original, in whatever order the nodes are.
    """
    twin = copy_module(module, {}, torch.Tensor.clone)
    with torch.random.fork_rng():
        return _Seeded(twin).run(*arguments, enable_io_processing=False)


class _Seeded(fx.Interpreter):
    """Seeds the random numbers of each node."""

    def run_node(self, n: fx.Node) -> Any:
        """As the interpreter does."""
        if n.op.startswith("call"):
            torch.manual_seed(zlib.crc32(n.name.encode()))
        return super().run_node(n)
