"""The CUDA kernels over rows: their generated source on the CPU against torch, and what the assembler says of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rescompile.backends.kernels import NormSpec
from tests import simulated_gpu

tvm = pytest.importorskip("tvm")

from rescompile.backends.cuda import add_norm, rows  # noqa: E402
from rescompile.backends.cuda.cubin import Cubin, compilers, to_cubin  # noqa: E402
from rescompile.backends.cuda.executable import cuda_source  # noqa: E402
from rescompile.backends.cuda.targets import cuda_target  # noqa: E402

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Against float64, in units of the result's last place or so: float32 statistics, one rounding of the result.
TOLERANCE = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 1.6e-2}
ROWS = 5  # not divided by the rows of a block

LAYER = NormSpec(None, 768, "layer", residual=True, sum_output=True)
CASES = {
    "part_of_a_warp": replace(LAYER, width=32, dtype="float16"),
    "one_warp": replace(LAYER, dtype="float16"),
    "one_warp_float32": LAYER,
    "one_warp_bfloat16": replace(LAYER, dtype="bfloat16"),
    "one_block": replace(LAYER, width=4096, dtype="float16"),
    "widest": replace(LAYER, width=16384),
    "odd_width": replace(LAYER, width=77, dtype="bfloat16"),
    "last_access_ragged": replace(LAYER, width=1000, dtype="float32"),
    "one_block_ragged": replace(LAYER, width=3000, dtype="bfloat16"),
    "one_block_odd": replace(LAYER, width=1025),
    "static_rows": replace(LAYER, rows=ROWS, width=256),
    "rms": NormSpec(None, 4096, "rms", residual=True, sum_output=True, bias=False, dtype="bfloat16"),
    "rms_one_warp": NormSpec(None, 384, "rms", residual=True, sum_output=True, bias=False, dtype="float16"),
    "layer_alone": replace(LAYER, residual=False, sum_output=False, dtype="float16"),
    "rms_alone": NormSpec(None, 1536, "rms", bias=False),
    "no_affine": replace(LAYER, weight=False, bias=False, residual=False, sum_output=False),
}


def _source(specs: dict[str, NormSpec]) -> str:
    module = tvm.IRModule({name: add_norm.prim_func(spec, name) for name, spec in specs.items()})
    return cuda_source(tvm.compile(module, target=cuda_target("sm_90")).mod)


@pytest.fixture(scope="module")
def simulated() -> tuple[str, bytes]:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    source = _source(CASES)
    return source, simulated_gpu.simulated_cubin(source)


def _inputs(spec: NormSpec) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(spec.width)
    kind = DTYPES[spec.dtype]
    # A mean far from zero: a one-pass variance would lose its digits.
    values = {"x": torch.randn(ROWS, spec.width, generator=random) + 3}
    values["residual"] = torch.randn(ROWS, spec.width, generator=random)
    values["weight"] = torch.randn(spec.width, generator=random)
    values["bias"] = torch.randn(spec.width, generator=random)
    return {name: value.to(kind) for name, value in values.items()}


def _expected(spec: NormSpec, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    total = given["x"] + given["residual"] if spec.residual else given["x"]
    weight = given["weight"].double() if spec.weight else None
    bias = given["bias"].double() if spec.bias else None
    if spec.kind == "layer":
        return torch.nn.functional.layer_norm(total.double(), (spec.width,), weight, bias, spec.eps), total
    return torch.nn.functional.rms_norm(total.double(), (spec.width,), weight, spec.eps), total


def _launched(spec: NormSpec, name: str, simulated: tuple[str, bytes]) -> dict[str, torch.Tensor]:
    source, library = simulated
    given = _inputs(spec)
    buffers = {**given, "y": torch.full_like(given["x"], torch.nan), "sum": torch.full_like(given["x"], torch.nan)}
    names = simulated_gpu.parameters(source, f"{name}_kernel")
    arrays = [buffers[part].view(torch.uint8).numpy() for part in names if part in buffers]
    tile = rows.row_tile(spec.width, spec.dtype)
    dims = (-(-ROWS // tile.rows), 1, 1, tile.threads, tile.rows, 1)
    simulated_gpu.launch(library, f"{name}_kernel", arrays, [ROWS] if spec.rows is None else [], dims)
    return buffers


@pytest.mark.parametrize("name", CASES)
def test_norm_is_as_exact_as_its_type(name: str, simulated: tuple[str, bytes]) -> None:
    spec = CASES[name]
    got = _launched(spec, name, simulated)
    want, _ = _expected(spec, _inputs(spec))
    torch.testing.assert_close(got["y"].double(), want, rtol=TOLERANCE[spec.dtype], atol=TOLERANCE[spec.dtype])


@pytest.mark.parametrize("name", [name for name, spec in CASES.items() if spec.sum_output])
def test_sum_is_bit_exact(name: str, simulated: tuple[str, bytes]) -> None:
    spec = CASES[name]
    got = _launched(spec, name, simulated)
    assert torch.equal(got["sum"], _expected(spec, _inputs(spec))[1])


def test_norm_without_a_residual_writes_no_sum(simulated: tuple[str, bytes]) -> None:
    assert "sum" not in simulated_gpu.parameters(simulated[0], "layer_alone_kernel")
    assert "sum" in simulated_gpu.parameters(simulated[0], "one_warp_kernel")


def test_one_warp_needs_no_barrier_and_a_block_does() -> None:
    assert "__syncthreads" not in _source({"f": CASES["one_warp"]})
    assert "__syncthreads" in _source({"f": CASES["one_block"]})


@pytest.mark.parametrize(
    ("width", "dtype", "expected"),
    [
        (32, "float16", rows.RowTile(vector=8, threads=4, chunks=1, rows=32)),
        (768, "float16", rows.RowTile(vector=8, threads=32, chunks=3, rows=4)),
        (768, "float32", rows.RowTile(vector=4, threads=32, chunks=6, rows=4)),
        (4096, "bfloat16", rows.RowTile(vector=8, threads=256, chunks=2, rows=1)),
        (16384, "float32", rows.RowTile(vector=4, threads=1024, chunks=4, rows=1)),
        (77, "float16", rows.RowTile(vector=1, threads=32, chunks=3, rows=4)),
    ],
)
def test_tile_follows_the_width(width: int, dtype: str, expected: rows.RowTile) -> None:
    assert rows.row_tile(width, dtype) == expected


@pytest.mark.parametrize("width", [1, 2, 31, 33, 127, 1000, 1024, 1025, 2047, 4097, 10000, 16383, 16384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tile_covers_the_row_within_the_limits(width: int, dtype: str) -> None:
    tile = rows.row_tile(width, dtype)
    assert tile.span * tile.chunks >= width
    assert tile.threads * tile.rows <= 1024
    assert tile.vector * tile.chunks <= 32  # elements that a thread holds in registers
    assert width % tile.vector == 0


def test_wider_rows_and_other_types_have_no_kernel() -> None:
    assert add_norm.takes(replace(LAYER, width=16384))
    assert not add_norm.takes(replace(LAYER, width=16385))
    assert not add_norm.takes(replace(LAYER, dtype="float64"))


# ---- machine code ------------------------------------------------------------------------------------------------

ASSEMBLED = {name: CASES[name] for name in ("one_warp", "one_warp_float32", "one_block", "widest", "rms", "odd_width")}


@pytest.fixture(scope="module")
def assembled() -> dict[str, Cubin]:
    if not compilers():
        pytest.skip("neither nvcc nor NVRTC here")
    source = _source(ASSEMBLED)
    made = {arch: to_cubin(source, arch) for arch in ("sm_80", "sm_90")}
    return {arch: cubin for arch, cubin in made.items() if cubin is not None}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_kernels_stay_in_registers(arch: str, assembled: dict[str, Cubin]) -> None:
    usage = {kernel.kernel.removesuffix("_kernel"): kernel for kernel in assembled[arch].usage}
    assert set(usage) == set(ASSEMBLED)
    assert {name: kernel.spills + kernel.stack for name, kernel in usage.items()} == dict.fromkeys(ASSEMBLED, 0)
    assert usage["widest"].registers <= 64  # 1,024 threads share 65,536
    assert assembled[arch].data.startswith(b"\x7fELF")


def test_accesses_are_of_128_bits_where_the_width_allows(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    code = tmp_path / "kernels.cu"
    code.write_text(_source({name: ASSEMBLED[name] for name in ("one_warp", "one_warp_float32", "odd_width")}))
    made = tmp_path / "kernels.ptx"
    command = [nvcc, "-ptx", "-arch=sm_90", "-w", "-std=c++17", "-o", str(made), str(code)]
    subprocess.run(command, capture_output=True, check=True)
    entries = {part.split("_kernel")[0]: part for part in re.split(r"\.visible \.entry ", made.read_text())[1:]}
    for name, vectors in (("one_warp", 3 * 4), ("one_warp_float32", 6 * 4)):
        loads = re.findall(r"ld\.global[.\w]*", entries[name])
        stores = re.findall(r"st\.global[.\w]*", entries[name])
        assert all(".v4." in access for access in loads + stores)
        assert len(loads) == vectors  # x, residual, weight and bias
        assert len(stores) == vectors // 2  # y and sum
    assert not re.findall(r"(?:ld|st)\.global[.\w]*\.v\d", entries["odd_width"])


def test_source_that_does_not_compile_is_one_sentence() -> None:
    if not compilers():
        pytest.skip("neither nvcc nor NVRTC here")
    from rescompile.errors import RescompileError

    with pytest.raises(RescompileError, match="does not compile for sm_90"):
        to_cubin('extern "C" __global__ void f() { g(); }', "sm_90")


def test_report_of_the_assembler_is_read() -> None:
    from rescompile.backends.cuda.cubin import ResourceUsage, usage

    log = (
        "ptxas info    : Compiling entry function 'f_kernel' for 'sm_90'\n"
        "ptxas info    : Function properties for f_kernel\n"
        "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 32 bytes smem\n"
        "ptxas info    : Compiling entry function 'g_kernel' for 'sm_90'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers, 400 bytes cmem[0]\n"
    )
    assert usage(log) == (
        ResourceUsage("f_kernel", 40, spill_stores=8, spill_loads=4, shared=32, stack=16),
        ResourceUsage("g_kernel", 8, spill_stores=0, spill_loads=0, shared=0, stack=0),
    )
    assert usage(log)[0].spills == 12
