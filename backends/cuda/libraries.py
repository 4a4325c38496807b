"""Regions computed by vendor libraries, as functions that a compiled program calls: through torch, on its stream.

    call = LibraryCall("linear", ("a", "b", "bias", "y"), (("activation", "relu"),))
    call.function()(a, b, bias, y)                   # torch tensors; y is written

A program names one global function, `rescompile.library`, and gives it the call as text. What a library allocates comes
from torch's allocator: inside a captured graph from the graph's own pool. torch is imported by the first call; TVM is
not needed at all.

    function      library                              extra traffic beside the region's own
    linear        cuBLASLt, epilogue bias, relu, gelu  none
    linear_add    cuBLASLt, beta = 1, the residual (with the bias in it) copied into y first: one write and one read
    matmul        cuBLAS, batched                      none
    matmul_add    cuBLAS, beta = 1, as linear_add
    conv          cuDNN                                bias and activation in passes of their own over y
    conv_act      cuDNN, epilogue bias and relu        the result is copied into y: torch has no variant that writes it
    conv_add_act  cuDNN, epilogue bias, add and relu   the same copy
    attention     flash, memory-efficient or cuDNN     the same copy
    norm          torch's kernels                      the sum is read again
    softmax       torch's kernel                       none

These costs are inside what is timed when a library is a candidate.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any, TypeAlias

from rescompile.errors import RescompileError

Settings: TypeAlias = dict[str, Any]
Tensors: TypeAlias = dict[str, Any]

GLOBAL = "rescompile.library"


@dataclass(frozen=True)
class LibraryCall:
    """A function of this module, the buffers that it is given in order, and its settings."""

    function_name: str
    buffers: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        told = ", ".join(f"{name}={value}" for name, value in self.settings if name in _TOLD)
        return f"library {self.function_name}{f'({told})' if told else ''}"

    def text(self) -> str:
        """As JSON, for a program to carry."""
        return json.dumps([self.function_name, self.buffers, self.settings])

    @staticmethod
    def parse(text: str) -> LibraryCall:
        """What `text` wrote. RescompileError for anything else."""
        try:
            name, buffers, settings = json.loads(text)
            call = LibraryCall(str(name), tuple(buffers), tuple((str(key), value) for key, value in settings))
        except (ValueError, TypeError) as error:
            raise RescompileError(f"The program calls a library in words that cannot be read: {error}.") from error
        if call.function_name not in FUNCTIONS:
            raise RescompileError(
                f"The program calls the library function '{call.function_name}', which this version of rescompile "
                f"does not have: compile the model again."
            )
        return call

    def function(self, as_torch: Callable[[Any], Any] | None = None) -> Callable[..., None]:
        """The call on buffers in order; `as_torch` makes torch tensors of them where they are something else."""
        run, settings, names = FUNCTIONS[self.function_name], dict(self.settings), self.buffers

        def call(*buffers: Any) -> None:
            given = buffers if as_torch is None else map(as_torch, buffers)
            run(settings, dict(zip(names, given, strict=True)))

        return call


_TOLD = ("activation", "kernel", "backend")


def register() -> None:
    """Let programs of this process find the libraries. Needs TVM's FFI; torch is imported by the first call."""
    import tvm_ffi

    tvm_ffi.register_global_func(GLOBAL, _called_by_a_program, override=True)


def _called_by_a_program(text: str, *buffers: Any) -> None:
    _parsed(text)(*buffers)


@cache
def _parsed(text: str) -> Callable[..., None]:
    try:
        import torch
    except ImportError as error:
        raise RescompileError(
            "The program calls torch's libraries, and torch is not installed here: install it, or compile the model "
            "without libraries."
        ) from error
    return LibraryCall.parse(text).function(torch.utils.dlpack.from_dlpack)


# ---- contractions ----------------------------------------------------------------------------------------------


def _linear(settings: Settings, t: Tensors) -> None:
    """y = act(a·bᵀ + bias)"""
    import torch

    a, b, y, bias = *_matrices(settings, t), t.get("bias")
    activation = settings["activation"]
    with _Tf32(a):
        if bias is not None and activation in ("relu", "gelu_tanh"):
            torch.ops.aten._addmm_activation.out(bias, a, b, use_gelu=activation == "gelu_tanh", out=y)
            return
        if bias is not None:
            torch.addmm(bias, a, b, out=y)
        else:
            torch.mm(a, b, out=y)
    _activate(y, activation)


def _linear_add(settings: Settings, t: Tensors) -> None:
    """y = act(a·bᵀ + (residual + bias)): beta = 1 with y as C"""
    import torch

    a, b, y = _matrices(settings, t)
    _start(t, y)
    with _Tf32(a):
        torch.addmm(y, a, b, out=y)
    _activate(y, settings["activation"])


def _matmul(settings: Settings, t: Tensors) -> None:
    """y[s] = a[s]·b[s]ᵀ"""
    import torch

    a, b = _batched(settings, t)
    with _Tf32(a):
        torch.bmm(a, b, out=t["y"])
    _activate(t["y"], settings["activation"])


def _matmul_add(settings: Settings, t: Tensors) -> None:
    """y[s] = a[s]·b[s]ᵀ + residual[s]"""
    import torch

    a, b = _batched(settings, t)
    y = t["y"]
    _start(t, y)
    with _Tf32(a):
        torch.baddbmm(y, a, b, out=y)
    _activate(y, settings["activation"])


def _start(t: Tensors, y: Any) -> None:
    """y = residual + bias, what beta = 1 adds to."""
    import torch

    residual = t["residual"].reshape(y.shape)
    if t.get("bias") is None:
        y.copy_(residual)
    else:
        torch.add(residual, t["bias"], out=y)


def _matrices(settings: Settings, t: Tensors) -> tuple[Any, Any, Any]:
    """a [rows, depth], b [depth, columns], y [rows, columns]; of a convolution that reads one pixel, its pixels."""
    a, b = _factor(settings, t, "a"), _factor(settings, t, "b")
    return a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]).mT, t["y"].reshape(-1, t["y"].shape[-1])


def _factor(settings: Settings, t: Tensors, name: str) -> Any:
    """[..., extent, depth]"""
    return t[name] if settings[f"{name}_depth_last"] else t[name].mT


def _batched(settings: Settings, t: Tensors) -> tuple[Any, Any]:
    a, b = (_factor(settings, t, name) for name in ("a", "b"))
    count = t["y"].shape[0]
    shared = [part.expand(count, *part.shape[-2:]) if part.ndim == 2 or part.shape[0] == 1 else part for part in (a, b)]
    return shared[0], shared[1].mT


# ---- convolutions, channels last -------------------------------------------------------------------------------


def _conv(settings: Settings, t: Tensors) -> None:
    """y = act(conv(x) + bias + residual): the convolution alone is the library's"""
    import torch

    x, weight, y = _images(settings, t)
    with _Tf32(x):
        made = torch.conv2d(
            x, weight, None, settings["stride"], settings["padding"], settings["dilation"], settings["groups"]
        )
    rest = [t[name] for name in ("bias", "residual") if name in t]
    rest = [part.reshape(1, -1, 1, 1) if part.ndim == 1 else _channels_first(part, y) for part in rest]
    y.copy_(reduce(torch.add, rest, made) if rest else made)
    _activate(y, settings["activation"])


def _conv_act(settings: Settings, t: Tensors) -> None:
    """y = relu(conv(x) + bias)"""
    import torch

    x, weight, y = _images(settings, t)
    geometry = (settings["stride"], settings["padding"], settings["dilation"], settings["groups"])
    with _Tf32(x):
        y.copy_(torch.ops.aten.cudnn_convolution_relu(x, weight, t.get("bias"), *geometry))


def _conv_add_act(settings: Settings, t: Tensors) -> None:
    """y = relu(conv(x) + bias + residual)"""
    import torch

    x, weight, y = _images(settings, t)
    geometry = (settings["stride"], settings["padding"], settings["dilation"], settings["groups"])
    residual = _channels_first(t["residual"], y)
    with _Tf32(x):
        y.copy_(torch.ops.aten.cudnn_convolution_add_relu(x, weight, residual, 1.0, t.get("bias"), *geometry))


def _images(settings: Settings, t: Tensors) -> tuple[Any, Any, Any]:
    """x, weight and y as torch has them, their memory channels last."""
    x, weight = t["a"].permute(0, 3, 1, 2), t["b"].permute(0, 3, 1, 2)
    height, width = settings["out"]
    y = t["y"].reshape(x.shape[0], height, width, -1).permute(0, 3, 1, 2)
    return x, weight, y


def _channels_first(part: Any, y: Any) -> Any:
    return part.reshape(y.shape[0], *y.shape[2:], -1).permute(0, 3, 1, 2)


# ---- attention, rows -------------------------------------------------------------------------------------------


def _attention(settings: Settings, t: Tensors) -> None:
    """y = softmax(scale·q·kᵀ + mask)·v"""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    heads, kv_heads = settings["heads"], settings["kv_heads"]
    if "qkv" in t:
        whole = t["qkv"].unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
        q, k, v = whole.split([heads, kv_heads, kv_heads], 1)
    else:
        q, k, v = (t[name] if settings["layout"] == "bhsd" else t[name].transpose(1, 2) for name in "qkv")
    with sdpa_kernel([getattr(SDPBackend, name) for name in settings["backend"].split("+")]):
        made = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, t.get("mask"), is_causal=settings["causal"], scale=settings["scale"], enable_gqa=kv_heads != heads
        )
    y = t["y"] if settings["out_layout"] == "bhsd" else t["y"].transpose(1, 2)
    y.copy_(made)


def _norm(settings: Settings, t: Tensors) -> None:
    """sum = x + residual; y = N(sum)"""
    import torch

    x = t["x"]
    if "residual" in t:
        x = torch.add(x, t["residual"], out=t["sum"]) if "sum" in t else x + t["residual"]
    width = [x.shape[-1]]
    weight, bias, eps = t.get("weight"), t.get("bias"), settings["eps"]
    if settings["kind"] == "layer":
        t["y"].copy_(torch.nn.functional.layer_norm(x, width, weight, bias, eps))
    else:
        t["y"].copy_(torch.nn.functional.rms_norm(x, width, weight, eps))


def _softmax(settings: Settings, t: Tensors) -> None:
    """y = softmax(x), or its logarithm"""
    import torch

    run = torch.log_softmax if settings["log"] else torch.softmax
    if t["x"].dtype == t["y"].dtype:
        run(t["x"], -1, out=t["y"])
    else:
        t["y"].copy_(run(t["x"], -1, dtype=torch.float32))


# ---- shared ----------------------------------------------------------------------------------------------------


def _activate(y: Any, activation: str) -> None:
    """y = act(y), in place"""
    import torch

    if activation == "none":
        return
    if activation.startswith("gelu"):
        y.copy_(torch.nn.functional.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none"))
    elif activation == "silu":
        torch.nn.functional.silu(y, inplace=True)
    else:
        getattr(torch, f"{activation}_")(y)


class _Tf32:
    """float32 factors are multiplied as tf32 while this is entered, as in our own kernels; nothing else changes."""

    def __init__(self, like: Any) -> None:
        import torch

        switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
        self.switches = switches if like.dtype == torch.float32 else ()

    def __enter__(self) -> None:
        self.before = [switch.allow_tf32 for switch in self.switches]
        for switch in self.switches:
            switch.allow_tf32 = True

    def __exit__(self, *_: object) -> None:
        for switch, before in zip(self.switches, self.before, strict=True):
            switch.allow_tf32 = before


FUNCTIONS: dict[str, Callable[[Settings, Tensors], None]] = {
    "linear": _linear,
    "linear_add": _linear_add,
    "matmul": _matmul,
    "matmul_add": _matmul_add,
    "conv": _conv,
    "conv_act": _conv_act,
    "conv_add_act": _conv_add_act,
    "attention": _attention,
    "norm": _norm,
    "softmax": _softmax,
}
