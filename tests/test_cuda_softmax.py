"""CUDA softmax kernels: their generated source on the CPU against torch in float64."""

from __future__ import annotations

import pytest
import torch

from tests import simulated_gpu

tvm = pytest.importorskip("tvm")

from rescompile.backends.cuda import softmax  # noqa: E402
from rescompile.backends.cuda.executable import cuda_source  # noqa: E402
from rescompile.backends.cuda.softmax import RowSoftmax  # noqa: E402
from rescompile.backends.cuda.targets import architecture, cuda_target  # noqa: E402

ROWS = 3
KINDS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CASES = {
    "part_of_a_warp": RowSoftmax(None, 16),
    "odd": RowSoftmax(None, 197, "float16", "float16"),
    "one_block": RowSoftmax(ROWS, 2048, "float32", "float16"),
    "logarithm": RowSoftmax(None, 1000, "bfloat16", "float32", log=True),
    "masked": RowSoftmax(None, 64, floor=-1e30),
    "streamed": RowSoftmax(ROWS, 65536, "float16", "float16"),
    "streamed_ragged": RowSoftmax(ROWS, 20000, "float32", "float32", log=True),
}


@pytest.fixture(scope="module")
def simulated() -> tuple[str, bytes]:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    limits = architecture("sm_90")
    made = {name: softmax.prim_func(spec, softmax.candidates(spec, limits)[0], name) for name, spec in CASES.items()}
    source = cuda_source(tvm.compile(tvm.IRModule(made), target=cuda_target("sm_90")).mod)
    return source, simulated_gpu.simulated_cubin(source)


@pytest.mark.parametrize("name", CASES)
def test_softmax_is_as_exact_as_its_type(name: str, simulated: tuple[str, bytes]) -> None:
    spec, (source, library) = CASES[name], simulated
    given = (torch.randn(ROWS, spec.width, generator=torch.Generator().manual_seed(1)) * 3).to(KINDS[spec.dtype])
    given[0, spec.width // 2] = 12.0  # a thread's later elements are larger than its first
    if spec.floor is not None:
        given[1] = -3e38
    got = torch.full((ROWS, spec.width), torch.nan).to(KINDS[spec.out_dtype])
    buffers = {"x": given, "y": got}
    names = simulated_gpu.parameters(source, f"{name}_kernel")
    arrays = [buffers[part].view(torch.uint8).numpy() for part in names if part in buffers]
    tile = softmax.candidates(spec, architecture("sm_90"))[0]
    dims = (-(-ROWS // tile.rows), 1, 1, tile.threads, tile.rows, 1)
    simulated_gpu.launch(library, f"{name}_kernel", arrays, [ROWS] if spec.rows is None else [], dims)
    want = (torch.log_softmax if spec.log else torch.softmax)(given.double(), -1)
    if spec.floor is not None:
        want[1] = 0.0
    limit = {"float32": 4e-6, "float16": 2e-3, "bfloat16": 1.6e-2}[spec.out_dtype]
    torch.testing.assert_close(got.double(), want, rtol=limit, atol=limit / 64)


def test_wider_rows_and_other_types_have_no_kernel() -> None:
    limits = architecture("sm_90")
    assert softmax.refusal(RowSoftmax(None, 1 << 17), limits) == ""
    assert softmax.refusal(RowSoftmax(None, (1 << 17) + 1), limits)
    assert softmax.refusal(RowSoftmax(None, 64, "float64"), limits)
