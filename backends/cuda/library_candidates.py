"""Which library calls compute a spec: an epilogue that one of them has, or that it can be brought to.

y = outer(inner(acc + bias) + residual)     as an epilogue program; anything else has no library candidate
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rescompile.backends.cuda.libraries import LibraryCall
from rescompile.kinds import OpKind

_ACTIVATIONS = {
    OpKind.RELU: "relu",
    OpKind.SILU: "silu",
    OpKind.SIGMOID: "sigmoid",
    OpKind.TANH: "tanh",
}
_HALF = ("float16", "bfloat16")
_FLASH_HEAD = 256  # the widest head of torch's flash attention


def library_candidates(spec: Any, buffers: tuple[str, ...]) -> list[LibraryCall]:
    """The calls that compute a spec on its buffers in order; none for a spec that no library computes."""
    rule = _RULES.get(type(spec).__name__)
    return [] if rule is None else rule(spec, buffers)


@dataclass(frozen=True)
class SimpleEpilogue:
    """y = outer(inner(acc + bias) + residual): names of the operands, of the output, and activations."""

    output: str
    bias: str | None = None
    residual: str | None = None
    inner: str = "none"
    outer: str = "none"


def simple(spec: Any) -> SimpleEpilogue | None:
    """The program of a contraction's epilogue as the libraries have it; None where it is another."""
    program = spec.epilogue
    if len(program.outputs) != 1 or program.outputs[0].dtype != spec.dtype:
        return None
    operands = {1 + index: operand for index, operand in enumerate(program.operands)}
    if any(operand.dtype != spec.dtype for operand in operands.values()):
        return None
    place, bias, residual, activations = 0, None, None, ["none", "none"]
    for index, step in enumerate(program.steps):
        result = 1 + len(operands) + index
        other = [source for source in step.inputs if source != place]
        if place not in step.inputs or len(step.inputs) - len(other) != 1:
            return None
        stage = 0 if residual is None else 1
        if step.kind is OpKind.CAST:  # what is rounded between two steps, a library does not round
            pass
        elif step.kind is OpKind.ADD and len(other) == 1 and other[0] in operands and not _scaled(step.settings):
            operand = operands[other[0]]
            if _by_column(operand) and bias is None and residual is None and activations[0] == "none":
                bias = operand.name
            elif _in_full(operand) and residual is None:
                residual = operand.name
            else:
                return None
        elif not other and activations[stage] == "none" and (name := _activation(step)) is not None:
            activations[stage] = name
        else:
            return None
        place = result
    if place != program.outputs[0].value or {bias, residual} - {None} != {op.name for op in operands.values()}:
        return None
    if residual is None:
        return SimpleEpilogue(program.outputs[0].name, bias, None, "none", activations[0])
    return SimpleEpilogue(program.outputs[0].name, bias, residual, *activations)


def _contraction(spec: Any, buffers: tuple[str, ...]) -> list[LibraryCall]:
    epilogue = simple(spec)
    if epilogue is None or epilogue.inner != "none":
        return []
    renamed = {epilogue.output: "y"}
    if epilogue.bias is not None:
        renamed[epilogue.bias] = "bias"
    if epilogue.residual is not None:
        renamed[epilogue.residual] = "residual"
    names = tuple(renamed.get(name, name) for name in buffers)
    if spec.conv is not None:
        return _convolution(spec, epilogue, names)
    settings = {
        "a_depth_last": spec.a_depth_last,
        "b_depth_last": spec.b_depth_last,
        "activation": epilogue.outer,
    }
    if spec.batch == 1:
        return [_call("linear" if epilogue.residual is None else "linear_add", names, settings)]
    shares = {spec.a_share, spec.b_share}
    if epilogue.bias is not None or not shares <= {0, 1}:
        return []
    return [_call("matmul" if epilogue.residual is None else "matmul_add", names, settings)]


def _convolution(spec: Any, epilogue: SimpleEpilogue, names: tuple[str, ...]) -> list[LibraryCall]:
    conv = spec.conv
    top, left, bottom, right = conv.pads
    if (top, left) != (bottom, right) or spec.batch is None:
        return []
    settings = {
        "stride": conv.stride,
        "padding": (top, left),
        "dilation": conv.dilation,
        "groups": spec.batch,
        "out": (conv.out_height, conv.out_width),
        "activation": epilogue.outer,
    }
    found = [_call("conv", names, settings)]
    if epilogue.outer == "relu" and epilogue.bias is not None:
        found.append(_call("conv_act" if epilogue.residual is None else "conv_add_act", names, settings))
    if conv.is_product and spec.batch == 1:
        flat = {"a_depth_last": True, "b_depth_last": True, "activation": epilogue.outer}
        found.append(_call("linear" if epilogue.residual is None else "linear_add", names, flat))
    return found


def _attention(spec: Any, buffers: tuple[str, ...]) -> list[LibraryCall]:
    settings = {name: getattr(spec, name) for name in ("heads", "kv_heads", "layout", "out_layout", "causal", "scale")}
    backends = ["EFFICIENT_ATTENTION"]
    if spec.dtype in _HALF:
        backends.append("CUDNN_ATTENTION")
        if spec.mask == "none" and spec.head_dim <= _FLASH_HEAD:
            backends.insert(0, "FLASH_ATTENTION")
    return [_call("attention", buffers, {**settings, "backend": backend}) for backend in backends]


def _norm(spec: Any, buffers: tuple[str, ...]) -> list[LibraryCall]:
    return [_call("norm", buffers, {"kind": spec.kind, "eps": spec.eps})]


def _region(spec: Any, buffers: tuple[str, ...]) -> list[LibraryCall]:
    """[sum = x + residual;] y = N(sum)·weight + bias: nothing else that memory bounds has a library."""
    steps = spec.region.steps
    count = spec.region.operands
    added = len(steps) == 2 and steps[0].kind is OpKind.ADD and steps[0].inputs == (0, 1)
    added = added and not _scaled(steps[0].attrs)
    norm = steps[-1]
    if len(steps) != 1 + added or norm.kind not in (OpKind.LAYER_NORM, OpKind.RMS_NORM):
        return []
    source = count if added else 0
    names = {0: "x", **({1: "residual"} if added else {})}
    for place, name in zip(norm.inputs[1:], ("weight", "bias"), strict=False):
        if place is not None:
            names[place] = name
    made = {count + len(steps) - 1: "y", **({source: "sum"} if added else {})}
    last = len(spec.operands[0].shape) - 1
    plain = not any(tensor.order for tensor in (*spec.operands, *spec.outputs))
    alike = len({tensor.dtype for tensor in (*spec.operands, *spec.outputs)}) == 1
    whole = spec.operands[0].shape == spec.operands[min(1, source)].shape if added else True
    if norm.inputs[0] != source or len(names) != count or norm.attrs["axis"] % (last + 1) != last:
        return []
    if not (plain and alike and whole) or any(value not in made for value in spec.region.outputs):
        return []
    called = (*(names[index] for index in range(count)), *(made[value] for value in spec.region.outputs))
    if "y" not in called:
        return []
    kind = "layer" if norm.kind is OpKind.LAYER_NORM else "rms"
    return [_call("norm", called, {"kind": kind, "eps": norm.attrs.get("eps", 1e-5)})]


def _softmax(spec: Any, buffers: tuple[str, ...]) -> list[LibraryCall]:
    return [] if spec.floor is not None else [_call("softmax", buffers, {"log": spec.log})]


def _call(name: str, buffers: tuple[str, ...], settings: Mapping[str, Any]) -> LibraryCall:
    return LibraryCall(name, buffers, tuple(settings.items()))


def _activation(step: Any) -> str | None:
    if step.kind is OpKind.GELU:
        return "gelu_tanh" if step.settings.get("approximate") == "tanh" else "gelu"
    return _ACTIVATIONS.get(step.kind)


def _scaled(attrs: Mapping[str, Any]) -> bool:
    scales: Sequence[float] = attrs.get("scales") or ()
    return any(scale != 1 for scale in scales)


def _by_column(operand: Any) -> bool:
    return operand.column and not operand.row and not operand.batch


def _in_full(operand: Any) -> bool:
    plain = operand.row_step == 1 and not operand.row_cycle
    return operand.column and operand.row and operand.batch and plain


_RULES: dict[str, Callable[[Any, tuple[str, ...]], list[LibraryCall]]] = {
    "ContractionSpec": _contraction,
    "AttentionSpec": _attention,
    "NormSpec": _norm,
    "RegionSpec": _region,
    "RowSoftmax": _softmax,
}
