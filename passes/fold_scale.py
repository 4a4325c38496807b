"""Constants that scale or shift features, in the weights of the contractions beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from rescompile.costs import tensor_size
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind as K
from rescompile.passes.constants import Constant, constants_of, makers, positive
from rescompile.passes.contents import Contents
from rescompile.passes.features import held
from rescompile.passes.scale_paths import Asked, Site, ahead, behind
from rescompile.plans import Edit, Erase, Plan, Preserves, Refusal, ReplaceUses, Rewrite, fuse_edit, gather

# Of 16-bit types: the smallest number of full precision, and the largest one.
_RANGES = {"float16": (2.0**-14, 65504.0), "bfloat16": (2.0**-126, 2.0**127)}


@dataclass(frozen=True)
class FoldScale:
    """γ⊙(W·x + b)  →  W'·x + γ⊙b,  W' = diag(γ)·W;  W·(γ⊙x + β) + b  →  W'·x + (b + W·β),  W' = W·diag(γ)

    LayerScale, ReZero, SkipInit, the constants of EDSR and NFNet, `alpha=` of a sum, Affine of ResMLP, a batch norm
    before a contraction. First into what writes the value, else into all that reads it, else into another factor.
    1. The constant is stored: one number, or one for each feature that the contraction writes, or reads.
    2. Nothing else reads what lies between, and that is linear and keeps features apart; a rectifier lets positive
       factors pass. The gain of a norm and the terms of a sum take a factor, too.
    3. A shift does not go into a convolution with a border of zeros, which it would not reach.
    4. Weights that something else reads as they are get a copy where `copy` says so; biases and gains always do.
    5. In 16 bits, only where the new weights are the old ones to the bit, but for their exponents; or where `half` says
       that they may be rounded once more, and none of them leaves the range in which the type keeps its precision.
    """

    name: ClassVar[str] = "fold-scale"
    preserves: ClassVar[Preserves] = "values"
    copy: bool = False
    half: bool = False

    def plan(self, graph: Graph) -> Plan:
        """One rewrite or refusal for each operation that scales or shifts by one number or one for each feature."""
        return gather(self.name, self.preserves, graph, self._decisions(graph))

    def _decisions(self, graph: Graph) -> Iterator[Rewrite | Refusal]:
        found = [constant for op in graph for constant in constants_of(graph, op)]
        if graph.training:
            reason = "in training the factor and the weights that it scales are trained for themselves"
            for constant in found:
                yield Refusal(constant.op.name, f"{reason}: capture the model in evaluation")
            return
        state = _State(graph, Contents(graph), self.copy, self.half)
        left: list[tuple[Constant, str]] = []
        for constant in found:
            rewrite = "it is what fold-batch-norm folds" if constant.do == "norm" else state.back(constant)
            if isinstance(rewrite, Rewrite):
                yield rewrite
            else:
                left.append((constant, rewrite))
        still: list[tuple[Constant, str]] = []
        for constant, reason in reversed(left):
            decision = reason if constant.do == "term" else state.forth(constant)
            if isinstance(decision, Rewrite):
                yield decision
            else:
                reasons = f"before it, {reason}; behind it, {decision}" if constant.do != "term" else reason
                still.insert(0, (constant, reasons))
        for constant, reason in still:
            decision = reason if constant.shifts else state.back(constant, into_factors=True)
            if isinstance(decision, Rewrite):
                yield decision
            elif constant.held is not None or constant.do != "scale":
                yield Refusal(constant.op.name, reason)


class _State:
    """The plan so far. `gone`: operations that it takes out, by the value that stands for their output."""

    def __init__(self, graph: Graph, contents: Contents, copy: bool, half: bool) -> None:
        self.graph = graph
        self.contents = contents
        self.copy = copy
        self.half = half
        self.gone: dict[Op, Value] = {}
        self.scales: dict[Op, list[float]] = {}  # of sums that it changes

    def back(self, constant: Constant, *, into_factors: bool = False) -> Rewrite | str:
        """Into what writes the value; with `into_factors`, into another factor that stays."""
        sites = behind(self._asked(constant, into_factors), constant.x, constant.axis)
        if isinstance(sites, str):
            return sites
        refused = self._unfit(constant, sites)
        if refused:
            return refused
        edits: list[Edit] = []
        if constant.shifts:
            contraction = sites[0].op
            attrs = {"number": constant.number, "axis": sites[0].axis, "groups": sites[0].groups}
            edits += self.contents.shift(contraction, "moved_bias", [constant.held], attrs)
            sites = sites[:1]
            equation = "(W·x + b) + c  →  W·x + (b + c)"
        else:
            edits += self._scaled(constant, sites)
            equation = "γ⊙(W·x + b)  →  (γ⊙W)·x + γ⊙b"
        return self._rewrite(constant, sites, equation, edits)

    def forth(self, constant: Constant) -> Rewrite | str:
        """Into everything that reads the value."""
        if any(self.contents.changed(op) for op in (constant.op, *makers(self.graph, [constant.op]))):
            return "it holds other factors by now"
        sites = ahead(self._asked(constant), constant.op.output, constant.axis)
        if isinstance(sites, str):
            return sites
        refused = self._unfit(constant, sites)
        if refused:
            return refused
        edits: list[Edit] = []
        attrs: dict[str, Any]
        if constant.shifts:
            for site in sites:  # a bias is computed from the weight as it was
                attrs = {"axis": site.axis, "groups": site.groups}
                if constant.do == "norm":
                    gamma, beta, mean, variance = (held(value) for value in constant.op.inputs[1:5])
                    attrs["eps"] = constant.op.attr("eps")
                    edits += self.contents.shift(site.op, "folded_bias", [gamma, beta, mean, variance], attrs)
                else:
                    attrs["number"] = constant.number
                    edits += self.contents.shift(site.op, "folded_bias", [None, constant.held, None, None], attrs)
        if constant.do == "norm":
            gamma, variance = held(constant.op.inputs[1]), held(constant.op.inputs[4])
            for site in sites:
                attrs = {"axis": site.axis, "groups": site.groups, "eps": constant.op.attr("eps")}
                edits += self.contents.change(site.op, site.index, "folded_weight", [gamma, variance], attrs)
        elif constant.do == "scale":
            edits += self._scaled(constant, sites)
        equation = {
            "norm": "W·BN(x) + b  →  W'·x + b'",
            "shift": "W·(x + c) + b  →  W·x + (b + W·c)",
            "scale": "W·(γ⊙x) + b  →  (W·diag(γ))·x + b",
        }[constant.do]
        return self._rewrite(constant, sites, equation, edits)

    def _asked(self, constant: Constant, into_factors: bool = False) -> Asked:
        scaled = positive(self.graph, constant)
        return Asked(self.graph, constant.shifts, scaled, self.gone, self.contents.biased, into_factors)

    def _scaled(self, constant: Constant, sites: list[Site]) -> list[Edit]:
        edits: list[Edit] = []
        others = [] if constant.held is None else [constant.held]
        for site in sites:
            attrs = {**_attrs(constant), "axis": site.axis, "groups": site.groups}
            edits += self.contents.change(site.op, site.index, "scaled_by", others, attrs)
        return edits

    def _unfit(self, constant: Constant, sites: list[Site]) -> str:
        if constant.divide and constant.held is not None and not self.graph.data(constant.held).all():
            return "it divides by zero"
        for site in sites:
            other = None if self.copy else self.contents.shared(site.op, site.index)
            value = site.op.inputs[site.index] if site.index < len(site.op.inputs) else None
            if value is None:
                continue
            if other is not None:
                cost = f"a copy would cost {tensor_size(value)[0]:,} parameters (copy=true)"
                return f"'{other.name}' also reads the weight of '{site.op.name}' as it is; {cost}"
            if value.dtype in _RANGES and not (self.half or self._exact(constant)):
                why = f"in {value.dtype} the weights of '{site.op.name}' would be rounded once more"
                return f"{why}: fold in float32 and cast then, or allow it by half=true"
            if value.dtype in _RANGES and not constant.shifts and self._rounds(constant, value):
                return f"in {value.dtype} the scaled weights of '{site.op.name}' would lose what is small in them"
        return ""

    def _factors(self, constant: Constant) -> np.ndarray[Any, Any]:
        held = np.ones(1) if constant.held is None else self.graph.data(constant.held).astype(np.float64)
        return np.asarray(np.abs(constant.number * (1 / held if constant.divide else held)))

    def _exact(self, constant: Constant) -> bool:
        """Whether it only moves exponents: a scale by powers of two."""
        return constant.do in ("scale", "term") and bool((np.frexp(self._factors(constant))[0] == 0.5).all())

    def _rounds(self, constant: Constant, value: Value) -> bool:
        """Whether the weights, scaled, leave the range in which the type keeps its precision."""
        factors = self._factors(constant)
        weights = np.abs(self.graph.data(value).astype(np.float64))
        smallest, largest = _RANGES[value.dtype or ""]
        small, large = float(factors.min()) * float(np.median(weights)), float(factors.max()) * float(weights.max())
        return small < 4 * smallest or large > largest

    def _rewrite(self, constant: Constant, sites: list[Site], equation: str, edits: list[Edit]) -> Rewrite:
        op = constant.op
        where = ", ".join(f"'{site.op.name}'" for site in {site.op: site for site in sites}.values())
        if constant.do == "term":
            scales = self.scales.setdefault(op, list(op.scales))
            scales[constant.index] = 1.0
            inputs = self.contents.operands(op)
            attrs: dict[str, Any] = {} if all(scale == 1 for scale in scales) else {"scales": tuple(scales)}
            edits.append(self.contents.replaced(fuse_edit([op], K.ADD, inputs, [op.output], **attrs), op))
        else:
            self.gone[op] = constant.x
            self.contents.stands[op.output.name] = constant.x.name
            edits += [ReplaceUses(op.output.name, self.contents.now(constant.x)), Erase(op.name)]
            edits += [Erase(maker.name) for maker in makers(self.graph, [op])]
        return Rewrite(op.name, equation, f"into {where}", tuple(edits))


def _attrs(constant: Constant) -> dict[str, Any]:
    return {"number": constant.number, "divide": constant.divide}
