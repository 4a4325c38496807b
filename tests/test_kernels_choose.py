"""Choosing tiles: what wins, what is remembered, and what must never win."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")

from rescompile.backends.kernels import (
    AttentionSpec,
    ConvSpec,
    Epilogue,
    LayoutSpec,
    LinearSpec,
    Machine,
    Tile,
    candidates,
    choose,
    chooser,
)
from rescompile.errors import RescompileError

SMALL = ConvSpec(1, 8, 14, 8, 40, (3, 3), pads=(1, 1, 1, 1), in_border=(1, 1), epilogue=Epilogue(bias=True))
HOST = Machine.host(threads=2)


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooser, "COLD_BYTES", 1 << 20)


def record_file(folder: Path) -> Path:
    (found,) = folder.glob("tiles-*.json")
    return found


def test_a_timed_choice_is_one_of_the_candidates_and_remembered(tmp_path: Path) -> None:
    specs = [SMALL, LinearSpec(None, 24, 40), AttentionSpec(1, 2, 20, 20, 8, 1.0, layout="qkv")]
    first = choose(specs, HOST, tmp_path)
    for spec in specs:
        choice = first[spec]
        assert choice.tile in candidates(spec, HOST)
        if len(candidates(spec, HOST)) > 1:
            assert choice.seconds > 0
            assert choice.gflops > 0
            assert choice.seconds == min(seconds for _, seconds in choice.tried)
    again = choose(specs, HOST, tmp_path)
    assert {spec: choice.tile for spec, choice in again.items()} == {spec: c.tile for spec, c in first.items()}
    assert all(choice.tried == () for choice in again.values())


def test_a_single_candidate_is_neither_timed_nor_recorded(tmp_path: Path) -> None:
    choice = choose([LayoutSpec(1, 4, 4, 3)], HOST, tmp_path)[LayoutSpec(1, 4, 4, 3)]
    assert choice.tried == ()
    assert not list(tmp_path.iterdir())


def test_another_machine_is_not_timed(tmp_path: Path) -> None:
    other = Machine.named("x86-64", threads=2)
    assert not other.is_host
    assert choose([SMALL], other, tmp_path)[SMALL].tile == candidates(SMALL, other)[0]
    assert not list(tmp_path.iterdir())


def test_without_time_the_first_candidate_is_taken_and_not_recorded(tmp_path: Path) -> None:
    assert choose([SMALL], HOST, tmp_path, budget_s=0.0)[SMALL].tile == candidates(SMALL, HOST)[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["", "{", '{"schema": 7, "records": {}}', '{"schema": 1, "records": {"a": {"tile": 3}}}']
)
def test_damaged_records_are_ignored_with_a_warning_and_replaced(tmp_path: Path, text: str) -> None:
    choose([SMALL], HOST, tmp_path)
    file = record_file(tmp_path)
    file.write_text(text)
    with pytest.warns(UserWarning, match="damaged"):
        choose([SMALL], HOST, tmp_path)
    assert repr(SMALL) in json.loads(file.read_text())["records"]


def test_records_of_other_specs_survive_a_second_writer(tmp_path: Path) -> None:
    other = LinearSpec(9, 24, 40)
    choose([SMALL], HOST, tmp_path)
    choose([other], HOST, tmp_path)
    assert set(json.loads(record_file(tmp_path).read_text())["records"]) == {repr(SMALL), repr(other)}
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_recorded_tile_that_is_no_candidate_is_not_used(tmp_path: Path) -> None:
    choose([SMALL], HOST, tmp_path)
    file = record_file(tmp_path)
    data = json.loads(file.read_text())
    data["records"][repr(SMALL)]["tile"]["pixels"] = 99
    file.write_text(json.dumps(data))
    assert choose([SMALL], HOST, tmp_path)[SMALL].tile in candidates(SMALL, HOST)


def test_an_unwritable_cache_warns_and_still_chooses(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert choose([SMALL], HOST, blocked / "cache")[SMALL].tile in candidates(SMALL, HOST)


def test_a_candidate_with_wrong_numbers_never_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = candidates(SMALL, HOST)[0]
    wrong = {tile.lanes for tile in candidates(SMALL, HOST)} - {right.lanes}
    assert wrong
    pack = chooser.pack_weight

    def spoiled(spec: ConvSpec | LinearSpec, tile: Tile, weight: np.ndarray) -> np.ndarray:
        packed = pack(spec, tile, weight)
        return packed + 1 if tile.lanes in wrong else packed

    monkeypatch.setattr(chooser, "pack_weight", spoiled)
    tried = choose([SMALL], HOST, tmp_path)[SMALL].tried
    assert {tile.lanes for tile, _ in tried} == {right.lanes}


def test_a_candidate_that_does_not_build_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = chooser.prim_func

    def picky(spec: ConvSpec, tile: Tile, name: str, dynamic_tasks: bool) -> object:
        if tile.order == "pixels":
            raise RuntimeError("rejected")
        return make(spec, tile, name, dynamic_tasks)

    monkeypatch.setattr(chooser, "prim_func", picky)
    tried = choose([SMALL], HOST, tmp_path)[SMALL].tried
    assert tried
    assert all(tile.order == "weights" for tile, _ in tried)


def test_tiles_survive_json_and_other_data_is_refused() -> None:
    tile = Tile(7, 32, 2, 3, "pixels")
    assert Tile.from_json(json.loads(json.dumps(tile.to_json()))) == tile
    for data in (3, {"pixels": 1}, {**tile.to_json(), "order": "up"}, {**tile.to_json(), "lanes": 0}):
        with pytest.raises(RescompileError, match="Not a kernel tile"):
            Tile.from_json(data)


def test_machines_by_name() -> None:
    assert Machine.named("x86-64-v3", threads=4).lanes == 8
    assert Machine.named("skylake-avx512", threads=4).lanes == 16
    assert Machine.named("neoverse-n1", threads=4, triple="aarch64-linux-gnu").registers == 32
    assert Machine.host(threads=3).threads == 3
    with pytest.raises(RescompileError, match="no processor"):
        Machine.named("pentium-9")
