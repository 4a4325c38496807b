"""Machine code of every GPU kernel family against what is recorded of it, and how machine code is read."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("tvm")

from benchmarks import sass as table
from benchmarks.sass_kernels import ARCHITECTURES, kernels
from rescompile.backends.cuda import nvrtc, sass
from rescompile.backends.cuda.targets import architecture

LISTING = """
\t.section\t.text.f_kernel,"ax",@progbits
f_kernel:
.text.f_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R4.64] ;
        /*0020*/              @!P0 LDG.E.U16 R4, desc[UR4][R4.64] ;
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], desc[UR4][R4.64] ;
        /*0040*/                   HMMA.16816.F32 R4, R4, R8, R4 ;
        /*0050*/                   STG.E desc[UR4][R2.64], R7 ;
        /*0060*/                   SHFL.BFLY PT, R0, R7, 0x1, 0x1f ;
        /*0070*/                   EXIT ;
.L_x_0:
        /*0080*/                   BRA `(.L_x_0);
        /*0090*/                   NOP;
\t.section\t.text.g_kernel,"ax",@progbits
        /*0000*/              @UP1 UTMALDG.2D [UR4], [UR6] ;
"""


def test_a_listing_is_read_by_kernel_and_width() -> None:
    found = sass.listed(LISTING)
    assert list(found) == ["f_kernel", "g_kernel"]
    code = sass.counted("f", found["f_kernel"], registers=10, shared=0, spills=0, stack=0)
    assert code.accesses == {"async_copies": {128: 1}, "global_loads": {128: 1, 16: 1}, "global_stores": {32: 1}}
    assert code.widths("global") == [128, 32, 16]
    assert code.tensor == {"HMMA.16816.F32": 1}
    assert code.counts == {"shuffles": 1}
    assert code.instructions == 8  # what follows the exit is padding
    assert sass.counted("g", found["g_kernel"], 1, 0, 0, 0).counts == {"tensor_copies": 1}


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "warps"),
    [(128, 32, 0, 64), (128, 64, 0, 32), (1024, 64, 0, 32), (256, 255, 0, 8), (128, 32, 100 << 10, 8), (64, 16, 0, 64)],
)
def test_occupancy_is_what_runs_out_first(threads: int, registers: int, shared: int, warps: int) -> None:
    assert sass.occupancy(architecture("sm_90"), threads, registers, shared) == warps


GOOD: dict[str, Any] = {
    "spills": 0,
    "stack": 0,
    "registers": 40,
    "warps": 32,
    "accesses": {"global_loads": {"128": 4}, "global_stores": {"128": 2}},
    "tensor": {"HMMA.16816.F32": 16},
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spills": 8}, "spills 0 → 8"),
        ({"registers": 60}, "registers 40 → 60"),
        ({"warps": 24}, "warps"),
        ({"accesses": {"global_loads": {"128": 3, "64": 2}, "global_stores": {"128": 2}}}, "narrower: 4×128"),
        ({"tensor": {}}, "HMMA.16816.F32 16 → 0"),
    ],
)
def test_what_worsens_is_said(change: dict[str, Any], said: str) -> None:
    assert said in "; ".join(table.worsened(GOOD, {**GOOD, **change}))


def test_what_improves_or_hardly_changes_is_not() -> None:
    assert table.worsened(GOOD, {**GOOD, "registers": 43, "warps": 40, "tensor": {"HMMA.16816.F32": 32}}) == []
    wider = {**GOOD, "accesses": {"global_loads": {"64": 4}}}
    assert table.worsened(wider, GOOD) == []


def test_every_recorded_kernel_is_one_that_is_made() -> None:
    _, recorded = table.recorded()
    assert {arch: set(rows) for arch, rows in recorded.items()} == {
        arch: {kernel.name for kernel in kernels(arch)} for arch in ARCHITECTURES
    }


def test_the_table_is_written_from_its_data() -> None:
    by, recorded = table.recorded()
    assert (table.RESULTS / "sass.md").read_text(encoding="utf-8") == table.table(json.loads(json.dumps(recorded)), by)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code_is_no_worse_than_recorded(arch: str) -> None:
    if nvrtc.library() is None or sass.disassembler() is None:
        pytest.skip("NVRTC or nvdisasm is not here: pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm")
    by, recorded = table.recorded()
    if by != table.compiler():
        pytest.skip(f"recorded with {by}, here is {table.compiler()}")
    assert table.differences(arch, recorded[arch], table.measure(arch)) == []
