"""Rules for what carries weights or works across positions: contractions, norms, pools, attention, look-ups."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from rescompile.fx_rules import Rule, Site, Step, is_number
from rescompile.kinds import OpKind as K


def tuple_of(argument: Any, count: int) -> tuple[int, ...] | None:
    """A per-dimension argument, for which torch takes one number too; None where an entry is symbolic."""
    values = (argument,) if isinstance(argument, int) else tuple(argument)
    if not all(isinstance(value, int) for value in values):
        return None
    return values * count if len(values) == 1 else values


def _conv_pads(padding: Any, kernel: tuple[Any, ...], dilation: tuple[int, ...]) -> tuple[int, ...] | None:
    if padding == "valid":
        return (0,) * (2 * len(kernel))
    if padding == "same":
        if not all(isinstance(extent, int) for extent in kernel):
            return None
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        # torch puts the odd element at the end
        begins = [t // 2 for t in total]
        return (*begins, *(t - b for t, b in zip(total, begins, strict=True)))
    each = tuple_of(padding, len(kernel))
    return None if each is None else each * 2


def _conv(c: Site) -> Step | None:
    weight = c.shape(c["weight"])
    dims = int(c.name[-2]) if c.name.endswith("d") else (len(weight) - 2 if weight is not None else 0)
    rank = c.rank()
    if dims <= 0 or (rank is not None and rank != dims + 2):
        return None
    kernel = tuple(weight[2:]) if weight is not None else (None,) * dims
    stride, dilation = tuple_of(c.get("stride", 1), dims), tuple_of(c.get("dilation", 1), dims)
    if stride is None or dilation is None or not isinstance(c.get("groups", 1), int):
        return None
    pads = _conv_pads(c.get("padding", 0), kernel, dilation)
    if pads is None:
        return None
    attrs: dict[str, Any] = {"stride": stride, "pads": pads, "dilation": dilation, "groups": c.get("groups", 1)}
    inputs = [c["input"], c["weight"], c.get("bias")]
    if not (c.name.startswith("conv_transpose") or c.get("transposed")):
        return Step(K.CONV, inputs, attrs)
    output_padding = tuple_of(c.get("output_padding", 0), dims)
    return Step(K.CONV_TRANSPOSE, inputs, {**attrs, "output_padding": output_padding})


def _is_weight(c: Site, argument: Any) -> bool:
    value = c.value(argument)
    return value is not None and value.constant and value.rank == 2


def _linear(c: Site) -> Step | None:
    weight, bias = c["weight"], c.get("bias")
    value = c.value(weight)
    if value is None or value.constant:
        return Step(K.LINEAR, [c["input"], weight, bias], {"transpose_weight": True})
    if value.rank != 2 or value.shape is None:
        return None
    turned = Step(K.PERMUTE, [weight], {"perm": (1, 0)}, suffix="t", types=c.retype((value.shape[1], value.shape[0])))
    if bias is None:
        return Step(K.MATMUL, [c["input"], turned])
    return Step(K.ADD, [Step(K.MATMUL, [c["input"], turned], suffix="matmul"), bias])


def _matmul(c: Site) -> Step:
    a, b = c["input"], c.get("mat2", c.get("other", c.get("vec2")))
    if _is_weight(c, b) and c.rank() != 1:
        return Step(K.LINEAR, [a, b], {"transpose_weight": False})
    return Step(K.MATMUL, [a, b])


def _addmm(c: Site) -> Step | None:
    """beta·x + alpha·(a·b): a linear with bias where x is a constant vector and b a weight, else a sum of two paths"""
    a, b = c.get("mat1", c.get("batch1")), c.get("mat2", c.get("batch2"))
    alpha, beta = c.get("alpha", 1), c.get("beta", 1)
    if not is_number(alpha) or not is_number(beta):
        return None
    weight = c.name == "addmm" and _is_weight(c, b)
    first = c.value(c["input"])
    if weight and alpha == 1 and beta == 1 and first is not None and first.constant and first.rank == 1:
        return Step(K.LINEAR, [a, b, c["input"]], {"transpose_weight": False})
    if weight:
        product = Step(K.LINEAR, [a, b], {"transpose_weight": False}, suffix="linear")
    else:
        product = Step(K.MATMUL, [a, b], suffix="matmul")
    return Step(
        K.ADD, [c["input"], product], {} if alpha == 1 and beta == 1 else {"scales": (float(beta), float(alpha))}
    )


def _addbmm(c: Site) -> Step | None:
    """beta·x + alpha·Σ(a·b), the sum over the batch"""
    alpha, beta = c.get("alpha", 1), c.get("beta", 1)
    left, right = c.shape(c["batch1"]), c.shape(c["batch2"])
    if not is_number(alpha) or not is_number(beta):
        return None
    shape = None if left is None or right is None else (left[0], left[1], right[2])
    product = Step(K.MATMUL, [c["batch1"], c["batch2"]], suffix="matmul", types=c.retype(shape))
    total = Step(K.SUM, [product], {"axes": (0,), "keepdims": False}, suffix="sum")
    return Step(K.ADD, [c["input"], total], {} if alpha == beta == 1 else {"scales": (float(beta), float(alpha))})


def _attention(c: Site) -> Step | None:
    """softmax(scale·q·kᵀ + mask)·v"""
    shape = c.shape(c["query"])
    scale = c.get("scale")
    if c.get("dropout_p", 0.0):
        return None
    if scale is None:
        if shape is None or not isinstance(shape[-1], int):
            return None
        scale = 1.0 / math.sqrt(shape[-1])
    mask = c.get("attn_mask", c.get("attn_bias"))
    inputs = [c["query"], c["key"], c["value"], mask]
    return Step(K.ATTENTION, inputs, {"scale": float(scale), "causal": bool(c.get("is_causal", False))})


def _batch_norm(c: Site) -> Step:
    training = bool(c.get("training", False))
    inputs = [c["input"], c.get("weight"), c.get("bias"), c.get("running_mean"), c.get("running_var")]
    return Step(K.BATCH_NORM, inputs, {"eps": float(c["eps"]), "training": training or inputs[3] is None})


def _instance_norm(c: Site) -> Step | None:
    if not c.get("use_input_stats", True):
        return None
    return Step(K.INSTANCE_NORM, [c["input"], c.get("weight"), c.get("bias")], {"eps": float(c["eps"])})


def _first_axis(c: Site) -> int:
    count = len(c["normalized_shape"])
    rank = c.rank()
    return -count if rank is None else rank - count


def _layer_norm(c: Site) -> Step:
    inputs = [c["input"], c.get("weight"), c.get("bias")]
    return Step(K.LAYER_NORM, inputs, {"axis": _first_axis(c), "eps": float(c.get("eps", 1e-5))})


def _rms_norm(c: Site) -> Step | None:
    eps = c.get("eps")
    if eps is None:
        weight = c.value(c.get("weight"))
        dtype = getattr(torch, c.out.dtype or (weight.dtype if weight is not None else None) or "", None)
        if dtype is None:
            return None
        # That of the type that torch computes in, which is not the operand's own in 16 bits.
        eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    return Step(K.RMS_NORM, [c["input"], c.get("weight")], {"axis": _first_axis(c), "eps": float(eps)})


def _group_norm(c: Site) -> Step:
    groups = c.get("num_groups", c.get("group"))
    inputs = [c["input"], c.get("weight"), c.get("bias")]
    return Step(K.GROUP_NORM, inputs, {"groups": groups, "eps": float(c.get("eps", 1e-5))})


def _local_response_norm(c: Site) -> Step:
    attrs = {"size": c["size"], "alpha": c.get("alpha", 1e-4), "beta": c.get("beta", 0.75), "bias": c.get("k", 1.0)}
    return Step(K.LOCAL_RESPONSE_NORM, [c["input"]], attrs)


def _pool(c: Site) -> tuple[int, dict[str, Any]] | None:
    digits = [character for character in c.name if character.isdigit()]
    dims = int(digits[0])
    if c.rank() not in (None, dims + 2):
        return None
    kernel = tuple_of(c["kernel_size"], dims)
    # An absent stride (None or []) is the kernel size.
    stride = kernel if not c.get("stride") else tuple_of(c["stride"], dims)
    padding = tuple_of(c.get("padding", 0), dims)
    if kernel is None or stride is None or padding is None:
        return None
    return dims, {"kernel": kernel, "stride": stride, "pads": padding * 2, "ceil_mode": bool(c.get("ceil_mode", False))}


def _max_pool(c: Site) -> Step | None:
    found = _pool(c)
    if found is None or c.get("return_indices"):
        return None
    dims, attrs = found
    dilation = tuple_of(c.get("dilation", 1), dims)
    return Step(K.MAX_POOL, [c["input"]], {**attrs, "dilation": dilation}) if dilation is not None else None


def _avg_pool(c: Site) -> Step | None:
    found = _pool(c)
    if found is None or c.get("divisor_override") is not None:
        return None
    attrs = {**found[1], "count_include_pad": bool(c.get("count_include_pad", True))}
    return Step(K.AVG_POOL, [c["input"]], attrs)


def _adaptive_avg_pool(c: Site) -> Step | None:
    dims = int(c.name[-2])
    wanted, shape = c["output_size"], c.shape()
    if c.rank() not in (None, dims + 2):
        return None
    sizes = [wanted] * dims if isinstance(wanted, int) or wanted is None else list(wanted)
    if len(sizes) == 1:
        sizes *= dims
    for position, size in enumerate(sizes):
        if size is None:
            sizes[position] = shape[2 + position] if shape is not None else None
    if not all(isinstance(size, int) for size in sizes):
        return None
    return Step(K.ADAPTIVE_AVG_POOL, [c["input"]], {"output_size": tuple(sizes)})


_MODES = {"nearest": "nearest", "bilinear": "linear", "linear": "linear", "trilinear": "linear", "bicubic": "cubic"}


def _interpolate(c: Site) -> Step | None:
    mode = c.get("mode") if c.name == "interpolate" else c.name.removeprefix("upsample_")[:-2]
    if mode not in _MODES or c.get("antialias"):
        return None
    return Step(
        K.INTERPOLATE, [c["input"]], {"mode": _MODES[mode], "align_corners": bool(c.get("align_corners", False))}
    )


def _embedding(c: Site) -> Step | None:
    indices = c["indices"] if "indices" in c.args else c["input"]
    if c.get("max_norm") is not None:
        return None
    return Step(K.EMBEDDING, [c["weight"], indices])


def _recurrent(c: Site) -> Step | None:
    mode = c.get("mode") or c.name
    weights = [c.get("hx"), *c["params"]]
    flat = [x for weight in weights for x in (weight if isinstance(weight, list | tuple) else [weight])]
    if c.name != "recurrent" and "data" in c.args:
        return None
    return Step(K.RECURRENT, [c["input"], *flat], {"mode": mode}, types=c.outs)


def _topk(c: Site) -> Step:
    extra = [c["k"]] if isinstance(c["k"], fx.Node) else []
    attrs = {"k": c["k"], "axis": c.axis(c.get("dim", -1)), "largest": c.get("largest", True)}
    return Step(K.TOPK, [c["input"], *extra], attrs, types=c.outs)


def _epilogue(c: Site) -> dict[str, Any]:
    return {"inner": c["inner"], "outer": c["outer"]}


def _fused_conv(c: Site) -> Step:
    attrs: dict[str, Any] = {name: tuple(c[name]) for name in ("stride", "pads", "dilation")}
    inputs = [c["input"], c["weight"], c["bias"], c["residual"]]
    return Step(K.FUSED_CONV, inputs, {**attrs, "groups": c["groups"], **_epilogue(c)})


def _fused_linear(c: Site) -> Step:
    inputs = [c["input"], c["weight"], c["bias"], c["residual"]]
    return Step(K.FUSED_LINEAR, inputs, {"transpose_weight": c["transpose_weight"], **_epilogue(c)})


def _add_norm(c: Site) -> Step:
    attrs = {"norm": c["norm"], "axis": c["dim"], "eps": c["eps"]}
    return Step(K.ADD_NORM, [c["input"], c["residual"], c["weight"], c["bias"]], attrs, types=c.outs)


def _fused_region(c: Site) -> Step:
    return Step(K.FUSED_REGION, list(c["input"]), {"label": c["label"], "steps": c["steps"]}, types=c.outs)


_CONVS = [f"{name}{dims}d" for name in ("conv", "conv_transpose") for dims in (1, 2, 3)]
_UPSAMPLES = ["upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"]
_UPSAMPLES += ["upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"]
_ATTENTIONS = ["scaled_dot_product_attention", "_scaled_dot_product_flash_attention_for_cpu"]
_ATTENTIONS += ["_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"]
_EVAL_NORMS = ["batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "_native_batch_norm_legit"]
_FFT = ["fft_fft", "fft_fft2", "fft_fftn", "fft_ifft", "fft_ifft2", "fft_rfft", "fft_rfft2", "fft_rfftn"]
_FFT += ["fft_irfft", "fft_irfft2", "fft_irfftn", "_fft_r2c", "_fft_c2c", "_fft_c2r"]

NN_RULES: dict[str, Rule] = {
    **dict.fromkeys([*_CONVS, "convolution"], _conv),
    "linear": _linear,
    **dict.fromkeys(("mm", "bmm", "matmul"), _matmul),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    "addbmm": _addbmm,
    "einsum": lambda c: Step(K.EINSUM, list(c["tensors"]), {"equation": c["equation"]}),
    **dict.fromkeys(_ATTENTIONS, _attention),
    **dict.fromkeys(_EVAL_NORMS, _batch_norm),
    "instance_norm": _instance_norm,
    **dict.fromkeys(("layer_norm", "native_layer_norm"), _layer_norm),
    "rms_norm": _rms_norm,
    **dict.fromkeys(("group_norm", "native_group_norm"), _group_norm),
    "local_response_norm": _local_response_norm,
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices"), _max_pool),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _avg_pool),
    **{f"{prefix}adaptive_avg_pool{dims}d": _adaptive_avg_pool for prefix in ("", "_") for dims in (1, 2, 3)},
    **dict.fromkeys(["interpolate", *_UPSAMPLES], _interpolate),
    **dict.fromkeys(("embedding", "embedding_module"), _embedding),
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu", "recurrent"), _recurrent),
    "topk": _topk,
    **dict.fromkeys(_FFT, lambda c: Step(K.FFT, [c["input"]])),
    "fused_conv": _fused_conv,
    "fused_linear": _fused_linear,
    "add_norm": _add_norm,
    "fused_region": _fused_region,
}
