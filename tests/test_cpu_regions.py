"""Fused regions on a processor: each form is one kernel, computes what torch does, and says why where there is none."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rescompile as rc
from rescompile.backends.compile import compile_graph
from rescompile.backends.kernels import Machine, Place, Program, RegionSpec, arguments, candidates, prim_func
from rescompile.backends.kernels.moves import Lanes, plain, regrouped, source, target
from rescompile.backends.region_draft import draft
from rescompile.fused_region import Region, Step, describe, parse
from rescompile.graph import Graph, Op, Value
from rescompile.kinds import OpKind
from rescompile.passes.fuse_joins import FuseJoins
from rescompile.rewriting import run_passes
from tests import test_fuse_norms, test_fuse_regions
from tests.graphs import Builder
from tests.residual_models import livened

tvm = pytest.importorskip("tvm")
K = OpKind
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}


def fused(model: nn.Module, x: Tensor, dynamic: Any = None) -> Graph:
    graph = rc.capture(model, (x,), dynamic=dynamic)
    return run_passes(graph, [FuseJoins()], check=False).graph


def regions(graph: Graph) -> list[Op]:
    return [op for op in graph if op.kind is K.FUSED_REGION]


def compiled(graph: Graph, x: Tensor) -> tuple[tuple[Tensor, ...], dict[str, list[str]], list[dict[str, Any]]]:
    """The outputs, the kernels that each operation calls, and all entries."""
    program = compile_graph(graph, threads=1, tuning=0)
    got = program(x)
    entries = program.explain()
    calls: dict[str, list[str]] = {}
    for entry in entries:
        for name in entry["ops"]:
            calls.setdefault(name, []).append(entry["kernel"])
    return got if isinstance(got, tuple) else (got,), calls, entries


def equal(got: tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...], tolerance: float) -> None:
    for one, other in zip(got, want if isinstance(want, tuple) else (want,), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert (one - other).abs().max() <= tolerance * other.abs().max()


# ---- regions that fusion makes -----------------------------------------------------------------------------------

TAILS = {
    "image": ["linear", "conv", "region", "pool", "conv", "conv", "written out", "conv"],
    "tokens": ["linear", "linear", "linear", "written out"],
}

WRITTEN_OUT = {
    "image": "a slice behind the contraction or norm drops or adds elements",
    "tokens": "a softplus, which no loop over elements computes",
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(TAILS))
def test_every_join_is_in_one_kernel(name: str, dtype: torch.dtype) -> None:
    model, x = test_fuse_regions.made(name, dtype)
    graph = fused(model, x)
    got, calls, entries = compiled(graph, x)
    equal(got, model(x), TOLERANCE[dtype])
    kernels = [[kernel for kernel in calls[op.name] if kernel != "in place"] for op in regions(graph)]
    assert kernels == [[kernel] for kernel in TAILS[name]]
    assert [entry["why"] for entry in entries if entry["kernel"] == "written out"] == [WRITTEN_OUT[name]]


NORMS = {
    "tokens": ["linear", "rows", "rows", "rows", "rows", "rows"],
    "images": ["rows", "rows", "rows", "conv", "conv", "rows"],
}


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", list(NORMS))
def test_every_norm_with_what_is_around_it_is_one_kernel(name: str, dtype: torch.dtype) -> None:
    model, x = test_fuse_norms.family(name, dtype)
    graph = fused(model, x)
    with torch.no_grad():
        want = model(x)
    got, calls, entries = compiled(graph, x)
    # One of the tokens' norms computes in float32 whatever the stream's type is.
    equal(got, want, 1e-6 if (name, dtype) == ("tokens", torch.float64) else TOLERANCE[dtype])
    assert [calls[op.name] for op in regions(graph)] == [[kernel] for kernel in NORMS[name]]
    if name == "images":
        # x comes in channels first, and five results go out so; between the blocks nothing is turned.
        turned = sum(entry["calls"] for entry in entries if entry["kernel"] in ("layout", "generated"))
        assert turned == 1 + len(got)


class Windows(nn.Module):
    """A shifted window's reverse: permutation and roll between the projection and the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.roll(x, (-1, -1), (1, 2)).reshape(2, 2, 4, 2, 4, 24).permute(0, 1, 3, 2, 4, 5).reshape(8, 16, 24)
        h = self.out(torch.tanh(self.mix(h))).reshape(2, 2, 2, 4, 4, 24).permute(0, 1, 3, 2, 4, 5)
        return x + torch.roll(h.reshape(2, 8, 8, 24), (1, 1), (1, 2))


class Products(nn.Module):
    """A product of two computed values with a factor and a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.relu(x[..., :7] @ x[..., 7:14].transpose(1, 2))
        return F.gelu(x + 0.3 * (weights @ self.value(x)))


class Up(nn.Module):
    """A transposed convolution whose windows lie side by side, one that overlaps with stride 1."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(6, 8, 2, stride=2), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.same = nn.ConvTranspose2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.silu(self.up(torch.relu(self.down(x))))
        return torch.relu(x + 0.5 * torch.sigmoid(self.same(x)))


class Excited(nn.Module):
    """A gate for each channel with the sum and its activation, both read on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gate, self.last = nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 6), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        s = x + h * torch.sigmoid(self.gate(h.mean((2, 3))))[:, :, None, None]
        return s + self.last(torch.relu(s))


class Shuffled(nn.Module):
    """Channels interleaved behind a convolution that writes half of them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        kept, worked = x.chunk(2, 1)
        joined = torch.cat([kept, torch.relu(self.conv(worked))], 1)
        return joined.reshape(x.shape[0], 2, 16, 5, 5).transpose(1, 2).reshape(x.shape[0], 32, 5, 5)


@pytest.mark.parametrize(
    ("model", "shape", "kernels"),
    [
        (Windows, (2, 8, 8, 24), ["linear"]),
        (Products, (2, 9, 24), ["product"]),
        (Up, (2, 6, 9, 8), ["conv", "conv"]),
        (Excited, (2, 6, 5, 5), ["region", "conv"]),
        (Shuffled, (2, 32, 5, 5), ["conv"]),
    ],
)
def test_contractions_gates_and_moves(model: type[nn.Module], shape: tuple[int, ...], kernels: list[str]) -> None:
    torch.manual_seed(0)
    made, x = livened(model()), torch.randn(shape)
    if model is Up:
        x = x[:, :, :8]
    graph = fused(made, x.contiguous())
    got, calls, _ = compiled(graph, x.contiguous())
    with torch.no_grad():
        equal(got, made(x), 1e-5)
    found = [calls[op.name] for op in graph if op.kind.value in ("fused_region", "fused_conv")]
    assert found == [[kernel] for kernel in kernels]


def test_rows_may_be_of_any_number() -> None:
    torch.manual_seed(0)
    parts = [test_fuse_norms.LayerScale(), test_fuse_norms.Sandwich(), test_fuse_norms.Apart()]
    model = livened(test_fuse_norms.Several([*parts]))
    x = torch.randn(3, 5, test_fuse_norms.C)
    graph = fused(model, x, ({0: torch.export.Dim("N", min=1, max=64)},))
    program = compile_graph(graph, threads=1, tuning=0)
    kernels = Counter(entry["kernel"] for entry in program.explain())
    assert kernels["rows"] >= 4
    assert not kernels["written out"]
    for batch in (1, 3, 17):
        x = torch.randn(batch, 5, test_fuse_norms.C)
        with torch.no_grad():
            equal(program(x), model(x), 1e-5)


# ---- what has no kernel ------------------------------------------------------------------------------------------


def drafted(b: Builder, ops: list[Value], *outputs: Value) -> str:
    b.graph.set_outputs(list(outputs))
    members = [value.producer for value in ops if value.producer is not None]
    inputs, attrs = describe(members, outputs, b.graph.scalar)
    region = parse(attrs["steps"])
    found = draft(region, inputs, outputs)
    return found if isinstance(found, str) else found.form


def test_a_contraction_with_known_weights_has_a_kernel_and_one_with_computed_weights_none() -> None:
    b = Builder()
    x = b.input(4, 8)
    known = b.linear(x, 8)
    assert drafted(b, [known, total := b.add(known, x)], total) == "contraction"
    b = Builder()
    x = b.input(4, 8)
    computed = b.op(K.LINEAR, x, b.input(8, 8), shape=(4, 8))
    assert "weights of the linear" in drafted(b, [computed, total := b.add(computed, x)], total)


def test_two_contractions_are_no_one_kernel() -> None:
    b = Builder()
    x = b.input(4, 8)
    one, two = b.linear(x, 8), b.linear(x, 8)
    assert "two contractions" in drafted(b, [one, two, total := b.add(one, two)], total)


def test_norms_over_different_rows_are_no_one_kernel() -> None:
    b = Builder()
    x = b.input(4, 6, 8)
    one = b.op(K.LAYER_NORM, x, shape=(4, 6, 8), axis=2)
    two = b.op(K.LAYER_NORM, total := b.add(one, x), shape=(4, 6, 8), axis=1)
    assert "different rows" in drafted(b, [one, total, two], two)
    b = Builder()
    x = b.input(4, 6, 8)
    one = b.op(K.LAYER_NORM, x, shape=(4, 6, 8), axis=2)
    two = b.op(K.LAYER_NORM, total := b.add(one, x), shape=(4, 6, 8), axis=2)
    assert drafted(b, [one, total, two], two) == "rows"


def test_moves_want_known_extents() -> None:
    b = Builder()
    x = b.input("N", 6, 8)
    turned = b.op(K.PERMUTE, x, shape=("N", 8, 6), perm=(0, 2, 1))
    assert "dynamic" in drafted(b, [turned, out := b.relu(turned)], out)
    assert drafted(b, [out := b.relu(b.add(x, x))], out) == "elements"


# ---- the arithmetic ----------------------------------------------------------------------------------------------

UNARY: dict[OpKind, Any] = {
    K.NEG: torch.neg,
    K.ABS: torch.abs,
    K.EXP: torch.exp,
    K.SQRT: torch.sqrt,
    K.LOG: torch.log,
    K.RSQRT: torch.rsqrt,
    K.RECIPROCAL: torch.reciprocal,
    K.ERF: torch.erf,
    K.FLOOR: torch.floor,
    K.CEIL: torch.ceil,
    K.ROUND: torch.round,
    K.SIGN: torch.sign,
    K.RELU: torch.relu,
    K.LEAKY_RELU: F.leaky_relu,
    K.ELU: F.elu,
    K.GELU: F.gelu,
    K.SILU: F.silu,
    K.SIGMOID: torch.sigmoid,
    K.TANH: torch.tanh,
    K.HARDSIGMOID: F.hardsigmoid,
    K.HARDSWISH: F.hardswish,
    K.SIN: torch.sin,
    K.COS: torch.cos,
}
BINARY: dict[OpKind, Any] = {
    K.MUL: torch.mul,
    K.DIV: torch.div,
    K.MAXIMUM: torch.maximum,
    K.MINIMUM: torch.minimum,
    K.POW: lambda a, b: torch.pow(a.abs(), b),
}
POSITIVE = (K.SQRT, K.LOG, K.RSQRT)


@pytest.mark.parametrize("kind", [*UNARY, *BINARY], ids=lambda kind: kind.value)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_elements_of_every_kind(dtype: str, kind: OpKind) -> None:
    torch.manual_seed(0)
    x, y = (torch.randn(133, dtype=getattr(torch, dtype)) * 3 for _ in range(2))
    first = 2 if kind in POSITIVE or kind is K.POW else 0
    given = x.abs() if first else x
    steps = (Step(K.ABS, (0,)), Step(kind, (first, 1) if kind in BINARY else (first,)))
    want = BINARY[kind](given, y) if kind in BINARY else UNARY[kind](given)
    place = Place.plain((133,), dtype)
    program = Program(Region(2, steps, (3,)).text(), (place, place), (place,), (((133,), dtype),) * 2)
    spec = RegionSpec(program, 3, dtype=dtype)
    machine = Machine.host(threads=1)
    tile = candidates(spec, machine)[0]
    built = tvm.compile(tvm.IRModule({"k": prim_func(spec, tile, "k")}), target=machine.tvm_target())
    tensors = [tvm.runtime.tensor(a) for a in (x.numpy(), y.numpy(), np.full(133, np.nan, dtype))]
    assert len(arguments(spec, tile)) == len(tensors)
    built["k"](*tensors)
    tolerance = {"float32": 2e-6, "float64": 1e-14}[dtype]
    got = torch.from_numpy(tensors[-1].numpy())
    torch.testing.assert_close(got, want, rtol=tolerance * 10, atol=tolerance)


def test_a_logarithm_at_its_edges() -> None:
    place, step = Place.plain((8,), "float32"), Step(K.LOG, (0,))
    program = Program(Region(1, (step,), (1,)).text(), (place,), (place,), (((8,), "float32"),))
    machine = Machine.host(threads=1)
    spec = RegionSpec(program, 1)
    tile = candidates(spec, machine)[0]
    built = tvm.compile(tvm.IRModule({"k": prim_func(spec, tile, "k")}), target=machine.tvm_target())
    x = np.array([0.0, -1.0, np.inf, np.nan, 1.0, 2e-38, 3e38, 0.5], np.float32)
    got = tvm.runtime.tensor(np.zeros(8, np.float32))
    built["k"](tvm.runtime.tensor(x), got)
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(got.numpy(), np.log(x), rtol=1e-6, atol=1e-7)


RESHAPES = [
    ((64, 4, 32), (64, 2, 2, 32)),
    ((64, 2, 2, 4), (1, 8, 8, 2, 2, 4)),
    ((1, 8, 2, 8, 2, 4), (1, 16, 16, 4)),
    ((1, 48, 4, 4), (1, 2, 24, 4, 4)),
    ((2, 3, 4), (24,)),
    ((24,), (2, 3, 4)),
    ((4,), (1, 4, 1)),
    ((6, 1, 4), (2, 12, 1)),
]


@pytest.mark.parametrize(("before", "after"), RESHAPES)
def test_index_of_a_reshape(before: tuple[int, ...], after: tuple[int, ...]) -> None:
    x = np.arange(int(np.prod(before))).reshape(before)
    y = x.reshape(after)
    for index in itertools.product(*map(range, before)):
        assert y[regrouped(before, after, index)] == x[index]


def test_index_of_a_lane_that_a_split_axis_does_not_part() -> None:
    for base, lane in itertools.product(range(0, 32, 4), range(4)):
        whole = regrouped((32,), (2, 16), (base + lane,))
        parted = regrouped((32,), (2, 16), (Lanes(base, lane, 4),))
        assert tuple(plain(i) for i in parted) == whole


@pytest.mark.parametrize(
    ("kind", "attrs", "move"),
    [
        (K.PERMUTE, {"perm": (2, 0, 1)}, lambda x: x.transpose(2, 0, 1)),
        (K.ROLL, {"axes": (0, 2), "shifts": (1, -2)}, lambda x: np.roll(x, (1, -2), (0, 2))),
        (K.FLIP, {"axes": (1,)}, lambda x: np.flip(x, 1)),
    ],
)
def test_index_of_a_move_and_back(kind: OpKind, attrs: dict[str, Any], move: Any) -> None:
    x = np.arange(60).reshape(3, 4, 5)
    y = move(x)
    for index in itertools.product(*map(range, x.shape)):
        assert y[target(kind, attrs, x.shape, y.shape, index)] == x[index]
    for index in itertools.product(*map(range, y.shape)):
        where, tests = source(kind, attrs, x.shape, y.shape, index)
        assert x[where] == y[index]
        assert not tests
