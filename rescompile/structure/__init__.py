"""What the residual structure of a graph means: members, ways, depth, recursion, and what its skips cost.

Everything here is computed from the blocks that detection found, on demand, in near-linear time. Nothing here decides
what a block is.
"""

from __future__ import annotations
