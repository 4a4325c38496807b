"""Each kind of operation, lowered and run, against torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rescompile.graph import Value
from rescompile.kinds import OpKind
from tests.lowering_cases import F, Sketch, close

pytest.importorskip("tvm")
K = OpKind

UNARY: dict[str, tuple[OpKind, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "neg": (K.NEG, {}, torch.neg),
    "abs": (K.ABS, {}, torch.abs),
    "exp": (K.EXP, {}, torch.exp),
    "erf": (K.ERF, {}, torch.erf),
    "sin": (K.SIN, {}, torch.sin),
    "cos": (K.COS, {}, torch.cos),
    "floor": (K.FLOOR, {}, torch.floor),
    "ceil": (K.CEIL, {}, torch.ceil),
    "sign": (K.SIGN, {}, torch.sign),
    "relu": (K.RELU, {}, torch.relu),
    "relu6": (K.CLIP, {"min": 0.0, "max": 6.0}, F.relu6),
    "clip_below": (K.CLIP, {"min": -0.5}, lambda x: x.clamp(min=-0.5)),
    "leaky_relu": (K.LEAKY_RELU, {"slope": 0.2}, lambda x: F.leaky_relu(x, 0.2)),
    "elu": (K.ELU, {"alpha": 1.5}, lambda x: F.elu(x, 1.5)),
    "gelu": (K.GELU, {}, F.gelu),
    "gelu_tanh": (K.GELU, {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (K.SILU, {}, F.silu),
    "sigmoid": (K.SIGMOID, {}, torch.sigmoid),
    "tanh": (K.TANH, {}, torch.tanh),
    "hardsigmoid": (K.HARDSIGMOID, {}, F.hardsigmoid),
    "hardswish": (K.HARDSWISH, {}, F.hardswish),
    "softplus": (K.SOFTPLUS, {}, F.softplus),
    "mish": (K.MISH, {}, F.mish),
    "identity": (K.IDENTITY, {}, lambda x: x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_unary_operations_agree_with_torch_in_every_floating_dtype(dtype: torch.dtype) -> None:
    sketch = Sketch()
    x = sketch.input(3, 37, dtype=dtype)
    sketch.tensors[x.name] = x_data = sketch.of(x) * 3
    name = str(dtype).removeprefix("torch.")
    outputs = [sketch.op(kind, [x], (3, 37), name, **attrs) for kind, attrs, _ in UNARY.values()]
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for got, (_, _, reference) in zip(sketch.run(*outputs), UNARY.values(), strict=True):
        close(got, reference(x_data), rtol=tolerance, atol=tolerance)


def test_rounding_goes_to_the_even_neighbour() -> None:
    sketch = Sketch()
    x = sketch.given(torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.3, 0.7]))
    close(sketch.run(sketch.op(K.ROUND, [x], (7,))), torch.round(sketch.of(x)))


def test_roots_and_logarithms_of_positive_numbers() -> None:
    sketch = Sketch()
    x = sketch.given(torch.rand(5, 9) + 0.1)
    kinds = {K.SQRT: torch.sqrt, K.RSQRT: torch.rsqrt, K.LOG: torch.log, K.RECIPROCAL: torch.reciprocal}
    outputs = [sketch.op(kind, [x], (5, 9)) for kind in kinds]
    for got, reference in zip(sketch.run(*outputs), kinds.values(), strict=True):
        close(got, reference(sketch.of(x)))


def test_addition_scales_each_operand_and_subtracts_by_minus_one() -> None:
    sketch = Sketch()
    a, b, c = sketch.input(2, 5), sketch.input(2, 5), sketch.input(5)
    y = sketch.op(K.ADD, [a, b, c], (2, 5), scales=(1.0, -1.0, 2.5))
    close(sketch.run(y), sketch.of(a) - sketch.of(b) + 2.5 * sketch.of(c))


def test_addition_without_scales_has_none() -> None:
    sketch = Sketch()
    a, b = sketch.input(2, 5), sketch.input(1, 5)
    close(sketch.run(sketch.op(K.ADD, [a, b], (2, 5))), sketch.of(a) + sketch.of(b))


def test_binary_operations_broadcast() -> None:
    sketch = Sketch()
    a, b = sketch.given(torch.rand(4, 1, 6) + 0.5), sketch.given(torch.rand(3, 1) + 0.5)
    kinds: dict[OpKind, Any] = {
        K.MUL: torch.mul,
        K.DIV: torch.div,
        K.POW: torch.pow,
        K.MAXIMUM: torch.maximum,
        K.MINIMUM: torch.minimum,
        K.MOD: torch.remainder,
    }
    outputs = [sketch.op(kind, [a, b], (4, 3, 6)) for kind in kinds]
    for got, reference in zip(sketch.run(*outputs), kinds.values(), strict=True):
        close(got, reference(sketch.of(a), sketch.of(b)))


@pytest.mark.parametrize("exponent", [2.0, 3.0, 4.0, 0.5, -0.5, -1.0, 1.7])
def test_powers_by_a_literal(exponent: float) -> None:
    sketch = Sketch()
    x = sketch.given(torch.rand(4, 5) + 0.2)
    power = sketch.constant(torch.tensor(exponent))
    close(sketch.run(sketch.op(K.POW, [x, power], (4, 5))), sketch.of(x) ** exponent)


def test_integer_division_truncates_and_true_division_does_not() -> None:
    sketch = Sketch()
    a, b = sketch.given(torch.tensor([7, -7, 9])), sketch.given(torch.tensor([2, 2, -4]))
    whole = sketch.op(K.DIV, [a, b], (3,), "int64")
    real = sketch.op(K.DIV, [a, b], (3,), "float32")
    got = sketch.run(whole, real)
    close(got[0], torch.div(sketch.of(a), sketch.of(b), rounding_mode="trunc"))
    close(got[1], sketch.of(a) / sketch.of(b))


def test_comparisons_and_logic_give_booleans() -> None:
    sketch = Sketch()
    a, b = sketch.input(4, 6, dtype=torch.int64), sketch.input(4, 6, dtype=torch.int64)
    less, same = sketch.op(K.LESS, [a, b], (4, 6), "bool"), sketch.op(K.EQUAL, [a, b], (4, 6), "bool")
    both = sketch.op(K.LOGICAL_OR, [less, same], (4, 6), "bool")
    neither = sketch.op(K.LOGICAL_NOT, [both], (4, 6), "bool")
    got = sketch.run(both, neither)
    close(got[0], sketch.of(a) <= sketch.of(b))
    close(got[1], sketch.of(a) > sketch.of(b))


def test_a_literal_takes_the_type_of_what_it_is_compared_with() -> None:
    sketch = Sketch()
    x, zero = sketch.input(4, 6), sketch.constant(torch.tensor(0))
    close(sketch.run(sketch.op(K.GREATER, [x, zero], (4, 6), "bool")), sketch.of(x) > 0)


def test_where_picks_by_a_boolean() -> None:
    sketch = Sketch()
    mask, a = sketch.input(4, 6, dtype=torch.bool), sketch.input(4, 6)
    low = sketch.constant(torch.tensor(-5.0))
    close(sketch.run(sketch.op(K.WHERE, [mask, a, low], (4, 6))), torch.where(sketch.of(mask), sketch.of(a), -5.0))


def test_casts_truncate_and_count_booleans() -> None:
    sketch = Sketch()
    x, mask = sketch.input(3, 4), sketch.input(3, 4, dtype=torch.bool)
    whole = sketch.op(K.CAST, [x], (3, 4), "int64", dtype="int64")
    number = sketch.op(K.CAST, [mask], (3, 4), "float32", dtype="float32")
    truth = sketch.op(K.CAST, [x], (3, 4), "bool", dtype="bool")
    got = sketch.run(whole, number, truth)
    close(got[0], sketch.of(x).long())
    close(got[1], sketch.of(mask).float())
    close(got[2], sketch.of(x).bool())


def test_prelu_has_one_slope_for_each_channel() -> None:
    sketch = Sketch()
    x, slope = sketch.input(2, 5, 4, 4), sketch.param(5)
    close(sketch.run(sketch.op(K.PRELU, [x, slope], (2, 5, 4, 4))), F.prelu(sketch.of(x), sketch.of(slope)))


# ---- moving elements -----------------------------------------------------------------------------------------------

MOVES: dict[str, tuple[OpKind, tuple[int, ...], dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "reshape": (K.RESHAPE, (6, 20), {}, lambda x: x.reshape(6, 20)),
    "permute": (K.PERMUTE, (4, 2, 5, 3), {"perm": (2, 0, 3, 1)}, lambda x: x.permute(2, 0, 3, 1)),
    "swap": (K.PERMUTE, (2, 4, 3, 5), {"perm": (0, 2, 1, 3)}, lambda x: x.transpose(1, 2)),
    "slice": (
        K.SLICE,
        (2, 2, 3, 5),
        {"axes": (1, 2), "starts": (0, 1), "stops": (3, 1 << 62), "steps": (2, 1)},
        lambda x: x[:, 0:3:2, 1:],
    ),
    "slice_from_the_end": (
        K.SLICE,
        (2, 3, 2, 4),
        {"axes": (2, 3), "starts": (-2, 0), "stops": (1 << 62, -1), "steps": (1, 1)},
        lambda x: x[:, :, -2:, :-1],
    ),
    "slice_backwards": (
        K.SLICE,
        (2, 3, 4, 3),
        {"axes": (3,), "starts": (-1,), "stops": (-(1 << 62),), "steps": (-2,)},
        lambda x: x.flip(3)[..., ::2],
    ),
    "expand": (K.EXPAND, (7, 2, 3, 4, 5), {}, lambda x: x.expand(7, 2, 3, 4, 5)),
    "roll": (K.ROLL, (2, 3, 4, 5), {"axes": (2, 3), "shifts": (-1, 2)}, lambda x: x.roll((-1, 2), (2, 3))),
    "flip": (K.FLIP, (2, 3, 4, 5), {"axes": (1, 3)}, lambda x: x.flip((1, 3))),
    "pad": (K.PAD, (2, 3, 6, 6), {"pads": (0, 0, 2, 0, 0, 0, 0, 1), "value": 7.0},
            lambda x: F.pad(x, (0, 1, 2, 0), value=7.0)),
    "crop": (K.PAD, (2, 3, 4, 4), {"pads": (0, 0, 1, 0, 0, 0, -1, -1)}, lambda x: F.pad(x, (0, -1, 1, -1))),
    "reflect": (K.PAD, (2, 3, 6, 7), {"pads": (0, 0, 1, 1, 0, 0, 1, 1), "mode": "reflect"},
                lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "tile": (K.TILE, (2, 6, 4, 10), {"repeats": (1, 2, 1, 2)}, lambda x: x.repeat(1, 2, 1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_moves_put_elements_where_torch_does(name: str) -> None:
    kind, shape, attrs, reference = MOVES[name]
    sketch = Sketch()
    x = sketch.input(2, 3, 4, 5)
    close(sketch.run(sketch.op(kind, [x], shape, **attrs)), reference(sketch.of(x)).contiguous(), atol=0.0)


def test_split_and_concat_undo_each_other() -> None:
    sketch = Sketch()
    x = sketch.input(2, 9, 4)
    first = sketch.op(K.SPLIT, [x], [(2, 2, 4), (2, 3, 4), (2, 4, 4)], axis=1, sizes=(2, 3, 4))
    parts = first.producer.outputs if first.producer else []
    whole = sketch.op(K.CONCAT, parts, (2, 9, 4), axis=1)
    got = sketch.run(whole, parts[1])
    close(got[0], sketch.of(x), atol=0.0)
    close(got[1], sketch.of(x)[:, 2:5].contiguous(), atol=0.0)


def test_gather_counts_negative_indices_from_the_end() -> None:
    sketch = Sketch()
    x, at = sketch.input(3, 7, 2), sketch.given(torch.tensor([[0, -1], [6, 2]]))
    fixed = sketch.constant(torch.tensor([5, -2]))
    got = sketch.run(
        sketch.op(K.GATHER, [x, at], (3, 2, 2, 2), axis=1), sketch.op(K.GATHER, [x, fixed], (3, 2, 2), axis=1)
    )
    close(got[0], sketch.of(x)[:, sketch.of(at)], atol=0.0)
    close(got[1], sketch.of(x)[:, [5, 5]], atol=0.0)


def test_embedding_looks_rows_up_by_int64_and_by_int32() -> None:
    sketch = Sketch()
    table = sketch.param(11, 6)
    wide, narrow = sketch.input(2, 4, dtype=torch.int64), sketch.input(3, dtype=torch.int32)
    got = sketch.run(sketch.op(K.EMBEDDING, [table, wide], (2, 4, 6)), sketch.op(K.EMBEDDING, [table, narrow], (3, 6)))
    close(got[0], F.embedding(sketch.of(wide), sketch.of(table)), atol=0.0)
    close(got[1], F.embedding(sketch.of(narrow).long(), sketch.of(table)), atol=0.0)


def test_values_made_out_of_nothing_are_folded() -> None:
    sketch = Sketch()
    x = sketch.input(2, 40)
    filled = sketch.op(K.FULL, [], (40,), value=2.0)
    counted = sketch.op(K.ARANGE, [], (40,), "float32", start=1, step=2)
    y = sketch.op(K.MUL, [x, sketch.op(K.ADD, [filled, counted], (40,))], (2, 40))
    close(sketch.run(y), sketch.of(x) * (2 + torch.arange(1.0, 81.0, 2.0)))


# ---- reductions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("axes", "keep"), [((1,), False), ((0, 2), True), ((), False)])
def test_reductions_over_some_axes_or_all(axes: tuple[int, ...], keep: bool) -> None:
    sketch = Sketch()
    x = sketch.input(3, 4, 5)
    over = axes or (0, 1, 2)
    kinds: dict[OpKind, Any] = {K.MEAN: torch.mean, K.SUM: torch.sum, K.AMAX: torch.amax, K.AMIN: torch.amin}
    wanted = [reference(sketch.of(x), over, keepdim=keep) for reference in kinds.values()]
    shape = tuple(wanted[0].shape)
    outputs = [sketch.op(kind, [x], shape, axes=axes, keepdims=keep) for kind in kinds]
    for got, want in zip(sketch.run(*outputs), wanted, strict=True):
        close(got, want)


def test_a_boolean_sum_counts() -> None:
    sketch = Sketch()
    mask = sketch.input(3, 8, dtype=torch.bool)
    close(sketch.run(sketch.op(K.SUM, [mask], (3,), "int64", axes=(1,))), sketch.of(mask).sum(1))


def test_argmax_and_cumsum_along_an_axis() -> None:
    sketch = Sketch()
    x, ids = sketch.input(3, 7), sketch.input(3, 7, dtype=torch.int64)
    best = sketch.op(K.ARGMAX, [x], (3,), "int64", axes=(1,))
    running = sketch.op(K.CUMSUM, [ids], (3, 7), "int64", axis=1)
    got = sketch.run(best, running)
    close(got[0], sketch.of(x).argmax(1))
    close(got[1], sketch.of(ids).cumsum(1))


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("log", [False, True])
def test_softmax_along_any_axis(axis: int, log: bool) -> None:
    sketch = Sketch()
    x = sketch.input(2, 6, 33)
    reference = F.log_softmax if log else F.softmax
    close(sketch.run(sketch.op(K.SOFTMAX, [x], (2, 6, 33), axis=axis, log=log)), reference(sketch.of(x), axis))


# ---- products ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_linear_with_its_whole_epilogue(dtype: torch.dtype) -> None:
    sketch = Sketch()
    name = str(dtype).removeprefix("torch.")
    x, residual = sketch.input(2, 5, 24, dtype=dtype), sketch.input(2, 5, 40, dtype=dtype)
    weight, bias = sketch.param(40, 24, dtype=dtype), sketch.param(40, dtype=dtype)
    y = sketch.op(K.FUSED_LINEAR, [x, weight, bias, residual], (2, 5, 40), name, inner="gelu", outer="relu")
    exact = F.gelu(F.linear(sketch.of(x).double(), sketch.of(weight).double(), sketch.of(bias).double()))
    want = torch.relu(exact + sketch.of(residual).double()).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    close(sketch.run(y), want, rtol=tolerance, atol=tolerance)


def test_linear_of_a_weight_that_is_not_transposed_and_of_one_row() -> None:
    sketch = Sketch()
    x, weight = sketch.input(1, 24), sketch.param(24, 50)
    close(
        sketch.run(sketch.op(K.LINEAR, [x, weight, None], (1, 50), transpose_weight=False)),
        sketch.of(x) @ sketch.of(weight),
    )


def test_linear_of_a_weight_that_is_computed() -> None:
    sketch = Sketch()
    x, weight = sketch.input(3, 24), sketch.input(50, 24)
    close(sketch.run(sketch.op(K.LINEAR, [x, weight, None], (3, 50))), F.linear(sketch.of(x), sketch.of(weight)))


def test_matmul_broadcasts_batches() -> None:
    sketch = Sketch()
    a, b = sketch.input(2, 3, 4, 5), sketch.input(3, 5, 6)
    close(sketch.run(sketch.op(K.MATMUL, [a, b], (2, 3, 4, 6))), sketch.of(a) @ sketch.of(b))


def test_einsum_follows_its_equation() -> None:
    sketch = Sketch()
    a, b = sketch.input(2, 3, 4), sketch.input(4, 5)
    y = sketch.op(K.EINSUM, [a, b], (2, 5, 3), equation="bij, jk -> bki")
    close(sketch.run(y), torch.einsum("bij,jk->bki", sketch.of(a), sketch.of(b)))


@pytest.mark.parametrize("mask", ["none", "additive", "keep"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_under_each_kind_of_mask(mask: str, causal: bool) -> None:
    if causal and mask != "none":
        pytest.skip("torch takes one or the other")
    sketch = Sketch()
    q, k, v = (sketch.input(2, 4, 9, 16) for _ in range(3))
    extra: list[Value] = []
    if mask == "additive":
        extra = [sketch.input(2, 1, 1, 9)]
    elif mask == "keep":
        keep = torch.rand(2, 1, 9, 9) > 0.3
        keep[..., 0] = True
        extra = [sketch.given(keep)]
    y = sketch.op(K.ATTENTION, [q, k, v, *extra], (2, 4, 9, 16), scale=0.25, causal=causal)
    given = sketch.of(extra[0]) if extra else None
    want = F.scaled_dot_product_attention(sketch.of(q), sketch.of(k), sketch.of(v), given, scale=0.25, is_causal=causal)
    close(sketch.run(y), want)


def test_attention_shares_key_heads_among_query_heads() -> None:
    sketch = Sketch()
    q, k, v = sketch.input(1, 6, 5, 8), sketch.input(1, 2, 7, 8), sketch.input(1, 2, 7, 8)
    y = sketch.op(K.ATTENTION, [q, k, v], (1, 6, 5, 8), scale=1 / math.sqrt(8))
    want = F.scaled_dot_product_attention(sketch.of(q), sketch.of(k), sketch.of(v), enable_gqa=True)
    close(sketch.run(y), want)


# ---- norms ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layer_norm_with_and_without_its_affine_part(dtype: torch.dtype) -> None:
    sketch = Sketch()
    name = str(dtype).removeprefix("torch.")
    x, weight, bias = sketch.input(2, 7, 48, dtype=dtype), sketch.param(48, dtype=dtype), sketch.param(48, dtype=dtype)
    sketch.tensors[x.name] = sketch.of(x) + 5
    affine = sketch.op(K.LAYER_NORM, [x, weight, bias], (2, 7, 48), name, axis=2, eps=1e-6)
    plain = sketch.op(K.LAYER_NORM, [x, None, None], (2, 7, 48), name, axis=1, eps=1e-3)
    got = sketch.run(affine, plain)
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}[dtype]
    want = F.layer_norm(sketch.of(x).float(), (48,), sketch.of(weight).float(), sketch.of(bias).float(), 1e-6)
    close(got[0], want.to(dtype), rtol=tolerance, atol=tolerance)
    want = F.layer_norm(sketch.of(x).float(), (7, 48), eps=1e-3)
    close(got[1], want.to(dtype), rtol=tolerance, atol=tolerance)


def test_rms_norm_does_not_centre() -> None:
    sketch = Sketch()
    x, weight = sketch.input(2, 7, 48), sketch.param(48)
    y = sketch.op(K.RMS_NORM, [x, weight], (2, 7, 48), axis=2, eps=1e-6)
    close(sketch.run(y), F.rms_norm(sketch.of(x), (48,), sketch.of(weight), 1e-6))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_add_norm_gives_the_norm_and_the_sum(norm: str) -> None:
    sketch = Sketch()
    x, residual, weight = sketch.input(2, 7, 48), sketch.input(2, 7, 48), sketch.param(48)
    bias = sketch.param(48) if norm == "layer" else None
    y = sketch.op(K.ADD_NORM, [x, residual, weight, bias], [(2, 7, 48), (2, 7, 48)], norm=norm, axis=2, eps=1e-5)
    total = sketch.of(x) + sketch.of(residual)
    outputs = y.producer.outputs if y.producer else []
    got = sketch.run(*outputs)
    if bias is None:
        close(got[0], F.rms_norm(total, (48,), sketch.of(weight), 1e-5))
    else:
        close(got[0], F.layer_norm(total, (48,), sketch.of(weight), sketch.of(bias), 1e-5))
    close(got[1], total, atol=0.0)


def test_add_norm_of_a_residual_that_broadcasts() -> None:
    sketch = Sketch()
    x, residual = sketch.input(2, 7, 48), sketch.input(1, 7, 48)
    y = sketch.op(K.ADD_NORM, [x, residual, None, None], [(2, 7, 48), (2, 7, 48)], axis=2)
    close(sketch.run(y), F.layer_norm(sketch.of(x) + sketch.of(residual), (48,)))


def test_batch_norm_is_a_scale_and_a_shift_of_each_channel() -> None:
    sketch = Sketch()
    x, weight, bias, mean = sketch.input(2, 6, 5, 5), sketch.param(6), sketch.param(6), sketch.param(6)
    var = sketch.constant(torch.rand(6) + 0.5)
    y = sketch.op(K.BATCH_NORM, [x, weight, bias, mean, var], (2, 6, 5, 5), eps=1e-3)
    of = sketch.of
    close(sketch.run(y), F.batch_norm(of(x), of(mean), of(var), of(weight), of(bias), eps=1e-3))


def test_group_and_instance_norm() -> None:
    sketch = Sketch()
    x, weight, bias = sketch.input(2, 6, 5, 5), sketch.param(6), sketch.param(6)
    grouped = sketch.op(K.GROUP_NORM, [x, weight, bias], (2, 6, 5, 5), groups=3)
    alone = sketch.op(K.INSTANCE_NORM, [x, weight, bias], (2, 6, 5, 5))
    got = sketch.run(grouped, alone)
    of = sketch.of
    close(got[0], F.group_norm(of(x), 3, of(weight), of(bias)))
    close(got[1], F.instance_norm(of(x), weight=of(weight), bias=of(bias)))


def test_local_response_norm_over_neighbouring_channels() -> None:
    sketch = Sketch()
    x = sketch.input(2, 7, 4, 4)
    y = sketch.op(K.LOCAL_RESPONSE_NORM, [x], (2, 7, 4, 4), size=5, alpha=0.1, beta=0.75, bias=2.0)
    close(sketch.run(y), F.local_response_norm(sketch.of(x), 5, 0.1, 0.75, 2.0))
