"""A fused region's program computed by torch, step by step, from its text: see `reference`.

Values that the program makes in between stay in the type that is computed in; a CAST step rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, TypeAlias

Plain: TypeAlias = dict[str, Any]
Wide: TypeAlias = Callable[[Any], Any]

_ATTRIBUTES: Plain = {"approximate": "none", "slope": 0.01, "min": None, "max": None, "scales": None, "alpha": 1.0}
_ATTRIBUTES |= {"eps": 1e-5, "axis": -1}


def region(spec: Plain, given: Mapping[str, Any], wide: Wide) -> dict[str, Any] | None:
    """The outputs y0, y1, ... for operands x0, x1, ..., all as they lie; None where a step is not known here."""
    program = json.loads(spec["steps"])
    steps = [(step[0], step[1], step[2] if len(step) > 2 else {}) for step in program["steps"]]
    if any(kind not in KNOWN for kind, _, _ in steps):
        return None
    values = [
        wide(_logical(given[f"x{index}"], tensor["order"])) if _is_float(given[f"x{index}"]) else given[f"x{index}"]
        for index, tensor in enumerate(spec["operands"])
    ]
    for kind, inputs, attrs in steps:
        values.append(step_value(kind, attrs, [None if i is None else values[i] for i in inputs], wide))
    made = {}
    for index, (value, tensor) in enumerate(zip(program["outputs"], spec["outputs"], strict=True)):
        found = values[value]
        made[f"y{index}"] = found.permute(tensor["order"]) if tensor["order"] else found
    return made


def step_value(kind: str, attrs: Plain, inputs: Sequence[Any], wide: Wide) -> Any:
    """One operation by the name of its kind. KeyError for a kind that is not known here."""
    import torch

    attrs = {**_ATTRIBUTES, **attrs}
    if kind == "full":
        return torch.tensor(attrs["value"], dtype=wide(torch.zeros(1)).dtype)
    if kind == "cast":
        cast = inputs[0].to(getattr(torch, attrs["dtype"]))
        return wide(cast) if cast.is_floating_point() else cast
    function = {**_elementwise(), **_views(), **_norms()}[kind]
    return function(attrs, *_on_one_device(inputs))


def _on_one_device(inputs: Sequence[Any]) -> list[Any]:
    """Literals follow the tensors that they meet."""
    like = next((value for value in inputs if value is not None and value.ndim), None)
    return [
        value if value is None or value.ndim or like is None else value.to(like.device, like.dtype) for value in inputs
    ]


def _is_float(tensor: Any) -> bool:
    return bool(tensor.is_floating_point())


def _logical(tensor: Any, order: Sequence[int]) -> Any:
    if not order:
        return tensor
    return tensor.permute([list(order).index(axis) for axis in range(len(order))])


def _elementwise() -> dict[str, Callable[..., Any]]:
    import torch
    import torch.nn.functional as f

    plain: dict[str, Callable[..., Any]] = {
        "identity": lambda x: x, "mul": lambda *xs: reduce(torch.mul, xs), "div": torch.div, "pow": torch.pow,
        "maximum": lambda *xs: reduce(torch.maximum, xs), "minimum": lambda *xs: reduce(torch.minimum, xs),
        "neg": torch.neg, "abs": torch.abs, "exp": torch.exp, "log": torch.log, "sqrt": torch.sqrt,
        "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "erf": torch.erf, "sin": torch.sin, "cos": torch.cos,
        "floor": torch.floor, "ceil": torch.ceil, "round": torch.round, "sign": torch.sign, "relu": f.relu,
        "silu": f.silu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "hardswish": f.hardswish, "mish": f.mish,
        "softplus": f.softplus, "prelu": lambda x, slope: torch.where(x > 0, x, x * slope),
        "where": lambda chosen, x, y: torch.where(chosen != 0, x, y),
    }  # fmt: skip
    return {
        **{kind: _without_attributes(function) for kind, function in plain.items()},
        "add": _add,
        "gelu": lambda attrs, x: f.gelu(x, approximate=str(attrs["approximate"])),
        "clip": lambda attrs, x: x if attrs["min"] is attrs["max"] is None else x.clamp(attrs["min"], attrs["max"]),
        "leaky_relu": lambda attrs, x: f.leaky_relu(x, float(attrs["slope"])),
        "elu": lambda attrs, x: f.elu(x, float(attrs["alpha"])),
        "hardsigmoid": lambda attrs, x: (x * attrs.get("alpha", 1 / 6) + attrs.get("beta", 0.5)).clamp(0, 1),
    }


def _views() -> dict[str, Callable[..., Any]]:
    import torch

    return {
        "reshape": lambda attrs, x: x.reshape([-1 if isinstance(n, str) else n for n in attrs["shape"]]),
        "permute": lambda attrs, x: x.permute(attrs["perm"]),
        "slice": _slice,
        "roll": lambda attrs, x: x.roll(tuple(attrs["shifts"]), tuple(attrs["axes"])),
        "flip": lambda attrs, x: x.flip(tuple(attrs["axes"])),
        "concat": lambda attrs, *xs: torch.cat(xs, attrs["axis"]),
    }


def _slice(attrs: Plain, x: Any) -> Any:
    steps = attrs.get("steps") or [1] * len(attrs["axes"])
    index = [slice(None)] * x.ndim
    for axis, start, stop, step in zip(attrs["axes"], attrs["starts"], attrs["stops"], steps, strict=True):
        index[axis] = slice(start, stop, step)
    return x[tuple(index)]


def _norms() -> dict[str, Callable[..., Any]]:
    import torch.nn.functional as f

    def over(axis: int, x: Any) -> list[int]:
        return list(x.shape[axis % x.ndim :])

    return {
        "layer_norm": lambda attrs, x, weight=None, bias=None: f.layer_norm(
            x, over(attrs["axis"], x), weight, bias, attrs["eps"]
        ),
        "rms_norm": lambda attrs, x, weight=None: f.rms_norm(x, over(attrs["axis"], x), weight, attrs["eps"]),
        "group_norm": lambda attrs, x, weight=None, bias=None: f.group_norm(
            x, attrs["groups"], weight, bias, attrs["eps"]
        ),
        "instance_norm": lambda attrs, x, weight=None, bias=None: f.instance_norm(
            x, weight=weight, bias=bias, eps=attrs["eps"]
        ),
    }


def _add(attrs: Plain, *terms: Any) -> Any:
    scales = attrs["scales"] or [1.0] * len(terms)
    # A factor of one is none: it would be a kernel of its own where this is measured as torch's own speed.
    scaled = [term if scale == 1 else term * scale for term, scale in zip(terms, scales, strict=True)]
    return reduce(lambda left, right: left + right, scaled)


def _without_attributes(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda attrs, *inputs: function(*inputs)


KNOWN = frozenset(
    (
        "identity", "mul", "div", "pow", "maximum", "minimum", "neg", "abs", "exp", "log", "sqrt", "rsqrt",
        "reciprocal", "erf", "sin", "cos", "floor", "ceil", "round", "sign", "relu", "silu", "sigmoid", "tanh",
        "hardswish", "mish", "softplus", "prelu", "where", "add", "gelu", "clip", "leaky_relu", "elu", "hardsigmoid",
        "full", "cast", "reshape", "permute", "slice", "roll", "flip", "concat",
        "layer_norm", "rms_norm", "group_norm", "instance_norm",
    )
)  # fmt: skip
