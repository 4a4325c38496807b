"""What computes a region of a GPU program: who wins, who must not, what is remembered, what is said of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("tvm")

from rescompile.backends.cuda import choice_records, composed
from rescompile.backends.cuda.choice_records import Record, ShippedRecords, generators, read_shipped, write_shipped
from rescompile.backends.cuda.choose import STATIC_ORDER, KernelChoice, explained
from rescompile.backends.cuda.device import Timing, relative_gap, rotations
from rescompile.backends.cuda.targets import architecture
from rescompile.backends.kernels import AttentionSpec, NormSpec
from rescompile.backends.kernels.specs import Argument
from rescompile.errors import RescompileError
from tests.gpu_clock import FACTS, MadeUpDevice

LIMITS = architecture("sm_90")
SPEC = NormSpec(6, 8, "layer")
LIBRARY = "library norm"


@dataclass(frozen=True)
class Tile:
    """What the stand-in's kernel does wrong."""

    name: str
    error: float = 0.0


def family(*tiles: Tile, refusal: str = "", name: str = "rows") -> Any:
    """Kernels whose `prim_func` is a Python function."""

    def arguments(spec: NormSpec) -> list[Argument]:
        vector = (spec.width,)
        return [
            Argument("x", (spec.rows, spec.width), "float32"),
            Argument("weight", vector, "float32"),
            Argument("bias", vector, "float32"),
            Argument("y", (spec.rows, spec.width), "float32", output=True),
        ]

    def prim_func(spec: NormSpec, tile: Tile, _: str) -> Callable[..., None]:
        def run(x: Any, weight: Any, bias: Any, y: Any) -> None:
            if tile.name == "lazy":
                return
            if tile.name == "failing":
                raise RuntimeError("CUDA error: an illegal memory access")
            y.copy_(torch.nn.functional.layer_norm(x, (spec.width,), weight, bias, spec.eps) + tile.error)

        if tile.name == "unbuildable":
            raise RescompileError("no")
        return run

    return SimpleNamespace(
        __name__=f"here.{name}",
        refusal=lambda spec, limits: refusal,
        candidates=lambda spec, limits: list(tiles),
        arguments=arguments,
        prim_func=prim_func,
    )


FIRST, SECOND = Tile("first"), Tile("second")


def chosen(
    device: Any, folder: Path, *families: Any, spec: Any = SPEC, captured: bool = True, **options: Any
) -> tuple[Any, KernelChoice]:
    choice = KernelChoice(LIMITS)
    choice.pick(spec, families)
    options.setdefault("shipped", [])
    choice.choose(device, lambda function: function, folder, captured=captured, **options)
    return choice.choices[spec], choice


def test_the_fastest_candidate_wins_and_all_times_are_told(tmp_path: Path) -> None:
    found, _ = chosen(MadeUpDevice([3e-6, 1e-6, 2e-6]), tmp_path, family(FIRST, SECOND))
    assert found.candidate.tile == SECOND
    assert found.seconds == 1e-6
    told = explained(found)
    assert [entry["tile"] for entry in told["tried"]] == [f"rows {FIRST}", f"rows {SECOND}", LIBRARY]
    assert [entry["microseconds"] for entry in told["tried"]] == [3, 1, 2]
    assert told["chosen"] == "fastest of 3 timed on made up"


def test_a_library_wins_where_it_is_faster(tmp_path: Path) -> None:
    found, _ = chosen(MadeUpDevice([3e-6, 2e-6]), tmp_path, family(FIRST))
    assert found.candidate.label == LIBRARY
    with pytest.raises(RescompileError, match="no kernel that is compiled"):
        found.candidate.prim_func(SPEC, "f")


def test_a_librarys_call_costs_the_processor_something_where_no_graph_is_replayed(tmp_path: Path) -> None:
    times = [Timing(3e-6, host=1e-6), Timing(2e-6, host=9e-6)]
    for captured, winner in ((True, LIBRARY), (False, f"rows {FIRST}")):
        device = MadeUpDevice(lambda index: times[index])
        folder = tmp_path / str(captured)
        assert chosen(device, folder, family(FIRST), captured=captured)[0].candidate.label == winner
    assert Timing(1e-6, host=5e-6, captured=False).cost(captured=True) == 5e-6


@pytest.mark.parametrize(
    ("tile", "why"),
    [
        (Tile("wrong", error=0.1), "its 'y' differs from the float64 reference by"),
        (Tile("lazy"), "differs from the float64 reference by inf"),
        (Tile("failing"), "does not run: CUDA error"),
        (Tile("unbuildable"), "does not build"),
    ],
)
def test_what_is_wrong_never_wins_and_says_why(tmp_path: Path, tile: Tile, why: str) -> None:
    # The first in static order, and the fastest.
    found, _ = chosen(MadeUpDevice([2e-6, 3e-6]), tmp_path, family(tile, SECOND))
    assert found.candidate.tile == SECOND
    refused = dict(found.refused)
    assert list(refused) == [f"rows {tile}"]
    assert why in refused[f"rows {tile}"]


def test_where_torch_does_not_know_the_spec_the_first_that_runs_is_the_judge(tmp_path: Path) -> None:
    class Unknown(NormSpec):
        pass

    spec = Unknown(6, 8)
    kernels = family(Tile("failing"), FIRST, Tile("wrong", error=0.1), SECOND)
    found, _ = chosen(MadeUpDevice([2e-6, 1e-6]), tmp_path, kernels, spec=spec)
    assert found.candidate.tile == SECOND
    assert len(found.refused) == 2


def test_a_candidate_that_fails_while_it_is_timed_has_no_time(tmp_path: Path) -> None:
    device = MadeUpDevice(lambda index: None if index == 0 else Timing(1e-6))
    found, _ = chosen(device, tmp_path, family(FIRST, SECOND))
    assert [label for label, _ in found.tried] == [f"rows {SECOND}", LIBRARY]


def test_without_a_gpu_the_first_is_taken_and_this_is_said(tmp_path: Path) -> None:
    found, choice = chosen(None, tmp_path, family(FIRST, SECOND))
    assert found.candidate.tile == FIRST
    assert explained(found) == {"chosen": STATIC_ORDER, "tried": [], "microseconds": None}
    assert not list(tmp_path.iterdir())
    assert not choice.choose(None, lambda function: function, tmp_path, shipped=[])


def test_a_family_that_refuses_is_passed_over_and_all_refusing_is_an_error(tmp_path: Path) -> None:
    found, _ = chosen(None, tmp_path, family(FIRST, refusal="too wide", name="wgmma"), family(SECOND))
    assert found.candidate.tile == SECOND
    with pytest.raises(RescompileError, match=r"No kernel computes .* on sm_90: too wide"):
        KernelChoice(LIMITS).pick(SPEC, [family(FIRST, refusal="too wide")])


def test_a_choice_is_remembered_for_this_gpu_and_no_other(tmp_path: Path) -> None:
    device = MadeUpDevice([3e-6, 1e-6, 2e-6])
    kernels = family(FIRST, SECOND)
    first, _ = chosen(device, tmp_path, kernels)
    again, _ = chosen(device, tmp_path, kernels)
    assert device.timed == 1
    assert again.candidate == first.candidate
    assert again.tried == first.tried
    assert again.reason == "remembered from this GPU"
    other = MadeUpDevice([1e-6, 3e-6, 2e-6], {**FACTS, "driver": "1"})
    assert chosen(other, tmp_path, kernels)[0].candidate.tile == FIRST
    assert len(list(tmp_path.iterdir())) == 2


def test_a_remembered_candidate_that_is_none_gives_way_to_the_next(tmp_path: Path) -> None:
    device = MadeUpDevice([3e-6, 1e-6, 2e-6])
    chosen(device, tmp_path, family(FIRST, SECOND))
    assert chosen(device, tmp_path, family(FIRST))[0].candidate.label == LIBRARY
    assert device.timed == 1


def test_damaged_records_are_ignored_with_a_warning_and_replaced(tmp_path: Path) -> None:
    device = MadeUpDevice([3e-6, 1e-6, 2e-6])
    chosen(device, tmp_path, family(FIRST, SECOND))
    (file,) = tmp_path.iterdir()
    data = json.loads(file.read_text())
    for entry in data["records"].values():
        entry["candidate"] = "nobody"
    file.write_text(json.dumps(data))
    with pytest.warns(UserWarning, match="damaged"):
        chosen(device, tmp_path, family(FIRST, SECOND))
    assert device.timed == 2


def test_without_time_the_first_is_taken_and_not_recorded(tmp_path: Path) -> None:
    found, _ = chosen(MadeUpDevice([]), tmp_path, family(FIRST, SECOND), budget_s=0.0)
    assert found.candidate.tile == FIRST
    assert found.reason == "first by static order: no time left to measure"
    assert not list(tmp_path.iterdir())


def test_attention_is_composed_unless_a_library_is_faster(tmp_path: Path) -> None:
    spec = AttentionSpec(1, 2, 4, 4, 8, 0.5, dtype="float16")
    assert chosen(None, tmp_path, composed, spec=spec)[0].candidate.inline
    composed_fastest = MadeUpDevice(lambda index: Timing(1e-5 / (1 + index)))
    assert chosen(composed_fastest, tmp_path / "slow", composed, spec=spec)[0].candidate.inline
    composed_slowest = MadeUpDevice(lambda index: Timing(1e-6 * (1 + index)))
    assert chosen(composed_slowest, tmp_path / "fast", composed, spec=spec)[0].candidate.library is not None
    label = "library attention(backend=FLASH_ATTENTION)"
    record = Record(label, 1e-6, {label: 1e-6})
    write_shipped(tmp_path / "a.json", H200, {repr(spec): record}, "", {})
    choice = KernelChoice(LIMITS, libraries=True)
    choice.pick(spec, [composed])
    choice.choose(None, lambda function: function, tmp_path, shipped=read_shipped(tmp_path))
    assert choice.choices[spec].candidate.library is not None


# ---- records that come with the package -------------------------------------------------------------------------

H200 = {"device": "NVIDIA H200", "arch": "sm_90", "driver": "580"}
RECORD = Record(f"rows {SECOND}", 1e-6, {f"rows {SECOND}": 1e-6, f"rows {FIRST}": 2e-6, LIBRARY: 5e-7})


def shipped(folder: Path, kernels: str = "", facts: dict[str, str] = H200) -> list[ShippedRecords]:
    write_shipped(folder / "h200.json", facts, {repr(SPEC): RECORD}, kernels or generators(), {"tvm": "0"})
    return read_shipped(folder)


def test_a_shipped_record_is_used_where_no_gpu_is_and_says_where_it_comes_from(tmp_path: Path) -> None:
    found, _ = chosen(None, tmp_path, family(FIRST, SECOND), shipped=shipped(tmp_path))
    # The library was faster, and is no candidate where torch's libraries are not at hand.
    assert found.candidate.tile == SECOND
    assert found.reason.startswith("measured on NVIDIA H200, 20")
    assert len(found.tried) == 3


def test_a_shipped_record_of_other_kernels_says_so(tmp_path: Path) -> None:
    found, _ = chosen(None, tmp_path, family(FIRST, SECOND), shipped=shipped(tmp_path, "old"))
    assert found.reason.endswith("of other kernels than today's")


def test_timing_here_goes_before_a_shipped_record_and_own_records_before_both(tmp_path: Path) -> None:
    device = MadeUpDevice([1e-6, 3e-6, 2e-6], H200)
    for reason in ("fastest of 3 timed on NVIDIA H200", "remembered from this GPU"):
        found, _ = chosen(device, tmp_path / "own", family(FIRST, SECOND), shipped=shipped(tmp_path))
        assert found.candidate.tile == FIRST
        assert found.reason == reason


def test_a_shipped_record_stands_in_where_the_time_is_over(tmp_path: Path) -> None:
    device = MadeUpDevice([], H200)
    found, _ = chosen(device, tmp_path / "own", family(FIRST, SECOND), shipped=shipped(tmp_path), budget_s=0.0)
    assert found.candidate.label == LIBRARY


@pytest.mark.parametrize("other", [{"arch": "sm_80"}, {"spec": True}])
def test_a_shipped_record_of_another_architecture_or_spec_is_not_used(tmp_path: Path, other: dict[str, Any]) -> None:
    files = shipped(tmp_path, facts={**H200, **{k: v for k, v in other.items() if k != "spec"}})
    spec = replace(SPEC, rows=7) if "spec" in other else SPEC
    assert chosen(None, tmp_path, family(FIRST, SECOND), spec=spec, shipped=files)[0].reason == STATIC_ORDER


def test_a_shipped_record_of_another_device_is_not_used_where_one_is_at_hand(tmp_path: Path) -> None:
    found, _ = chosen(MadeUpDevice([]), tmp_path / "own", family(FIRST, SECOND), shipped=shipped(tmp_path), budget_s=0)
    assert "static order" in found.reason


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"schema": 1}', '{"schema": 2, "device": {}, "date": "", "versions": {}, "kernels": "", '
             '"records": {}}']
)  # fmt: skip
def test_a_damaged_shipped_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(RescompileError, match=r"GPU records in .*bad.json' are damaged"):
        read_shipped(tmp_path)


def test_the_packages_own_records_can_be_read() -> None:
    assert choice_records.SHIPPED.is_dir()
    for file in read_shipped():
        assert {"device", "arch", "driver"} <= set(file.device)


# ---- the clock --------------------------------------------------------------------------------------------------


def test_buffers_rotate_through_more_than_the_cache() -> None:
    assert rotations(1 << 20, 60 << 20) == 48
    assert rotations(8 << 20, 60 << 20) == 15
    assert rotations(1 << 30, 60 << 20) == 2


def test_a_gap_is_infinite_where_only_one_is_nan() -> None:
    nan, inf = float("nan"), float("inf")
    a, b = torch.tensor([1.0, nan]), torch.tensor([1.0, 2.0])
    assert relative_gap(a, b) == relative_gap(b, a) == inf
    assert relative_gap(a, a) == 0
    assert relative_gap(torch.tensor([1.0, inf]), torch.tensor([1.0, inf])) == 0
    assert relative_gap(torch.tensor([1.0, inf]), b) == inf
    assert relative_gap(torch.tensor([1.5]), torch.tensor([2.0])) == 0.25
