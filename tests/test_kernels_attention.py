"""Attention kernels against torch: layouts, masks, causality, grouped heads, lengths without a whole tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tvm")

from rescompile.backends.kernels import AttentionSpec
from rescompile.errors import RescompileError
from tests.kernels_harness import Case, check


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def attention_case(spec: AttentionSpec, mask: torch.Tensor | None = None) -> Case:
    """Random numbers, and torch's result in float64."""
    dtype = getattr(torch, spec.dtype)
    q = torch.randn(spec.batch, spec.heads, spec.q_len, spec.head_dim).to(dtype)
    k, v = (torch.randn(spec.batch, spec.shared_heads, spec.k_len, spec.head_dim).to(dtype) for _ in "kv")
    shown = mask
    if spec.causal:
        lower = torch.ones(spec.q_len, spec.k_len, dtype=torch.bool).tril()
        if mask is None:
            shown = lower
        else:
            shown = mask & lower if mask.dtype == torch.bool else mask.double().masked_fill(~lower, float("-inf"))
    if shown is not None and shown.dtype != torch.bool:
        shown = shown.double()
    expected = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=shown, scale=spec.scale, enable_gqa=True
    )
    if spec.layout == "qkv":
        inputs: list[torch.Tensor | None] = [torch.cat([t.transpose(1, 2).flatten(2) for t in (q, k, v)], -1)]
    elif spec.layout == "bshd":
        inputs = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    else:
        inputs = [q, k, v]
    inputs += [] if mask is None else [mask]
    return Case(spec, inputs, [expected if spec.out_layout == "bhsd" else expected.transpose(1, 2)])


def test_every_layout() -> None:
    base = AttentionSpec(2, 3, 21, 21, 16, 0.25)
    layouts = [(a, b) for a in ("qkv", "bshd", "bhsd") for b in ("bshd", "bhsd")]
    check([attention_case(replace(base, layout=a, out_layout=b)) for a, b in layouts], every_tile=True)


def test_lengths_and_depths_without_a_whole_tile() -> None:
    shapes = [(1, 40, 8), (5, 33, 20), (37, 5, 64), (64, 64, 80), (9, 1, 3)]
    check([attention_case(AttentionSpec(1, 2, q, k, d, d**-0.5)) for q, k, d in shapes])


def test_causal_skips_no_key_it_should_see() -> None:
    check([attention_case(AttentionSpec(1, 2, q, k, 16, 0.25, causal=True)) for q, k in ((70, 70), (9, 40), (40, 9))])


def test_additive_masks_broadcast_and_may_hide_with_infinity() -> None:
    spec = AttentionSpec(2, 3, 19, 35, 16, 0.25, mask="additive")
    cases = []
    for shape in ((1, 1, 1, 35), (2, 1, 1, 35), (1, 3, 19, 35), (2, 3, 19, 1), (1, 1, 19, 35)):
        mask = torch.randn(shape)
        if shape[-1] > 1:
            mask[..., 3::4] = float("-inf")
        cases.append(attention_case(replace(spec, mask_shape=shape), mask))
    cases.append(attention_case(replace(spec, causal=True, mask_shape=(2, 1, 1, 35)), torch.randn(2, 1, 1, 35)))
    check(cases)


def test_keep_masks_and_rows_that_may_see_nothing() -> None:
    spec = AttentionSpec(2, 3, 19, 35, 16, 0.25, mask="keep", mask_shape=(2, 1, 19, 35))
    mask = torch.rand(2, 1, 19, 35) > 0.4
    mask[0, :, 4] = False
    case = attention_case(spec, mask)
    case.expected = [case.expected[0].nan_to_num(0.0)]
    check([case])


def test_queries_share_key_heads() -> None:
    check([attention_case(AttentionSpec(1, 6, 12, 20, 16, 0.25, kv_heads=n)) for n in (1, 2, 3)])
    check([attention_case(AttentionSpec(1, 6, 12, 12, 16, 0.25, kv_heads=2, layout="qkv"))])


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_types(dtype: str) -> None:
    check([attention_case(AttentionSpec(1, 2, 12, 20, 16, 0.25, causal=True, dtype=dtype))])


def test_impossible_attention_is_refused() -> None:
    with pytest.raises(RescompileError, match="divide"):
        AttentionSpec(1, 6, 8, 8, 16, 0.25, kv_heads=4)
    with pytest.raises(RescompileError, match="as many queries as keys"):
        AttentionSpec(1, 6, 8, 9, 16, 0.25, layout="qkv")
    with pytest.raises(RescompileError, match="broadcast"):
        AttentionSpec(1, 6, 8, 9, 16, 0.25, mask="keep", mask_shape=(1, 1, 8, 8))
