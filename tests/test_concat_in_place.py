"""Concatenations written in place: who shares a buffer, who does not and why, and that the numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rescompile as rc
from rescompile.backends.compile import compile_graph
from rescompile.backends.dense_buffers import Shared, Slot, share
from rescompile.backends.program import Program
from rescompile.graph import Graph, Value
from rescompile.kinds import OpKind
from tests.graphs import Builder
from tests.residual_models import livened
from tests.test_fuse_concat import Dense

tvm = pytest.importorskip("tvm")
K = OpKind


def concat(b: Builder, *parts: Value, axis: int = 1) -> Value:
    first = parts[0].shape or ()
    extent = sum(int((part.shape or ())[axis]) for part in parts)
    return b.op(K.CONCAT, *parts, shape=(*first[:axis], extent, *first[axis + 1 :]), axis=axis)


def shared(graph: Graph, *outputs: Value, unable: str = "") -> Shared:
    """With kernels for everything but the operation named `unable`."""
    graph.set_outputs(list(outputs))

    def able(op: Any, _: Value) -> str:
        return "it has no kernel" if op.name == unable else ""

    return share(graph, able, able, lambda value: (value.rank or 0) == 4)


def test_concatenations_of_a_dense_block_are_prefixes_of_one_buffer() -> None:
    b = Builder()
    x = b.relu(b.input(2, 4, 5, 5))
    one = b.conv(x, 3)
    first = concat(b, x, one)
    two = b.conv(b.relu(first), 3)
    second = concat(b, x, one, two)
    three = b.conv(second, 3)
    last = concat(b, second, three)
    found = shared(b.graph, b.relu(last))
    assert found.buffers[0].shape == (2, 13, 5, 5)
    assert len(found.buffers) == 1
    places = {x: (0, 4), one: (4, 3), two: (7, 3), three: (10, 3), first: (0, 7), second: (0, 10), last: (0, 13)}
    assert {value: (slot.start, slot.extent) for value, slot in found.slots.items()} == places
    assert sum(join.saved for join in found.joins.values()) == 2 * 4 * 50 * (7 + 10 + 13)
    assert not found.refused


def test_an_input_is_copied_into_its_slice() -> None:
    b = Builder()
    x = b.input(2, 4, 5, 5)
    joined = concat(b, x, y := b.conv(x, 3))
    found = shared(b.graph, b.relu(joined))
    (join,) = found.joins.values()
    assert join.copied == {x: f"'{x.name}' is an input of the graph"}
    assert found.copies == {0: [(x, 0)]}
    assert found.slots[y] == Slot(0, 4, 3)
    assert join.saved == 2 * 4 * 50 * 3


def test_what_nobody_writes_in_place_is_a_copy() -> None:
    b = Builder()
    x, y = b.input(2, 4, 5, 5), b.input(2, 4, 5, 5)
    found = shared(b.graph, b.relu(concat(b, x, y)))
    assert not found.slots
    assert next(iter(found.refused.values())) == f"'{x.name}' is an input of the graph"


def test_an_output_of_the_graph_has_a_buffer_of_its_own() -> None:
    b = Builder()
    x = b.input(2, 4, 5, 5)
    one, two = b.conv(x, 3), b.conv(x, 3)
    found = shared(b.graph, b.relu(concat(b, one, two)), one)
    (join,) = found.joins.values()
    assert list(join.copied) == [one]
    assert "output of the graph" in join.copied[one]


def test_a_value_that_is_in_it_twice_is_copied() -> None:
    b = Builder()
    x = b.input(2, 4, 5, 5)
    one, two = b.conv(x, 3), b.conv(x, 3)
    found = shared(b.graph, b.relu(concat(b, one, two, one)))
    (join,) = found.joins.values()
    assert list(join.copied) == [one]
    assert "twice" in join.copied[one]


@pytest.mark.parametrize("place", ["writer", "reader"])
def test_an_operation_without_a_kernel_for_slices_keeps_its_value_apart(place: str) -> None:
    b = Builder()
    x = b.input(2, 4, 5, 5)
    one, two = b.conv(x, 3), b.conv(x, 3)
    read = b.relu(one)
    name = (one if place == "writer" else read).producer
    assert name is not None
    found = shared(b.graph, b.relu(concat(b, one, two)), b.relu(read), unable=name.name)
    (join,) = found.joins.values()
    assert list(join.copied) == [one]
    assert "it has no kernel" in join.copied[one]


def test_one_value_lies_at_one_place() -> None:
    b = Builder()
    x = b.input(2, 4, 5, 5)
    one, two, three = b.conv(x, 3), b.conv(x, 3), b.conv(x, 3)
    larger = concat(b, one, two, three)
    other = concat(b, two, one)
    found = shared(b.graph, b.relu(larger), b.relu(other))
    assert len(found.joins) <= 1
    assert all("another" in reason for reason in found.refused.values())


def test_a_run_in_the_middle_of_a_buffer_is_read_there() -> None:
    b = Builder()
    x = b.input(2, 4, 5, 5)
    one, two, three = b.conv(x, 3), b.conv(x, 3), b.conv(x, 3)
    found = shared(b.graph, b.relu(concat(b, one, two, three)), b.relu(middle := concat(b, two, three)))
    assert found.slots[middle] == Slot(0, 3, 6)


def test_a_dynamic_extent_is_not_shared() -> None:
    b = Builder()
    x = b.input("N", 4, 5, 5)
    joined = b.op(K.CONCAT, b.relu(x), b.relu(x), shape=("N", 8, 5, 5), axis=1)
    assert next(iter(shared(b.graph, b.relu(joined)).refused.values())) == "an extent is dynamic"


# ---- compiled ------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A U-Net of two levels; its upper skip is read by the next level, too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.last = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(torch.cat([x, F.relu(self.up(F.relu(self.down(x))))], 1))


class Tokens(nn.Module):
    """A dense block of linears; `axis` 1: of tokens beside each other."""

    def __init__(self, axis: int = -1) -> None:
        super().__init__()
        self.axis = axis
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16 if axis == 1 else 40, 4)
        self.layers = nn.ModuleList(
            nn.Linear(16 if axis == 1 else 16 + 8 * i, 16 if axis == 1 else 8) for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.first(x))
        for layer in self.layers:
            x = torch.cat([x, F.relu(layer(x[:, :2] if self.axis == 1 else x))], self.axis)
        return self.last(x)


class Inception(nn.Module):
    """Branches of different depth, a pool among them; one is read by another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.three = (
            nn.Conv2d(4, 12, 3, padding=1),
            nn.Conv2d(12, 8, 1),
            nn.Conv2d(12, 8, 3, padding=1),
        )
        self.five, self.last = nn.Conv2d(8, 8, 5, padding=2), nn.Conv2d(36, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        three = F.relu(self.three(x))
        parts = [F.relu(self.one(x)), three, F.relu(self.five(three)), F.max_pool2d(x, 3, 1, 1)]
        return self.last(torch.cat(parts, 1))


class Reread(nn.Module):
    """Convolutions of 3×3 that read prefixes themselves, and a skip from the first slice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(40, 16, 1)
        self.layers = nn.ModuleList(nn.Conv2d(16 + 8 * i, 8, 3, padding=1) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(self.first(x))]
        for layer in self.layers:
            parts.append(F.relu(layer(torch.cat(parts, 1) if len(parts) > 1 else parts[0])))
        return self.last(torch.cat(parts, 1)) + parts[0]


MODELS: dict[str, tuple[nn.Module, tuple[int, ...], int]] = {
    "dense": (Dense(), (2, 4, 8, 8), 3),
    "read twice": (Dense(tap=True), (2, 4, 8, 8), 3),
    "encoder": (Encoder(), (2, 3, 8, 8), 1),
    "tokens": (Tokens(), (2, 5, 16), 3),
    "tokens beside": (Tokens(1), (2, 3, 16), 3),
    "inception": (Inception(), (2, 4, 9, 9), 1),
    "read again": (Reread(), (3, 3, 10, 10), 3),
}


@pytest.mark.parametrize(("name", "fuse"), [*((name, False) for name in MODELS), ("dense", True), ("tokens", True)])
def test_no_concatenation_is_copied_and_the_numbers_stay(name: str, fuse: bool) -> None:
    torch.manual_seed(0)
    model, shape, count = MODELS[name]
    model, x = livened(model), torch.randn(shape)
    graph = rc.capture(model, (x,))
    if fuse:
        graph = rc.rewrite(graph, ["fuse"], verify=False).graph
    program = compile_graph(graph, threads=1, tuning=0)
    with torch.no_grad():
        want = model(x)
    got = program(x)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert torch.equal(program(x), got)
    entries = program.explain()
    joins = [entry for entry in entries if entry["kernel"] == "in place"]
    # Fused, the block's norms read the parts themselves, and one concatenation is left.
    assert len(joins) == (1 if fuse and name == "dense" else count)
    assert sum(entry["bytes"] for entry in joins) > 0
    assert not [entry for entry in entries if "concat" in entry["name"]]


def test_double_precision_shares_too() -> None:
    torch.manual_seed(0)
    model, x = livened(Reread()).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    program = compile_graph(rc.capture(model, (x,)), threads=1, tuning=0)
    with torch.no_grad():
        want = model(x)
    assert (program(x) - want).abs().max() <= 1e-12 * want.abs().max()
    assert "in place" in {entry["kernel"] for entry in program.explain()}


def test_a_program_with_shared_buffers_can_be_kept(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = livened(Tokens()), torch.randn(2, 5, 16)
    program = compile_graph(rc.capture(model, (x,)), threads=1, tuning=0)
    again = Program.load(program.save(tmp_path / "tokens.rcp"))
    torch.testing.assert_close(again(x), program(x), rtol=0, atol=0)
