"""Measuring gradient flow: one forward and one backward pass of a graph's twin."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from rescompile.blocks import Report
from rescompile.errors import RescompileError
from rescompile.fx_twin import Data, Twin, twin
from rescompile.gradients import (
    BlockFlow,
    GradientFlow,
    Probe,
    Signal,
    Term,
    final_outputs,
    pooled,
    probes_of,
)
from rescompile.graph import Graph, Value
from rescompile.verify import make_inputs

Inputs: TypeAlias = Mapping[str, Data] | Sequence[Data] | Data
_BATCH, _LENGTH = 2, 32  # what symbolic extents are in random inputs: the first of an input, and all others


def measure(graph: Graph, report: Report, inputs: Inputs | None = None, seed: int = 0) -> GradientFlow:
    """The gradient flow of a graph on `inputs`, random ones of its shapes where there are none.

    RescompileError when the graph cannot be run in torch, or when no gradient leads from its outputs to its blocks.
    """
    arrays, data, extents = example_arrays(graph, inputs, seed)
    probes = probes_of(graph, report)
    if not probes:
        notes = ("There is no residual block, and so no stream to follow.",)
        return GradientFlow(report.model, (), data, seed, extents, (), notes)
    names, flows = run_probes(twin(graph), probes, arrays, final_outputs(graph, report), seed)
    return GradientFlow(report.model, flows, data, seed, extents, names, notes_on(flows, len(report.blocks)))


def run_probes(
    module: Twin,
    probes: Sequence[Probe],
    inputs: Mapping[str, Data],
    outputs: Sequence[int],
    seed: int,
    names: Sequence[str] = (),
) -> tuple[tuple[str, ...], tuple[BlockFlow, ...]]:
    """Names of the outputs that the gradient came from, of those at the positions `outputs`; and what probes found.

    `names`: of all outputs, in the place of their own; with the seed they fix the direction of the loss.
    """
    run = _Run(module, probes)
    found = run.forward(inputs)
    if len(names) == len(found):
        found = [(name, tensor) for name, (_, tensor) in zip(names, found, strict=True)]
    used = run.backward(found, outputs, seed)
    return used, tuple(run.flow(probe) for probe in probes)


def forward_signals(
    graph: Graph, values: Sequence[Value], inputs: Inputs | None = None, seed: int = 0
) -> dict[Value, Signal]:
    """Mean and variance of values of the graph, from one forward pass; random inputs where there are none."""
    arrays, _, _ = example_arrays(graph, inputs, seed)
    with torch.no_grad():
        return twin(graph).run(arrays, values, lambda _, tensor: _signal(tensor))[1]


# ---- inputs ----------------------------------------------------------------------------------------------------------


def example_arrays(graph: Graph, inputs: Inputs | None, seed: int) -> tuple[dict[str, Data], str, dict[str, int]]:
    """Inputs by name, in words what they are, and what symbolic extents count as in random ones."""
    if inputs is not None:
        return _named(graph, inputs), "the given inputs", {}
    extents = _extents(graph)
    return _random_inputs(graph, seed, extents), f"random inputs, seed {seed}", extents


def _extents(graph: Graph) -> dict[str, int]:
    found: dict[str, int] = {}
    for axis, dim in ((axis, dim) for value in graph.inputs for axis, dim in enumerate(value.shape or ())):
        if isinstance(dim, str) and dim.isidentifier():
            found[dim] = min(_BATCH if axis == 0 else _LENGTH, found.get(dim, _LENGTH))
    return found


def _random_inputs(graph: Graph, seed: int, extents: Mapping[str, int]) -> dict[str, Data]:
    arrays = make_inputs(graph, lambda rng, shape: rng.standard_normal(shape), seed, extents)
    if arrays is None:
        unknown = next(value.name for value in graph.inputs if value.shape is None or value.dtype is None)
        raise RescompileError(
            f"There are no random inputs for this model, because shape or dtype of '{unknown}' is not known: give data."
        )
    return dict(arrays)


def _named(graph: Graph, inputs: Inputs) -> dict[str, Data]:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    given = [inputs] if isinstance(inputs, Tensor | np.ndarray) else list(inputs)
    if len(given) != len(graph.inputs):
        takes = ", ".join(value.name for value in graph.inputs)
        raise RescompileError(f"The model takes {len(graph.inputs)} inputs ({takes}), and {len(given)} were given.")
    return {value.name: data for value, data in zip(graph.inputs, given, strict=True)}


# ---- the two passes --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Sum:
    """Terms whose sum is measured once all of them have been made."""

    terms: Sequence[Term]
    tensors: dict[Value, Tensor] = field(default_factory=dict)
    signal: Signal | None = None

    def add(self, value: Value, tensor: Tensor) -> None:
        self.tensors[value] = tensor.detach()
        if len(self.tensors) == len({value for value, _ in self.terms}):
            self.signal = _signal(sum(self.tensors[value].float() * scale for value, scale in self.terms))
            self.tensors.clear()


class _Run:
    """Takes down signals while values are made, and norms while gradients come back; keeps no tensor of either."""

    def __init__(self, module: Twin, probes: Sequence[Probe]) -> None:
        self.module = module
        self.ends = {value for probe in probes for value in probe.ends}
        self.terms = {value for probe in probes for value, _ in (*probe.skips, *probe.branches)}
        self.signals: dict[Value, Signal] = {}
        self.norms: dict[Value, Tensor] = {}
        self.sums: dict[tuple[Probe, int], _Sum] = {}
        self.waiting: dict[Value, list[_Sum]] = {}
        for probe in probes:
            for side, terms in enumerate((probe.skips, probe.branches)):
                if len(terms) > 1 and not probe.side_by_side:
                    total = self.sums[probe, side] = _Sum(terms)
                    for value in {value for value, _ in terms}:
                        self.waiting.setdefault(value, []).append(total)
        self.trained: dict[Value, Tensor] = {}
        for value in {value for probe in probes for value in probe.parameters}:
            tensor = module.tensor(value)
            if tensor.requires_grad:
                self.trained[value] = tensor
        # Gradients for what no block's branch holds are not asked for.
        module.requires_grad_(False)
        for value, tensor in self.trained.items():
            tensor.requires_grad_()
            tensor.register_post_accumulate_grad_hook(self._taker(value))  # type: ignore[no-untyped-call]

    def _taker(self, value: Value) -> Callable[[Tensor], None]:
        def take(tensor: Tensor) -> None:
            if tensor.grad is not None:
                self.norms[value] = _norm(tensor.grad)
                tensor.grad = None

        return take

    def forward(self, inputs: Mapping[str, Data]) -> list[tuple[str, Tensor]]:
        """The outputs by name."""
        with torch.enable_grad():
            return list(self.module.run(inputs, self.ends | self.terms, self._see)[0].items())

    def _see(self, value: Value, tensor: Tensor) -> None:
        if not tensor.is_floating_point():
            return
        self.signals[value] = _signal(tensor)
        for total in self.waiting.get(value, ()):
            total.add(value, tensor)
        if value in self.ends and tensor.requires_grad and value not in self.trained:
            note = partial(self._note, value)
            tensor.register_hook(note)  # type: ignore[no-untyped-call]

    def _note(self, value: Value, gradient: Tensor) -> None:
        self.norms[value] = _norm(gradient)

    def backward(self, outputs: Sequence[tuple[str, Tensor]], positions: Sequence[int], seed: int) -> tuple[str, ...]:
        """Names of the outputs that the gradient came from."""
        used: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in (outputs[position] for position in positions):
            if tensor.is_floating_point() and tensor.requires_grad:
                used.setdefault(id(tensor), (name, tensor))
        if not used:
            listed = ", ".join(name for name, _ in outputs)
            raise RescompileError(
                f"There is no gradient: none of the model's outputs ({listed}) is a float that depends on a residual "
                "block through operations that differentiate."
            )
        cotangents = [_cotangent(tensor, name, seed) for name, tensor in used.values()]
        torch.autograd.backward([tensor for _, tensor in used.values()], cotangents)
        return tuple(name for name, _ in used.values())

    # ---- what came of it -----------------------------------------------------------------------------------------

    def flow(self, probe: Probe) -> BlockFlow:
        gradients = [self.norms[value] for value in probe.parameters if value in self.norms]
        return BlockFlow(
            probe.block,
            None if probe.fork is None else self.signals.get(probe.fork),
            None if probe.join is None else self.signals.get(probe.join),
            self._side(probe, 1, probe.branches),
            self._side(probe, 0, probe.skips),
            self._norm_at(probe.fork),
            self._norm_at(probe.join),
            float(torch.linalg.vector_norm(torch.stack(gradients))) if gradients else None,
        )

    def _side(self, probe: Probe, side: int, terms: Sequence[Term]) -> Signal | None:
        total = self.sums.get((probe, side))
        if total is not None:
            return total.signal
        return pooled([self.signals[value].scaled(scale) for value, scale in terms if value in self.signals])

    def _norm_at(self, value: Value | None) -> float | None:
        norm = None if value is None else self.norms.get(value)
        return None if norm is None else float(norm)


def _signal(tensor: Any) -> Signal:
    variance, mean = torch.var_mean(tensor.detach().float(), correction=0)
    return Signal(float(mean), float(variance), tensor.numel())


def _norm(gradient: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(gradient.detach(), dtype=torch.float64)
    return norm.cpu()


def _cotangent(tensor: Tensor, name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    return torch.randn(tensor.shape, generator=generator).to(tensor)


def notes_on(flows: Sequence[BlockFlow], blocks: int) -> tuple[str, ...]:
    """What a reader of the numbers must know. `blocks`: how many there are, measured or not."""
    notes = []
    left = blocks - len(flows)
    if left:
        notes.append(f"{left} blocks lie in bodies of control flow, which are run as a whole: they are not measured.")
    unreached = [flow.block.join for flow in flows if flow.join_gradient is None]
    if unreached:
        notes.append(f"No gradient reaches {len(unreached)} blocks, the first of them at '{unreached[0]}'.")
    wild = [flow.block.join for flow in flows if not _finite(flow)]
    if wild:
        notes.append(f"{len(wild)} blocks have values or gradients that are not finite, the first at '{wild[0]}'.")
    return tuple(notes)


def _finite(flow: BlockFlow) -> bool:
    numbers = [flow.fork_gradient, flow.join_gradient, flow.parameter_gradient]
    numbers += [signal.variance for signal in (flow.fork, flow.join, flow.branch, flow.skip) if signal is not None]
    return all(number is None or np.isfinite(number) for number in numbers)
