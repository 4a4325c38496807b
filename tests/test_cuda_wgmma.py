"""Contractions by TMA and wgmma: their generated source on the simulated GPU against torch, and what the SASS holds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from rescompile.kinds import OpKind
from tests import simulated_gpu

tvm = pytest.importorskip("tvm")

from rescompile.backends.cuda import wgmma  # noqa: E402
from rescompile.backends.cuda.contraction import (  # noqa: E402
    ContractionSpec,
    ConvGeometry,
    EpilogueOperand,
    EpilogueOutput,
    EpilogueProgram,
    EpilogueStep,
)
from rescompile.backends.cuda.cubin import Cubin, by_nvrtc, code_arch, compilers  # noqa: E402
from rescompile.backends.cuda.executable import cross_compiling, cuda_source  # noqa: E402
from rescompile.backends.cuda.targets import architecture, cuda_target  # noqa: E402
from rescompile.backends.cuda.wgmma import WgmmaTile  # noqa: E402

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ROUNDING = {"float32": 2e-5, "float16": 1e-3, "bfloat16": 8e-3}  # relative, of one rounding of the result
HOPPER = architecture("sm_90")


def _residual(dtype: str) -> EpilogueProgram:
    """y = relu(acc + bias) + residual"""
    return EpilogueProgram(
        (EpilogueOutput(5, dtype),),
        (EpilogueOperand("bias", "float32", column=True), EpilogueOperand.full("residual", dtype)),
        (
            EpilogueStep.of(OpKind.ADD, (0, 1)),
            EpilogueStep.of(OpKind.RELU, (3,)),
            EpilogueStep.of(OpKind.ADD, (4, 2)),
        ),
    )


PLAIN, WIDE = EpilogueProgram.plain("float16"), EpilogueProgram.plain("float32")
BRAIN = EpilogueProgram.plain("bfloat16")


LARGE = ContractionSpec(4096, 4096, 4096, _residual("float16"))


@dataclass(frozen=True)
class Case:
    """A product, its tile, and the extent that is left to run time."""

    spec: ContractionSpec
    tile: WgmmaTile
    count: int = 0


# Few blocks, so that each takes several tiles; sums longer and shorter than the ring; no extent a multiple of its tile.
CASES = {
    "shared_tile": Case(ContractionSpec(None, 328, 200, _residual("float16")), WgmmaTile(128, 256, 2, blocks=2), 300),
    "tall_tile": Case(
        ContractionSpec(300, 136, 72, BRAIN, dtype="bfloat16", b_depth_last=False), WgmmaTile(256, 128, 3, blocks=1)
    ),
    "cluster": Case(
        ContractionSpec(None, 200, 200, _residual("float16")), WgmmaTile(128, 128, 2, cluster=2, blocks=4), 300
    ),
    "alternating_cluster": Case(
        ContractionSpec(200, 200, 328, BRAIN, dtype="bfloat16", b_depth_last=False),
        WgmmaTile(64, 128, 2, alternate=True, cluster=2, blocks=2),
    ),
    "alternating": Case(ContractionSpec(200, 200, 456, WIDE), WgmmaTile(128, 128, 3, alternate=True, blocks=1)),
    "alternating_wide": Case(
        ContractionSpec(None, 264, 136, _residual("bfloat16"), dtype="bfloat16"),
        WgmmaTile(64, 256, 2, alternate=True, blocks=2),
        329,
    ),
    "batch": Case(
        ContractionSpec(72, 72, 40, PLAIN, batch=3, b_depth_last=False), WgmmaTile(64, 128, 4, alternate=True, blocks=2)
    ),
    "dynamic_batch": Case(
        ContractionSpec(40, 24, 64, WIDE, batch=None), WgmmaTile(64, 64, 2, consumers=1, blocks=2), 3
    ),
    "weights_shared": Case(ContractionSpec(100, 72, 40, PLAIN, batch=2, b_share=0), WgmmaTile(128, 64, 3, blocks=2)),
    "left_turned": Case(ContractionSpec(136, 64, 80, PLAIN, a_depth_last=False), WgmmaTile(128, 64, 2, blocks=1)),
    "both_turned": Case(
        ContractionSpec(72, 136, 80, BRAIN, dtype="bfloat16", a_depth_last=False, b_depth_last=False),
        WgmmaTile(64, 128, 2, consumers=1, blocks=1),
    ),
    "one_row": Case(ContractionSpec(None, 77, 16, _residual("float16")), WgmmaTile(64, 64, 4, consumers=1), 1),
    "conv": Case(
        ContractionSpec(
            2 * 9 * 7, 72, 9 * 72, _residual("float16"), conv=ConvGeometry(2, 9, 7, (3, 3), pads=(1, 1, 1, 1))
        ),
        WgmmaTile(64, 128, 2, alternate=True, blocks=1),
    ),
    "conv_strided": Case(
        ContractionSpec(
            None,
            64,
            15 * 24,
            BRAIN,
            dtype="bfloat16",
            conv=ConvGeometry(None, 13, 16, (3, 5), stride=(2, 2), pads=(1, 2, 0, 1), dilation=(2, 1)),
        ),
        WgmmaTile(128, 64, 2, cluster=2, blocks=2),
        5,
    ),
    "point_conv": Case(
        ContractionSpec(None, 72, 64, PLAIN, conv=ConvGeometry(None, 5, 7)), WgmmaTile(64, 128, 2, consumers=1), 2
    ),
}


def _module(cases: dict[str, Case]) -> Any:
    return tvm.IRModule({name: wgmma.prim_func(case.spec, case.tile, name) for name, case in cases.items()})


def _source(cases: dict[str, Case]) -> str:
    with cross_compiling():
        return cuda_source(tvm.compile(_module(cases), target=cuda_target("sm_90")).mod)


def _given(case: Case) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(case.spec.depth)
    values = {}
    for argument in wgmma.arguments(case.spec):
        shape = [case.count if extent is None else extent for extent in argument.shape]
        filled = torch.full(shape, torch.nan) if argument.output else torch.randn(shape, generator=random)
        values[argument.name] = filled.to(DTYPES[argument.dtype])
    return values


def _expected(case: Case, given: dict[str, torch.Tensor]) -> torch.Tensor:
    spec = case.spec
    a, b = given["a"].double(), given["b"].double()
    if spec.conv is not None:
        conv = spec.conv
        top, left, bottom, right = conv.pads
        image = torch.nn.functional.pad(a.permute(0, 3, 1, 2), (left, right, top, bottom))
        acc = torch.nn.functional.conv2d(image, b.permute(0, 3, 1, 2), None, conv.stride, 0, conv.dilation)
        return _finished(acc.permute(0, 2, 3, 1).flatten(1, 2), given)
    a = a if spec.a_depth_last else a.mT
    b = b.mT if spec.b_depth_last else b
    return _finished(a @ b, given)


def _finished(acc: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    if "residual" in given:
        acc = torch.relu(acc + given["bias"].double()) + given["residual"].double()
    return acc


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray[Any, Any]]:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    calls = {name: [_array(value) for value in _given(case).values()] for name, case in CASES.items()}
    made = simulated_gpu.run_functions(tmp_path_factory.mktemp("wgmma"), _module(CASES), calls)
    return {name: buffers[-1] for name, buffers in made.items()}


@pytest.mark.parametrize("name", CASES)
def test_product_is_as_exact_as_its_type(name: str, computed: dict[str, np.ndarray[Any, Any]]) -> None:
    case = CASES[name]
    want = _expected(case, _given(case))
    got = torch.from_numpy(computed[name].astype(np.float64))
    tolerance = ROUNDING[case.spec.epilogue.outputs[0].dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * float(want.abs().max()) / 8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"depth": 100}, "rows of a"),
        ({"columns": 100, "b_depth_last": False}, "rows of b"),
        ({"rows": None, "a_depth_last": False}, "rows of a"),
        ({"dtype": "float32", "epilogue": WIDE}, "16-bit"),
        ({"rows": 2 * 49, "depth": 9 * 12, "conv": ConvGeometry(2, 7, 7, (3, 3), pads=(1, 1, 1, 1))}, "rows of a"),
        ({"rows": 2 * 49, "depth": 9 * 64, "batch": 2, "conv": ConvGeometry(2, 7, 7, (3, 3), pads=(1,) * 4)}, "groups"),
    ],
)
def test_what_cannot_be_copied_is_refused(change: dict[str, Any], said: str) -> None:
    assert said in wgmma.refusal(replace(LARGE, **change), HOPPER)
    assert wgmma.candidates(replace(LARGE, **change), HOPPER) == []


def test_other_gpus_have_no_wgmma() -> None:
    assert not wgmma.refusal(LARGE, HOPPER)
    for other in ("sm_80", "sm_100"):
        assert "sm_90a" in wgmma.refusal(LARGE, architecture(other))


def test_small_products_get_small_tiles() -> None:
    assert wgmma.candidates(LARGE, HOPPER)[0].cluster == 2
    first = wgmma.candidates(replace(LARGE, rows=40, columns=64), HOPPER)[0]
    assert (first.rows, first.columns) == (64, 64)
    assert all(tile.cluster == 1 for tile in wgmma.candidates(replace(LARGE, rows=100), HOPPER))


def test_tiles_fit_into_shared_memory() -> None:
    assert all(tile.shared_bytes <= HOPPER.shared_bytes for tile in wgmma.candidates(LARGE, HOPPER))


def test_only_sources_with_wgmma_are_for_one_capability() -> None:
    assert code_arch('asm volatile("wgmma.fence.sync.aligned;")', "sm_90") == "sm_90a"
    assert code_arch('asm volatile("cp.async.bulk.tensor.2d")', "sm_90") == "sm_90"
    assert code_arch('asm volatile("wgmma.fence.sync.aligned;")', "sm_80") == "sm_80"


# What models are made of, on tiles of each kind.
SHIPPED = {
    "cluster": Case(LARGE, WgmmaTile(128, 256, 4, cluster=2)),
    "tall": Case(replace(LARGE, rows=None), WgmmaTile(256, 128, 4)),
    "alternating": Case(
        replace(LARGE, dtype="bfloat16", epilogue=_residual("bfloat16"), b_depth_last=False),
        WgmmaTile(128, 128, 6, alternate=True),
    ),
    "conv": Case(
        ContractionSpec(
            None, 256, 9 * 256, _residual("float16"), conv=ConvGeometry(None, 14, 14, (3, 3), pads=(1,) * 4)
        ),
        WgmmaTile(128, 256, 4),
    ),
}
SMALL = Case(ContractionSpec(64, 64, 320, PLAIN), WgmmaTile(64, 64, 2, consumers=1, blocks=1))
# What is changed in the kernel's source, and what the simulated GPU has to say, if it can know.
BROKEN = {
    "intact": ("", "", ""),
    "stage_released_before_it_is_read": (r"tvm_\w+wait_group_sync_aligned_1\(\);", "", ""),
    "bytes_that_never_come": (r"\(uint\)16384\);\n", "(uint)16400);\n", "deadlock"),
    "barriers_not_published": (r"tvm_\w+fence_mbarrier_init\w+\(\);", "", "fence.mbarrier_init"),
}


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    folder = tmp_path_factory.mktemp("broken")

    def edited(source: str) -> str:
        kernels = re.split(r"(?=\nextern \"C\" __global__)", source)
        for name, (pattern, replacement, _) in BROKEN.items():
            (place,) = [i for i, text in enumerate(kernels) if f" {name}_kernel(" in text and "{" in text]
            before, kernels[place] = kernels[place], re.sub(pattern, replacement, kernels[place])
            assert not pattern or kernels[place] != before
        return "".join(kernels)

    simulated_gpu.build_functions(folder, _module(dict.fromkeys(BROKEN, SMALL)), edit=edited)
    return folder


def _right(made: np.ndarray[Any, Any]) -> bool:
    want = _expected(SMALL, _given(SMALL)).numpy()
    return np.allclose(made.astype(np.float64), want, atol=0.05, rtol=0.01)


def test_simulated_gpu_is_as_late_as_it_may_be(broken: Path) -> None:
    given = [_array(value) for value in _given(SMALL).values()]
    made = simulated_gpu.call_functions(broken, {"intact": given, "stage_released_before_it_is_read": given})
    assert _right(made["intact"][-1])
    assert not _right(made["stage_released_before_it_is_read"][-1])


@pytest.mark.parametrize("name", [name for name, (_, _, said) in BROKEN.items() if said])
def test_simulated_gpu_says_what_is_wrong(name: str, broken: Path) -> None:
    with pytest.raises(RuntimeError, match=BROKEN[name][2]):
        simulated_gpu.call_functions(broken, {name: [_array(value) for value in _given(SMALL).values()]})


@pytest.fixture(scope="module")
def assembled() -> Cubin:
    if "nvrtc" not in compilers():
        pytest.skip("no NVRTC here")
    source = _source(SHIPPED)
    made = by_nvrtc(source, code_arch(source, "sm_90"))
    assert isinstance(made, Cubin), made
    return made


def test_no_tile_spills(assembled: Cubin) -> None:
    assert {kernel.kernel: kernel.spills for kernel in assembled.usage} == {f"{name}_kernel": 0 for name in SHIPPED}


def test_registers_are_what_setmaxnreg_counts_on(assembled: Cubin) -> None:
    for kernel in assembled.usage:
        tile = SHIPPED[kernel.kernel.removesuffix("_kernel")].tile
        # With three warpgroups a launch gives each thread 168; one gives some up, the others take them.
        assert kernel.registers == 168 if tile.consumers == 2 else kernel.registers <= 255


def test_machine_code_multiplies_by_warpgroups_and_copies_by_tma(assembled: Cubin, tmp_path: Path) -> None:
    disassembler = next(Path(root).glob("cu*/bin/nvdisasm") for root in _nvidia())
    path = tmp_path / "kernels.cubin"
    path.write_bytes(assembled.data)
    command = [str(next(disassembler)), "-c", str(path)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\.section\s+\.text\.(\w+)_kernel", sass)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        tile = SHIPPED[name].tile
        used = Counter(re.findall(r"\b(HGMMA\.\S+|UTMALDG\.\S+|LDL|STL|[LS][TD]G\.\S+|USETMAXREG)", text))
        shapes = {key for key in used if key.startswith("HGMMA")}
        brain = ".BF16" if SHIPPED[name].spec.dtype == "bfloat16" else ""
        assert shapes == {f"HGMMA.64x{tile.columns}x16.F32{brain}"}, name
        assert any(key.startswith("UTMALDG") for key in used), name
        assert any("MULTICAST" in key for key in used) == (tile.cluster > 1), name
        assert used["LDL"] + used["STL"] == 0, name
        assert {key.removesuffix(".CONSTANT") for key in used if key[1:3] in ("TG", "DG")} <= {"STG.E.128", "LDG.E.128"}


def _nvidia() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    return list(spec.submodule_search_locations or []) if spec else []
