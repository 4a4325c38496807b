"""The rule that lowers each kind of operation."""

from __future__ import annotations

from collections.abc import Callable

from rescompile.backends.emitter import Emitter
from rescompile.backends.lower_attention import ATTENTIONS
from rescompile.backends.lower_conv import CONVOLUTIONS
from rescompile.backends.lower_elementwise import ELEMENTWISE, elementwise
from rescompile.backends.lower_linear import PRODUCTS
from rescompile.backends.lower_norm import NORMS
from rescompile.backends.lower_pool import POOLS
from rescompile.backends.lower_reduce import REDUCTIONS
from rescompile.backends.lower_region import region
from rescompile.backends.lower_shape import MOVES
from rescompile.graph import Op
from rescompile.kinds import OpKind

Rule = Callable[[Emitter, Op], None]

RULES: dict[OpKind, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **MOVES,
    **REDUCTIONS,
    **NORMS,
    **CONVOLUTIONS,
    **PRODUCTS,
    **ATTENTIONS,
    **POOLS,
}

# With kernels of their own: what `region_draft.keeps` leaves whole.
CPU_RULES: dict[OpKind, Rule] = {**RULES, OpKind.FUSED_REGION: region}
