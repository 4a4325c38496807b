"""Runs kernels between guard elements and compares them with torch in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import tvm

from rescompile.backends import kernels
from rescompile.backends.kernels import ConvSpec, Epilogue, LinearSpec, Machine, Tile

HOST = Machine.host(threads=2)
GUARD = 67  # elements on each side of every buffer; odd, so that buffers have no more alignment than their type
TOLERANCE = {"float32": 1e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1e-2}

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
}


@dataclass
class Case:
    """A spec, its inputs in the kernel's order (None: the weight, packed for each tile), and what must come out."""

    spec: kernels.Spec
    inputs: list[torch.Tensor | None]
    expected: list[torch.Tensor]
    weight: torch.Tensor | None = None


def check(cases: Sequence[Case], machine: Machine = HOST, every_tile: bool = False) -> None:
    """Builds all kernels as one module; each output must equal the expected one within its type's tolerance."""
    jobs: list[tuple[Case, Tile]] = []
    functions: dict[tuple[kernels.Spec, Tile], tvm.tirx.PrimFunc] = {}
    for case in cases:
        tiles = kernels.candidates(case.spec, machine)
        for tile in tiles if every_tile else tiles[:1]:
            if (case.spec, tile) not in functions:
                functions[case.spec, tile] = kernels.prim_func(case.spec, tile, f"k{len(functions)}")
            jobs.append((case, tile))
    names = {key: f"k{i}" for i, key in enumerate(functions)}
    keys = list(functions)
    halves = [keys[::2], keys[1::2]] if len(keys) > 1 else [keys]
    with ThreadPoolExecutor(len(halves)) as pool:
        modules = [tvm.IRModule({names[key]: functions[key] for key in half}) for half in halves]
        built = list(pool.map(lambda module: tvm.compile(module, target=machine.tvm_target()), modules))
    where = {key: executable for half, executable in zip(halves, built, strict=True) for key in half}
    for case, tile in jobs:
        _check_one(where[case.spec, tile][names[case.spec, tile]], case, tile)


def _check_one(function: Callable[..., None], case: Case, tile: Tile) -> None:
    described = kernels.arguments(case.spec, tile)
    tensors = [case.weight if tensor is None else tensor for tensor in case.inputs]
    buffers = []
    for argument, tensor in zip(described, tensors, strict=False):
        assert tensor is not None
        value = packed(case.spec, tile, tensor) if argument.name == "weight" and case.weight is not None else tensor
        buffers.append(guarded(value))
    outputs = [argument for argument in described if argument.output]
    assert len(buffers) + len(outputs) == len(described)
    assert [argument.output for argument in described] == [False] * len(buffers) + [True] * len(outputs)
    for argument, expected in zip(outputs, case.expected, strict=True):
        buffers.append(guarded(torch.full(expected.shape, 123.0, dtype=getattr(torch, argument.dtype))))
    for argument, buffer in zip(described, buffers, strict=True):
        got = tuple(buffer[1].shape)
        assert len(got) == len(argument.shape), (argument, got)
        assert all(a in (None, g) for a, g in zip(argument.shape, got, strict=True)), (argument, got)
    function(*(view for _, view in buffers))
    for (arena, view), expected in zip(buffers[-len(outputs) :], case.expected, strict=True):
        edges = torch.cat([arena[:GUARD], arena[-GUARD:]])
        assert torch.isnan(edges).all(), f"{case.spec} {tile} writes outside its buffer"
        error = (view.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
        # `not <=` so that a NaN fails.
        assert not error.isnan(), f"{case.spec} {tile} reads outside its buffers"
        assert error <= TOLERANCE[case.spec.dtype], f"{case.spec} {tile}: relative error {float(error):.2e}"


def guarded(value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of the tensor between NaNs: the whole and the view."""
    if value.dtype in (torch.bool, torch.int64):
        return value, value.contiguous()
    arena = torch.full((value.numel() + 2 * GUARD,), float("nan"), dtype=value.dtype)
    view = arena[GUARD : GUARD + value.numel()].view(value.shape)
    view.copy_(value)
    return arena, view


def packed(spec: kernels.Spec, tile: Tile, weight: torch.Tensor) -> torch.Tensor:
    """The packed weight as a torch tensor."""
    assert isinstance(spec, ConvSpec | LinearSpec)
    array = kernels.pack_weight(spec, tile, weight.double().numpy())
    if spec.dtype == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def bordered(x: torch.Tensor, border: tuple[int, int]) -> torch.Tensor:
    """NHWC with a frame of zeros."""
    return F.pad(x, (0, 0, border[1], border[1], border[0], border[0]))


def finished(total: torch.Tensor, epilogue: Epilogue, bias: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """outer(residual + inner(total + bias)) in float64"""
    total = total + bias.double() if epilogue.bias else total
    total = ACTIVATIONS[epilogue.inner](total)
    total = total + residual.double() if epilogue.residual else total
    return ACTIVATIONS[epilogue.outer](total)


def conv_case(spec: ConvSpec) -> Case:
    """Random numbers for a convolution, and torch's result."""
    dtype = getattr(torch, spec.dtype)
    x = torch.randn(spec.batch, spec.height, spec.width, spec.in_channels).to(dtype)
    weight = (torch.randn(spec.out_channels, spec.in_channels // spec.groups, *spec.kernel) * 0.3).to(dtype)
    bias = torch.randn(spec.out_channels).to(dtype)
    residual = torch.randn(spec.batch, spec.out_height, spec.out_width, spec.out_channels).to(dtype)
    top, left, bottom, right = spec.pads
    planes = F.pad(x.double().permute(0, 3, 1, 2), (left, right, top, bottom))
    total = F.conv2d(planes, weight.double(), None, spec.stride, 0, spec.dilation, spec.groups).permute(0, 2, 3, 1)
    expected = bordered(finished(total, spec.epilogue, bias, residual), spec.out_border)
    inputs: list[torch.Tensor | None] = [bordered(x, spec.in_border), None]
    inputs += [bias] if spec.epilogue.bias else []
    inputs += [bordered(residual, spec.residual_border)] if spec.epilogue.residual else []
    return Case(spec, inputs, [expected], weight)


def linear_case(spec: LinearSpec, rows: int | None = None) -> Case:
    """Random numbers for a linear, and torch's result; `rows` for a spec that leaves them open."""
    count = spec.rows or rows
    assert count is not None
    dtype = getattr(torch, spec.dtype)
    x = torch.randn(count, spec.in_features).to(dtype)
    weight = torch.randn(spec.out_features, spec.in_features).to(dtype)
    bias, residual = torch.randn(spec.out_features).to(dtype), torch.randn(count, spec.out_features).to(dtype)
    expected = finished(F.linear(x.double(), weight.double()), spec.epilogue, bias, residual)
    inputs: list[torch.Tensor | None] = [x, None]
    inputs += [bias] if spec.epilogue.bias else []
    inputs += [residual] if spec.epilogue.residual else []
    return Case(spec, inputs, [expected], weight)
