"""Attention in one CUDA kernel: its generated source on the CPU against torch, and what the assembler makes of it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from tests import simulated_gpu

tvm = pytest.importorskip("tvm")

from rescompile.backends.cuda import flash, sass  # noqa: E402
from rescompile.backends.cuda.cubin import compilers, to_cubin  # noqa: E402
from rescompile.backends.cuda.executable import cuda_source  # noqa: E402
from rescompile.backends.cuda.flash import FlashTile  # noqa: E402
from rescompile.backends.cuda.targets import architecture, cuda_target  # noqa: E402
from rescompile.backends.kernels import AttentionSpec  # noqa: E402

TORCH = {"float16": torch.float16, "bfloat16": torch.bfloat16, "bool": torch.bool}
TOLERANCE = {"float16": 2e-3, "bfloat16": 1.6e-2}


def attention(heads: int, queries: int, keys: int, head: int, batch: int = 1, **how: object) -> AttentionSpec:
    return AttentionSpec(batch, heads, queries, keys, head, head**-0.5, **{"dtype": "float16", **how})  # type: ignore[arg-type]


CASES = {
    "packed": (attention(2, 70, 70, 32, batch=2, layout="qkv"), FlashTile(32, 32)),
    "packed_causal": (attention(2, 70, 70, 32, layout="qkv", causal=True), FlashTile(32, 32)),
    "shared_keys": (attention(4, 40, 40, 16, kv_heads=2, layout="bshd", dtype="bfloat16"), FlashTile(32, 32)),
    "heads_first": (attention(2, 33, 65, 48, layout="bhsd", out_layout="bhsd"), FlashTile(16, 64)),
    "wide_head": (attention(1, 64, 130, 128, layout="bhsd", causal=True), FlashTile(64, 64)),
    "head_of_80": (attention(1, 17, 40, 80, layout="bshd"), FlashTile(16, 32)),
    "head_of_96": (attention(1, 17, 40, 96, layout="bshd", dtype="bfloat16"), FlashTile(32, 32)),
    "one_query": (attention(2, 1, 100, 32, layout="bhsd"), FlashTile(16, 32)),
    "added_mask": (attention(2, 20, 24, 32, batch=2, mask="additive", mask_shape=(2, 1, 20, 24)), FlashTile(16, 32)),
    "keep_mask": (attention(2, 20, 40, 32, batch=2, mask="keep", mask_shape=(2, 1, 1, 40)), FlashTile(16, 32)),
}


def _inputs(spec: AttentionSpec) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(spec.q_len)
    made = {}
    for argument in flash.arguments(spec):
        value = torch.randn([extent or 1 for extent in argument.shape], generator=random)
        if argument.dtype == "bool":
            value = value > 0
            value[0] = False  # a batch of which no query sees any key
        elif argument.name == "mask":
            value[..., 3, :] = -torch.inf
        made[argument.name] = value.to(TORCH[argument.dtype])
    made["y"] = torch.full_like(made["y"], torch.nan)
    return made


def _expected(spec: AttentionSpec, given: dict[str, torch.Tensor]) -> torch.Tensor:
    heads, shared, head = spec.heads, spec.shared_heads, spec.head_dim
    if spec.layout == "qkv":
        whole = given["qkv"].double().view(spec.batch, spec.q_len, heads + 2 * shared, head).transpose(1, 2)
        q, k, v = whole.split([heads, shared, shared], 1)
    else:
        q, k, v = (given[name].double() for name in "qkv")
        q, k, v = (x.transpose(1, 2) if spec.layout == "bshd" else x for x in (q, k, v))
    k, v = (x.repeat_interleave(heads // shared, 1) for x in (k, v))
    scores = q @ k.mT * spec.scale
    if spec.mask == "additive":
        scores = scores + given["mask"].double()
    if spec.mask == "keep":
        scores = scores.masked_fill(~given["mask"], -torch.inf)
    if spec.causal:
        scores = scores.masked_fill(torch.ones(spec.q_len, spec.k_len).triu(1).bool(), -torch.inf)
    y = torch.softmax(scores, -1).nan_to_num() @ v  # a row in which everything is masked gives zeros
    return y.transpose(1, 2) if spec.out_layout == "bshd" else y


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[np.ndarray]]:
    if simulated_gpu.COMPILER is None:
        pytest.skip("no g++ here")
    functions = {name: flash.prim_func(spec, tile, name) for name, (spec, tile) in CASES.items()}
    calls = {name: [_numpy(value) for value in _inputs(spec).values()] for name, (spec, _) in CASES.items()}
    folder = tmp_path_factory.mktemp("flash")
    return simulated_gpu.run_functions(folder, tvm.IRModule(functions), calls, optimise="-O0")


@pytest.mark.parametrize("name", CASES)
def test_attention_is_as_exact_as_its_type(name: str, results: dict[str, list[np.ndarray]]) -> None:
    spec = CASES[name][0]
    got = torch.from_numpy(results[name][-1].astype(np.float64))
    torch.testing.assert_close(got, _expected(spec, _inputs(spec)), rtol=0, atol=TOLERANCE[spec.dtype])


def test_refusals_say_why() -> None:
    hopper = architecture("sm_90")
    assert flash.refusal(CASES["packed"][0], hopper) == ""
    assert "float32" in flash.refusal(attention(1, 8, 8, 32, dtype="float32"), hopper)
    assert "20 wide" in flash.refusal(attention(1, 8, 8, 20), hopper)
    assert "256 wide" in flash.refusal(attention(1, 8, 8, 256), hopper)


def test_candidates_fit_every_head() -> None:
    for arch in ("sm_80", "sm_86", "sm_90"):
        for head in (16, 64, 128):
            tiles = flash.candidates(attention(8, 200, 200, head, batch=4), architecture(arch))
            assert tiles
            assert all(tile.shared_bytes(head) < architecture(arch).shared_bytes for tile in tiles)
    assert flash.candidates(attention(8, 1, 200, 64), architecture("sm_90"))[0].queries <= 32


WIDE = attention(32, 2048, 2048, 128, batch=2, kv_heads=8, causal=True, dtype="bfloat16")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_machine_code_keeps_scores_in_registers(arch: str) -> None:
    if not compilers() or sass.disassembler() is None:
        pytest.skip("no compiler of CUDA, or no disassembler, here")
    function = flash.prim_func(WIDE, flash.candidates(WIDE, architecture(arch))[0], "wide")
    made = to_cubin(cuda_source(tvm.compile(tvm.IRModule({"wide": function}), target=cuda_target(arch)).mod), arch)
    assert made is not None
    code = sass.read(made)["wide"]
    assert (code.spills, code.stack) == (0, 0)
    assert set(code.accesses["async_copies"]) == {128}
    assert set(code.accesses["global_stores"]) == {128}
    assert "global_loads" not in code.accesses
    assert code.tensor == {"HMMA.16816.F32.BF16": 2 * WIDE.head_dim // 16 * 64 // 8}
