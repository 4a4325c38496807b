"""Where the norms of residual blocks stand: passes that move them, one for each placement.

A move changes the function: that the model trains otherwise is the point of it. The weights stay what they were, under
their names. `pre-norm{mode=reblock}` alone is exact, because it moves nothing but the line between blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

from rescompile.errors import RescompileError
from rescompile.graph import Graph
from rescompile.passes.norm_conversion import Conversion
from rescompile.passes.norm_writers import Blend, Calibrate, Convert, Reblock, Writer
from rescompile.plans import Plan, Preserves, gather

Mode: TypeAlias = Literal["convert", "reblock", "gradual", "calibrated"]
Names: TypeAlias = str | tuple[str, ...]


@dataclass(frozen=True)
class PreNorm:
    """y = N(x + F(x))  →  y = x + F(N(x))

    1. Each norm goes from behind its sum to the entry of its own branch (Xiong et al. 2020); norms before the stack
       stay. Blocks with their norm at the branch's end are converted too.
    2. `final_norm`: where a stack would end un-normed it gets a norm of its own (`auto`), under the name that is given,
       one for each stack; a norm of that name that the model has already moves there; `none` adds none.
    3. `blocks`: which ones, as ids, ranges (`0-5`) or modules; the others stay as they are.
    4. `mode`: `convert`, which changes the function; `reblock`, exact: n = N(x), y = n + F(n), the same operations with
       the skip taken after the norm; `gradual`: a blend of both forms by a scalar of the model, 0 at first, which
       training moves to 1 and `freeze-blend` then removes; `calibrated`: converted, with a factor on every branch that
       keeps the stream's proportions on `data` (an .npz file, or arrays by name; random inputs where there is none).
    """

    name: ClassVar[str] = "pre-norm"
    blocks: Names = "all"
    final_norm: Names = "auto"
    mode: Mode = "convert"
    data: str | Mapping[str, Any] | None = None

    @property
    def preserves(self) -> Preserves:
        """Values where nothing moves yet."""
        return "values" if self.mode in ("reblock", "gradual") else "interface"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each block."""
        if self.data is not None and self.mode != "calibrated":
            raise RescompileError("The option data of pre-norm is for mode=calibrated: leave it out.")
        writers: dict[str, Writer] = {
            "convert": Convert(),
            "reblock": Reblock(),
            "gradual": Blend(),
            "calibrated": Calibrate(self.data),
        }
        conversion = Conversion(graph, "pre", self.blocks, self.final_norm, writers[self.mode])
        return gather(self.name, self.preserves, graph, conversion.decisions())


@dataclass(frozen=True)
class _Placement:
    """What the other placements share: `blocks` and `final_norm` as for pre-norm."""

    name: ClassVar[str]
    preserves: ClassVar[Preserves] = "interface"
    blocks: Names = "all"
    final_norm: Names = "auto"

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each block."""
        conversion = Conversion(graph, self.name.removesuffix("-norm"), self.blocks, self.final_norm, Convert())
        return gather(self.name, self.preserves, graph, conversion.decisions())


@dataclass(frozen=True)
class PostNorm(_Placement):
    """y = x + F(N(x))  →  y = N(x + F(x))

    1. Each norm goes from the entry, or from the end, of its branch behind the sum; a factor on the skip goes.
    2. `final_norm`: the norm behind a stack goes if an earlier pass added it (`auto`), in any case (`none`), or if it
       has that name.
    """

    name: ClassVar[str] = "post-norm"


@dataclass(frozen=True)
class BranchNorm(_Placement):
    """y = N(x + F(x))  →  y = x + N(F(x))

    Each norm goes to the end of its branch, before LayerScale and stochastic depth (Swin v2, OLMo 2).
    """

    name: ClassVar[str] = "branch"


@dataclass(frozen=True)
class SandwichNorm(_Placement):
    """y = N(x + F(x))  →  y = x + N₂(F(N(x)))

    The block's norm at the entry of its branch, and a new one with gain 1 at its end (Ding et al. 2021, CogView).
    """

    name: ClassVar[str] = "sandwich"


@dataclass(frozen=True)
class DeepNorm(_Placement):
    """y = N(x + F(x))  →  y = N(αx + βF(x))

    1. α multiplies the skip; β the weights of the branch's linears, of attention those behind value and output only.
    2. With S branches in the stack α = S^¼, β = (4S)^−¼; an encoder of N layers before a decoder of M has
       α = 0.81·(N⁴M)^(1/16), β = 0.87·(N⁴M)^(−1/16) (Wang et al. 2022, table of figure 2).
    """

    name: ClassVar[str] = "deepnorm"
