"""Spellings of `nn.Module` calls, as `torch.fx.symbolic_trace` leaves them: the functional form of each module.

The tensors that a module holds become arguments through their path in the module tree (`Attr`), so a graph of module
calls shows the same operands as one that torch.export made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx, nn
from torch.nn.utils import parametrize

from rescompile.fx_ops import Attr, Call

Arguments = dict[str, Any]
Reader = Callable[[Any, Callable[[str], Attr | None]], tuple[str, Arguments] | None]


def _plain(name: str, **attributes: str) -> Reader:
    """`name(input, ...)` with arguments that are attributes of the module."""

    def read(module: Any, _: Any) -> tuple[str, Arguments]:
        arguments = {argument: getattr(module, attribute) for argument, attribute in attributes.items()}
        if getattr(module, "inplace", False):
            arguments["inplace"] = True
        return name, arguments

    return read


def _conv(module: Any, tensor: Any) -> tuple[str, Arguments] | None:
    if module.padding_mode != "zeros":
        return None
    arguments = {"weight": tensor("weight"), "bias": tensor("bias"), "groups": module.groups}
    arguments.update(stride=module.stride, padding=module.padding, dilation=module.dilation)
    if not module.transposed:
        return f"conv{len(module.kernel_size)}d", arguments
    return f"conv_transpose{len(module.kernel_size)}d", {**arguments, "output_padding": module.output_padding}


def _linear(_: Any, tensor: Any) -> tuple[str, Arguments]:
    return "linear", {"weight": tensor("weight"), "bias": tensor("bias")}


def _batch_norm(module: Any, tensor: Any) -> tuple[str, Arguments]:
    mean, var = tensor("running_mean"), tensor("running_var")
    arguments = {"weight": tensor("weight"), "bias": tensor("bias"), "running_mean": mean, "running_var": var}
    return "batch_norm", {
        **arguments,
        "eps": module.eps,
        "momentum": module.momentum,
        "training": module.training or mean is None,
    }


def _instance_norm(module: Any, tensor: Any) -> tuple[str, Arguments]:
    statistics = module.training or tensor("running_mean") is None
    arguments = {"weight": tensor("weight"), "bias": tensor("bias"), "eps": module.eps}
    return "instance_norm", {**arguments, "use_input_stats": statistics}


def _layer_norm(module: Any, tensor: Any) -> tuple[str, Arguments]:
    shape = list(module.normalized_shape)
    arguments = {"weight": tensor("weight"), "bias": tensor("bias"), "eps": module.eps}
    return "layer_norm", {"normalized_shape": shape, **arguments}


def _rms_norm(module: Any, tensor: Any) -> tuple[str, Arguments]:
    shape = list(module.normalized_shape)
    return "rms_norm", {"normalized_shape": shape, "weight": tensor("weight"), "eps": module.eps}


def _group_norm(module: Any, tensor: Any) -> tuple[str, Arguments]:
    arguments = {"weight": tensor("weight"), "bias": tensor("bias"), "eps": module.eps}
    return "group_norm", {"num_groups": module.num_groups, **arguments}


def _dropout(module: Any, _: Any) -> tuple[str, Arguments]:
    return "dropout", {"p": module.p, "training": module.training, "inplace": module.inplace}


def _embedding(_: Any, tensor: Any) -> tuple[str, Arguments]:
    return "embedding_module", {"weight": tensor("weight")}


def _prelu(_: Any, tensor: Any) -> tuple[str, Arguments]:
    return "prelu", {"weight": tensor("weight")}


def _clip(lowest: float, highest: float) -> Reader:
    def read(module: Any, _: Any) -> tuple[str, Arguments]:
        return "hardtanh", {"min_val": lowest, "max_val": highest, "inplace": module.inplace}

    return read


def _recurrent(module: Any, tensor: Any) -> tuple[str, Arguments]:
    mode = module.mode.lower()
    return "recurrent", {"mode": mode, "params": [tensor(name) for name in module._flat_weights_names]}


def _pad(mode: str) -> Reader:
    def read(module: Any, _: Any) -> tuple[str, Arguments]:
        padding = module.padding
        return "pad", {"pad": list(padding), "mode": mode, "value": getattr(module, "value", 0.0)}

    return read


def _max_pool(dims: int) -> Reader:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    return _plain(f"max_pool{dims}d", **{name: name for name in names}, return_indices="return_indices")


def _avg_pool(dims: int) -> Reader:
    names = ["kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"]
    if dims > 1:
        names.append("divisor_override")
    return _plain(f"avg_pool{dims}d", **{name: name for name in names})


MODULES: dict[type[nn.Module], Reader] = {
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _conv),
    **dict.fromkeys((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _conv),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _batch_norm),
    **dict.fromkeys((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _instance_norm),
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), _recurrent),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout), _dropout),
    nn.Linear: _linear,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.LocalResponseNorm: _plain("local_response_norm", size="size", alpha="alpha", beta="beta", k="k"),
    nn.Embedding: _embedding,
    nn.PReLU: _prelu,
    nn.Identity: _plain("identity"),
    nn.ReLU: _plain("relu"),
    nn.ReLU6: _clip(0.0, 6.0),
    nn.Hardtanh: _plain("hardtanh", min_val="min_val", max_val="max_val"),
    nn.LeakyReLU: _plain("leaky_relu", negative_slope="negative_slope"),
    nn.ELU: _plain("elu", alpha="alpha"),
    nn.GELU: _plain("gelu", approximate="approximate"),
    nn.SiLU: _plain("silu"),
    nn.Mish: _plain("mish"),
    nn.Sigmoid: _plain("sigmoid"),
    nn.Tanh: _plain("tanh"),
    nn.Hardsigmoid: _plain("hardsigmoid"),
    nn.Hardswish: _plain("hardswish"),
    nn.Softplus: _plain("softplus", beta="beta", threshold="threshold"),
    nn.Softmax: _plain("softmax", dim="dim"),
    nn.LogSoftmax: _plain("log_softmax", dim="dim"),
    nn.Flatten: _plain("flatten", start_dim="start_dim", end_dim="end_dim"),
    nn.Unflatten: _plain("unflatten", dim="dim", sizes="unflattened_size"),
    nn.PixelShuffle: _plain("pixel_shuffle", upscale_factor="upscale_factor"),
    nn.PixelUnshuffle: _plain("pixel_unshuffle", downscale_factor="downscale_factor"),
    nn.ChannelShuffle: _plain("channel_shuffle", groups="groups"),
    nn.Upsample: _plain("interpolate", mode="mode", align_corners="align_corners"),
    nn.UpsamplingNearest2d: _plain("interpolate", mode="mode", align_corners="align_corners"),
    nn.UpsamplingBilinear2d: _plain("interpolate", mode="mode", align_corners="align_corners"),
    nn.ZeroPad2d: _pad("constant"),
    nn.ConstantPad1d: _pad("constant"),
    nn.ConstantPad2d: _pad("constant"),
    nn.ReflectionPad1d: _pad("reflect"),
    nn.ReflectionPad2d: _pad("reflect"),
    nn.ReplicationPad2d: _pad("replicate"),
    nn.MaxPool1d: _max_pool(1),
    nn.MaxPool2d: _max_pool(2),
    nn.MaxPool3d: _max_pool(3),
    nn.AvgPool1d: _avg_pool(1),
    nn.AvgPool2d: _avg_pool(2),
    nn.AvgPool3d: _avg_pool(3),
    nn.AdaptiveAvgPool1d: _plain("adaptive_avg_pool1d", output_size="output_size"),
    nn.AdaptiveAvgPool2d: _plain("adaptive_avg_pool2d", output_size="output_size"),
    nn.AdaptiveAvgPool3d: _plain("adaptive_avg_pool3d", output_size="output_size"),
}


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks) or parametrize.is_parametrized(module)


def spell_module(module: nn.Module, path: str, node: fx.Node) -> Call | None:
    """The functional form of a module call; None for a module that is unknown, or that hooks have changed."""
    read = MODULES.get(type(module))
    if read is None or _has_hooks(module):
        return None

    def tensor(name: str) -> Attr | None:
        return Attr(f"{path}.{name}") if getattr(module, name, None) is not None else None

    found = read(module, tensor)
    if found is None:
        return None
    name, arguments = found
    given = list(node.args) or list(node.kwargs.values())
    if len(given) != 1 and name != "recurrent":
        return None
    if name == "recurrent":
        arguments["hx"] = given[1] if len(given) > 1 else None
    return Call(name, {"input": given[0], **arguments}, "input" if arguments.get("inplace") else "")


def is_known(module: nn.Module) -> bool:
    """Whether calls of the module are read into a kind."""
    return type(module) in MODULES and not _has_hooks(module)
