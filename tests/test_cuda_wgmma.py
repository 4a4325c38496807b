"""Contractions by TMA and wgmma: their generated source on the simulated GPU against torch, and what the SASS holds."""

from __future__ import annotations

from dataclasses import dataclass
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
        a, b = a.flatten(1, 2), b.flatten(1)
    a = a if spec.a_depth_last else a.mT
    b = b.mT if spec.b_depth_last else b
    acc = a @ b
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
