"""Gradient flow: what a signal, and the gradient of a loss, are worth at every residual block.

```
L = Σ_o ⟨c_o, o⟩,  c_o ~ N(0, 1)       so that E‖∂L/∂v‖² = ‖∂o/∂v‖²_F, the squared norm of the Jacobian
```

L has no target and no scale of its own: its gradient at v measures how strongly the outputs answer to v. Only those
outputs count that no other output goes beyond: a cache or a hidden state that the model returns as well would let
gradient in halfway up the stream. Variances are over all elements of a value, batch included; norms are L2. What a
branch or a skip adds to the join is taken with its scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rescompile.blocks import Block, Report
from rescompile.costs import trained_parameters
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

Term = tuple[Value, float]  # a value and its factor in a sum


@dataclass(frozen=True, slots=True)
class Signal:
    """Mean and population variance over all elements of a value, and how many they are."""

    mean: float
    variance: float
    elements: int

    @property
    def mean_square(self) -> float:
        """E[v²] = variance + mean²."""
        return self.variance + self.mean**2

    def scaled(self, factor: float) -> Signal:
        """Of the value times a number."""
        return Signal(self.mean * factor, self.variance * factor**2, self.elements)


@dataclass(frozen=True, slots=True)
class BlockFlow:
    """One block: signals at its fork, its join, and of what branch and skip bring to the join; gradient norms.

    None is what there is not: no branch of its own in a fused operation, no gradient that reaches the block, no trained
    parameter in its branch. A parameter that several blocks share counts in each, with its whole gradient.
    """

    block: Block
    fork: Signal | None = None
    join: Signal | None = None
    branch: Signal | None = None
    skip: Signal | None = None
    fork_gradient: float | None = None
    join_gradient: float | None = None
    parameter_gradient: float | None = None

    @property
    def share(self) -> float | None:
        """Variance of the branch over that of the skip."""
        return None if self.branch is None or self.skip is None else _over(self.branch.variance, self.skip.variance)

    def to_dict(self) -> dict[str, Any]:
        """As in `inspect --gradients --json`."""
        signals = {"fork": self.fork, "join": self.join, "branch": self.branch, "skip": self.skip}
        variance = {name: None if signal is None else _plain(signal.variance) for name, signal in signals.items()}
        squares = {name: None if signal is None else _plain(signal.mean_square) for name, signal in signals.items()}
        return {
            "id": self.block.id,
            "fork": self.block.fork,
            "join": self.block.join,
            "variance": {**variance, "branch_over_skip": _plain(self.share)},
            "mean_square": squares,
            "gradient": {
                "fork": _plain(self.fork_gradient),
                "join": _plain(self.join_gradient),
                "parameters": _plain(self.parameter_gradient),
            },
        }


@dataclass(frozen=True)
class GradientFlow:
    """Forward variance and gradient norm of every block, from one forward and one backward pass."""

    model: str
    blocks: tuple[BlockFlow, ...]
    data: str  # where the inputs came from
    seed: int
    extents: Mapping[str, int]  # what symbolic extents were
    outputs: tuple[str, ...]  # those that the loss is made of
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[BlockFlow]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def stream(self) -> tuple[BlockFlow, ...]:
        """The blocks of the residual stream in order: the outermost ones that gradient reaches."""
        return tuple(
            flow
            for flow in self.blocks
            if flow.block.parent is None and flow.block.kind != "branches" and flow.join_gradient is not None
        )

    @property
    def ratio(self) -> float | None:
        """Gradient norm at the first block's join over that at the last's; None where no block has one."""
        stream = self.stream
        return _over(stream[0].join_gradient, stream[-1].join_gradient) if stream else None

    @property
    def stream_ratio(self) -> float | None:
        """Gradient norm where the stream begins, at the first fork, over that where it ends, at the last join."""
        stream = self.stream
        return _over(stream[0].fork_gradient, stream[-1].join_gradient) if stream else None

    @property
    def parameter_ratio(self) -> float | None:
        """Norm of the gradient for the first block's parameters over that for the last's."""
        trained = [flow.parameter_gradient for flow in self.stream if flow.parameter_gradient is not None]
        return _over(trained[0], trained[-1]) if trained else None

    @property
    def slope(self) -> float | None:
        """Slope of ln ‖∂L/∂join‖ against the number of the block; negative where later blocks have less gradient."""
        return _slope([_ln(flow.join_gradient) for flow in self.stream])

    @property
    def parameter_slope(self) -> float | None:
        """Slope of ln ‖∂L/∂θ‖ against the number of the block."""
        return _slope([_ln(flow.parameter_gradient) for flow in self.stream])

    @property
    def growth(self) -> float | None:
        """What E[x²] at the join gains from block to block: its slope against the number of the block."""
        return _slope([None if flow.join is None else flow.join.mean_square for flow in self.stream])

    def to_dict(self) -> dict[str, Any]:
        """As in `inspect --gradients --json`."""
        return {
            "inputs": self.data,
            "seed": self.seed,
            "extents": dict(self.extents),
            "outputs": list(self.outputs),
            "blocks": [flow.to_dict() for flow in self.blocks],
            "ratio": {
                "join": _plain(self.ratio),
                "stream": _plain(self.stream_ratio),
                "parameters": _plain(self.parameter_ratio),
            },
            "slope": {"join": _plain(self.slope), "parameters": _plain(self.parameter_slope)},
            "growth": _plain(self.growth),
            "notes": list(self.notes),
        }

    def plot(self, path: Any) -> None:
        """Write variances and gradient norms over the blocks as a picture, `.png` or `.svg`. Needs matplotlib."""
        from rescompile.plots import save

        save(self, path)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.markup import escape

        extents = "".join(f", {name} = {extent}" for name, extent in self.extents.items())
        yield escape(f"Gradient flow on {self.data}{extents}, of {', '.join(self.outputs) or 'no output'}")
        if self.blocks:
            yield self._table()
        if self.stream:
            ratios = (
                ("the stream's beginning to its end", self.stream_ratio),
                ("the first block's join to the last's", self.ratio),
                ("the first block's parameters to the last's", self.parameter_ratio),
            )
            yield "gradient norms: " + ", ".join(f"{what} {short(ratio)}" for what, ratio in ratios)
        for note in self.notes:
            yield escape(note)

    def _table(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        titles = ("", "join", "var fork", "var join", "var branch", "var skip", "branch/skip")
        for title in (*titles, "‖∂L/∂fork‖", "‖∂L/∂join‖", "‖∂L/∂θ‖"):
            table.add_column(title, justify="left" if title == "join" else "right", no_wrap=True)
        for flow in self.blocks:
            signals = (flow.fork, flow.join, flow.branch, flow.skip)
            cells = (
                f"{'·' if flow.block.parent is not None else ''}{flow.block.id}",
                flow.block.join,
                *(short(None if signal is None else signal.variance) for signal in signals),
                *map(short, (flow.share, flow.fork_gradient, flow.join_gradient, flow.parameter_gradient)),
            )
            table.add_row(*map(Text, cells))
        return table

    def __str__(self) -> str:
        from rescompile.plain_text import plain_text

        return plain_text(self)


def forward_signals(graph: Graph, values: Sequence[Value], inputs: Any = None, seed: int = 0) -> dict[Value, Signal]:
    """Mean and variance of values of the graph, from one forward pass; random inputs where there are none."""
    from rescompile.fx_gradients import forward_signals as measure

    return measure(graph, values, inputs, seed)


# ---- what to measure -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Probe:
    """Where one block is measured: the values at its ends, the terms that meet at the join, its trained parameters."""

    block: Block
    fork: Value | None
    join: Value | None
    skips: Sequence[Term] = ()
    branches: Sequence[Term] = ()
    parameters: Sequence[Value] = ()

    @property
    def ends(self) -> tuple[Value, ...]:
        """The fork and the join, where there are any."""
        return tuple(value for value in (self.fork, self.join) if value is not None)

    @property
    def side_by_side(self) -> bool:
        """Whether the terms stand beside one another at the join, and are not added."""
        return self.block.join_op.kind is OpKind.CONCAT


def probes_of(graph: Graph, report: Report) -> list[Probe]:
    """One for each block whose ends are values of the graph itself."""
    own = set(graph.values)
    parameters = branch_parameters(graph, report)
    return [
        Probe(block, block.fork_value, join_of(block), *contributions(block), parameters[block.id])
        for block in report.blocks
        if block.fork_value in own and join_of(block) in own
    ]


def contributions(block: Block) -> tuple[list[Term], list[Term]]:
    """What the skip and what the branch bring to the join, each with its factor.

    The branch has none where the join is one operation that works itself (a fused one).
    """
    last = block.join_op
    skip = last.inputs[block.skip_index]
    if last.kind is OpKind.CONCAT:
        return [(skip, 1.0)] if skip is not None else [], [
            (value, 1.0) for index, value in enumerate(last.inputs) if value is not None and index != block.skip_index
        ]
    if last.kind is not OpKind.ADD:
        return [(skip, 1.0)] if skip is not None else [], []
    inner = {op for op in block.join_ops if op.kind is OpKind.ADD and op is not last}
    nested = skip is not None and skip.producer in inner
    ways = {block.fork_value, *(value for op in block.shortcut_ops for value in op.outputs)}
    skips: list[Term] = []
    branches: list[Term] = []
    pending: list[tuple[Op, float]] = [(last, 1.0)]
    while pending:
        op, factor = pending.pop()
        for index, (value, scale) in enumerate(zip(op.inputs, op.scales, strict=True)):
            if value is None:
                continue
            if value.producer is not None and value.producer in inner:
                pending.append((value.producer, factor * scale))
            elif value in ways if nested else op is last and index == block.skip_index:
                skips.append((value, factor * scale))
            else:
                branches.append((value, factor * scale))
    return skips, branches


def join_of(block: Block) -> Value:
    """The stream behind the block; a fused operation's output where it keeps the sum to itself."""
    return block.join_op.outputs[0] if block.join_value is None else block.join_value


def branch_parameters(graph: Graph, report: Report) -> dict[int, list[Value]]:
    """By block, the trained parameters that its branch reads, also through casts and views; nested blocks count."""
    trained = set(trained_parameters(graph))
    found: dict[int, list[Value]] = {}
    for block in report.blocks:
        parameters: dict[Value, None] = {}
        pending = [value for op in report.all_branch_ops(block) for value in op.operands if value.constant]
        seen = set(pending)
        while pending:
            value = pending.pop()
            if value in trained:
                parameters[value] = None
            elif value.producer is not None:
                fresh = [operand for operand in value.producer.operands if operand not in seen]
                seen.update(fresh)
                pending.extend(fresh)
        found[block.id] = list(parameters)
    return found


def final_outputs(graph: Graph, report: Report) -> list[int]:
    """Positions of the outputs that depend on a set of blocks to which no other output adds one."""
    joins = {op: block.id for block in report.blocks for op in block.join_ops}
    behind = [_joins_behind(value, joins) for value in graph.outputs]
    return [index for index, blocks in enumerate(behind) if not any(blocks < other for other in behind)]


def _joins_behind(value: Value, joins: Mapping[Op, int]) -> frozenset[int]:
    found: set[int] = set()
    pending, seen = [value], {value}
    while pending:
        op = pending.pop().producer
        if op is None:
            continue
        if op in joins:
            found.add(joins[op])
        for operand in op.operands:
            if operand not in seen:
                seen.add(operand)
                pending.append(operand)
    return frozenset(found)


def pooled(parts: Sequence[Signal]) -> Signal | None:
    """Of several values side by side."""
    total = sum(part.elements for part in parts)
    if not total:
        return None
    mean = sum(part.mean * part.elements for part in parts) / total
    square = sum(part.mean_square * part.elements for part in parts) / total
    return Signal(mean, max(square - mean**2, 0.0), total)


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None or b == 0 else a / b


def _ln(number: float | None) -> float | None:
    return math.log(number) if number is not None and number > 0 and math.isfinite(number) else None


def _slope(heights: Sequence[float | None]) -> float | None:
    """Of the straight line through the numbers at 0, 1, 2, ..., by least squares; None counts as missing."""
    points = [(x, y) for x, y in enumerate(heights) if y is not None and math.isfinite(y)]
    if len(points) < 2:
        return None
    across, up = (sum(numbers) / len(points) for numbers in zip(*points, strict=True))
    slope: float = sum((x - across) * (y - up) for x, y in points) / sum((x - across) ** 2 for x, _ in points)
    return slope


def _plain(number: float | None) -> float | None:
    """As JSON, which has no infinity: None."""
    return None if number is None or not math.isfinite(number) else float(f"{number:.6g}")


def short(number: float | None) -> str:
    return "–" if number is None else f"{number:.3g}"
