"""Architectures from the literature, written out by hand, with the blocks that follow from their definitions.

The counts come from the papers' equations in the words of the documentation, not from what detection once said.
"""

from __future__ import annotations
