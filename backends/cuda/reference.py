"""What a spec means, computed by torch in float64: the judge of kernels and libraries, on a GPU or a processor.

A spec comes as plain data (`described`), so that a machine that runs compiled kernels needs neither TVM nor the modules
that made them. A value that the graph rounds between two steps is rounded here too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeAlias

from rescompile.backends.cuda.reference_steps import region, step_value

Plain: TypeAlias = dict[str, Any]
Tensors: TypeAlias = Mapping[str, Any]
Wide: TypeAlias = Callable[[Any], Any]  # a tensor in the type that is computed in


def described(spec: Any) -> Plain:
    """A frozen spec as plain data: its fields, and its class as `type`."""
    plain: Plain = _plain(spec)
    return plain


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        named = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return {"type": type(value).__name__, **named}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def evaluate(spec: Plain, inputs: Tensors) -> dict[str, Any] | None:
    """The outputs of a spec by name in float64, for inputs by name; None for a spec that is not known here."""
    return _outputs(spec, inputs, lambda tensor: tensor.double())


def eager(spec: Plain, inputs: Tensors) -> dict[str, Any] | None:
    """The same by torch's own operations in the inputs' types, as a model in torch computes it: something to beat."""
    return _outputs(spec, inputs, lambda tensor: tensor)


def _outputs(spec: Plain, inputs: Tensors, wide: Wide) -> dict[str, Any] | None:
    rule = _RULES.get(spec["type"])
    return None if rule is None else rule(spec, inputs, wide)


# ---- rows ------------------------------------------------------------------------------------------------------


def _norm(spec: Plain, given: Tensors, wide: Wide) -> dict[str, Any]:
    import torch

    total = given["x"]
    if spec["residual"]:
        total = total + given["residual"]  # rounded as the graph's own add rounds it
    weight, bias = (wide(given[name]) if spec[name] else None for name in ("weight", "bias"))
    width, eps = (spec["width"],), spec["eps"]
    total = wide(total)
    if spec["kind"] == "layer":
        y = torch.nn.functional.layer_norm(total, width, weight, bias, eps)
    else:
        y = torch.nn.functional.rms_norm(total, width, weight, eps)
    return {"y": y, **({"sum": total} if spec["sum_output"] else {})}


def _softmax(spec: Plain, given: Tensors, wide: Wide) -> dict[str, Any]:
    import torch

    x = wide(given["x"])
    y = torch.log_softmax(x, -1) if spec["log"] else torch.softmax(x, -1)
    if spec["floor"] is not None and not spec["log"]:
        y = y * (x.amax(-1, keepdim=True) > spec["floor"])
    return {"y": y}


# ---- windows, channels last ------------------------------------------------------------------------------------


def _pool(spec: Plain, given: Tensors, wide: Wide) -> dict[str, Any]:
    import torch

    window = spec["window"]
    top, left, bottom, right = window["pads"]
    x = wide(given["x"]).permute(0, 3, 1, 2)
    outside = float("-inf") if spec["kind"] == "max" else 0.0
    x = torch.nn.functional.pad(x, (left, right, top, bottom), value=outside)
    x = _reached(x, window, outside)
    sizes = window["kernel"], window["stride"]
    if spec["kind"] == "max":
        y = torch.nn.functional.max_pool2d(x, *sizes, 0, window["dilation"])
    else:
        y = torch.nn.functional.avg_pool2d(x, *sizes, 0, divisor_override=1)
        y = y / _counts(spec, y, given["x"])
    return {"y": y.permute(0, 2, 3, 1)}


def _reached(x: Any, window: Plain, outside: float) -> Any:
    """x with what a window reaches past the padding, where it may (`ceil`)."""
    import torch

    more = []
    for axis, size in ((1, x.shape[3]), (0, x.shape[2])):
        reach = (window["kernel"][axis] - 1) * window["dilation"][axis] + 1
        more += [0, max(0, (_extent(window, axis) - 1) * window["stride"][axis] + reach - size)]
    return torch.nn.functional.pad(x, more, value=outside) if any(more) else x


def _counts(spec: Plain, y: Any, like: Any) -> Any:
    """How many elements each mean is of: padding counts or not; what lies past it never does."""
    import torch

    window = spec["window"]
    top, left, bottom, right = window["pads"]
    ones = torch.ones(1, 1, window["height"], window["width"], dtype=torch.float64, device=like.device)
    padding = 1.0 if spec["count_include_pad"] else 0.0
    ones = torch.nn.functional.pad(ones, (left, right, top, bottom), value=padding)
    counts = torch.nn.functional.avg_pool2d(
        _reached(ones, window, 0.0), window["kernel"], window["stride"], 0, divisor_override=1
    )
    return counts.to(y.dtype)


def _extent(window: Plain, axis: int) -> int:
    size, before, after = window[("height", "width")[axis]], window["pads"][axis], window["pads"][axis + 2]
    spare = size + before + after - (window["kernel"][axis] - 1) * window["dilation"][axis] - 1
    stride = window["stride"][axis]
    count = (-(-spare // stride) if window["ceil"] else spare // stride) + 1
    return int(count - 1 if window["ceil"] and (count - 1) * stride >= size + before else count)


def _global_mean(spec: Plain, given: Tensors, wide: Wide) -> dict[str, Any]:
    return {"y": wide(given["x"]).mean(1)}


def _depthwise(spec: Plain, given: Tensors, wide: Wide) -> dict[str, Any]:
    """y = outer(residual + inner(conv(x) + bias)), one filter for each channel"""
    import torch

    window, epilogue = spec["window"], spec["epilogue"]
    top, left, bottom, right = window["pads"]
    x = torch.nn.functional.pad(wide(given["x"]).permute(0, 3, 1, 2), (left, right, top, bottom))
    weight = wide(given["weight"]).T.reshape(window["channels"], 1, *window["kernel"])
    bias = wide(given["bias"]) if epilogue["bias"] else None
    y = torch.nn.functional.conv2d(
        x, weight, bias, window["stride"], 0, window["dilation"], window["channels"]
    ).permute(0, 2, 3, 1)
    y = _activated(epilogue["inner"], y, wide)
    if epilogue["residual"]:
        y = y + wide(given["residual"])
    return {"y": _activated(epilogue["outer"], y, wide)}


def _activated(name: str, x: Any, wide: Wide) -> Any:
    if name == "none":
        return x
    if name == "relu6":
        return x.clamp(0, 6)
    attrs = {"approximate": "tanh" if name == "gelu_tanh" else "none"}
    return step_value(name.removesuffix("_tanh") if name.startswith("gelu") else name, attrs, [x], wide)


# ---- attention -------------------------------------------------------------------------------------------------


def _attention(spec: Plain, given: Tensors, wide: Wide) -> dict[str, Any]:
    import torch

    batch, heads, kv_heads, size = spec["batch"], spec["heads"], spec["kv_heads"], spec["head_dim"]
    if spec["layout"] == "qkv":
        whole = given["qkv"].reshape(batch, spec["q_len"], heads + 2 * kv_heads, size).transpose(1, 2)
        q, k, v = whole.split([heads, kv_heads, kv_heads], 1)
    else:
        q, k, v = (given[name] if spec["layout"] == "bhsd" else given[name].transpose(1, 2) for name in "qkv")
    k, v = (wide(part.repeat_interleave(heads // kv_heads, 1)) for part in (k, v))
    scores = wide(q) @ k.transpose(-1, -2) * spec["scale"]
    if spec["causal"]:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~seen, float("-inf"))
    if spec["mask"] == "additive":
        scores = scores + wide(given["mask"])
    elif spec["mask"] == "keep":
        scores = scores.masked_fill(~given["mask"], float("-inf"))
    y = torch.softmax(scores, -1).nan_to_num(0.0) @ v
    return {"y": y if spec["out_layout"] == "bhsd" else y.transpose(1, 2)}


# ---- contractions ----------------------------------------------------------------------------------------------


def _contraction(spec: Plain, given: Tensors, wide: Wide) -> dict[str, Any]:
    """acc[s, i, j] = sum over k of a[s, i, k]·b[s, j, k], then the epilogue's steps."""
    sums = _sums(spec, wide(given["a"]), wide(given["b"]))
    program = spec["epilogue"]
    values = [sums]
    for operand in program["operands"]:
        values.append(_broadcast(spec, operand, wide(given[operand["name"]]), sums.shape))
    for step in program["steps"]:
        attrs = {str(name): value for name, value in step["attrs"]}
        values.append(step_value(step["kind"], attrs, [values[place] for place in step["inputs"]], wide))
    return {
        output["name"]: values[output["value"]].expand(sums.shape).reshape(_result_shape(spec, sums))
        for output in program["outputs"]
    }


def _sums(spec: Plain, a: Any, b: Any) -> Any:
    """[batch, rows, columns]; of a convolution [1, images·pixels, channels]."""
    import torch

    conv = spec["conv"]
    if conv is not None:
        top, left, bottom, right = conv["pads"]
        x = torch.nn.functional.pad(a.permute(0, 3, 1, 2), (left, right, top, bottom))
        groups = spec["batch"] or 1
        y = torch.nn.functional.conv2d(
            x, b.permute(0, 3, 1, 2), None, conv["stride"], 0, conv["dilation"], groups
        ).permute(0, 2, 3, 1)
        return y.reshape(1, -1, y.shape[-1])
    a = a if spec["a_depth_last"] else a.transpose(-1, -2)
    b = b if spec["b_depth_last"] else b.transpose(-1, -2)
    left_, right_ = (_repeated(part, spec[f"{name}_share"]) for name, part in (("a", a), ("b", b)))
    sums = left_ @ right_.transpose(-1, -2)
    return sums.reshape(-1, *sums.shape[-2:])


def _repeated(part: Any, share: int) -> Any:
    return part.repeat_interleave(share, 0) if share > 1 and part.ndim == 3 else part


def _broadcast(spec: Plain, operand: Plain, value: Any, shape: Sequence[int]) -> Any:
    """An operand against [batch, rows, columns]."""
    import torch

    batch, rows, columns = shape
    lead = batch if operand["batch"] and batch > 1 else 1
    value = value.reshape(lead, -1, columns if operand["column"] else 1)
    if operand["row"]:
        index = torch.arange(rows, device=value.device) // operand["row_step"]
        index = index % operand["row_cycle"] if operand["row_cycle"] else index
        value = value[:, index]
    return value


def _result_shape(spec: Plain, sums: Any) -> tuple[int, ...]:
    batch, rows, columns = sums.shape
    if spec["conv"] is not None:
        conv = spec["conv"]
        pixels = _out(conv, 0) * _out(conv, 1)
        return rows // pixels, pixels, columns
    return (rows, columns) if spec["batch"] == 1 else (batch, rows, columns)


def _out(conv: Plain, axis: int) -> int:
    size = int(conv[("height", "width")[axis]])
    reach = (conv["kernel"][axis] - 1) * conv["dilation"][axis] + 1
    return int((size + conv["pads"][axis] + conv["pads"][axis + 2] - reach) // conv["stride"][axis] + 1)


_RULES: dict[str, Callable[[Plain, Tensors, Wide], dict[str, Any] | None]] = {
    "NormSpec": _norm,
    "RowSoftmax": _softmax,
    "AttentionSpec": _attention,
    "ContractionSpec": _contraction,
    "RegionSpec": region,
    "Pool": _pool,
    "GlobalMean": _global_mean,
    "Depthwise": _depthwise,
}

KNOWN = frozenset(_RULES)
