"""Regions for tests of GPU kernels: written down briefly, run on the simulated GPU, and computed by torch in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import tvm

from rescompile.backends.cuda import region_kernel
from rescompile.backends.cuda.executable import cuda_source
from rescompile.backends.cuda.region_spec import BYTES, RegionSpec, Tensor
from rescompile.backends.cuda.region_tile import RegionTile
from rescompile.backends.cuda.targets import architecture, cuda_target
from rescompile.fused_region import Region, Step
from rescompile.fx_fused import _fused_region
from rescompile.kinds import OpKind
from tests import simulated_gpu

Written = tuple[OpKind, Sequence[int | None], dict[str, Any]] | tuple[OpKind, Sequence[int | None]]
DYNAMIC = 5  # what a named extent is when a test runs
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bool": torch.bool,
    "int64": torch.int64,
}
# Against float64: float32 inside, one rounding of each result, and of what is normalised.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}


@dataclass
class Case:
    """A region and one of the ways to run it."""

    operands: Sequence[tuple[Any, ...]]  # shape, dtype, and the order of the dimensions in memory
    steps: Sequence[Written]
    outputs: Sequence[tuple[int, tuple[Any, ...]]]  # the value and its shape, dtype, order
    tile: int = 0
    arch: str = "sm_90"
    chosen: RegionTile | None = None
    given: list[torch.Tensor] = field(default_factory=list)

    @property
    def spec(self) -> RegionSpec:
        steps = tuple(Step(step[0], tuple(step[1]), step[2] if len(step) > 2 else {}) for step in self.steps)
        region = Region(len(self.operands), steps, tuple(value for value, _ in self.outputs))
        made = tuple(Tensor(*tensor) for _, tensor in self.outputs)
        return RegionSpec(region.text(), tuple(Tensor(*tensor) for tensor in self.operands), made)

    @property
    def launch(self) -> RegionTile:
        tiles = region_kernel.candidates(self.spec, architecture(self.arch))
        return self.chosen or tiles[min(self.tile, len(tiles) - 1)]


def source_of(cases: dict[str, Case]) -> str:
    """CUDA source of all cases, as one module."""
    made = {}
    for name, case in cases.items():
        assert not region_kernel.refusal(case.spec, architecture(case.arch)), name
        made[name] = region_kernel.prim_func(case.spec, case.launch, name)
    return cuda_source(tvm.compile(tvm.IRModule(made), target=cuda_target("sm_90")).mod)


def inputs(case: Case) -> list[torch.Tensor]:
    """Random operands, in the program's shapes; a mean far from zero, which a one-pass variance would not survive."""
    random = torch.Generator().manual_seed(len(case.steps))
    made = []
    for index, tensor in enumerate(case.spec.operands):
        shape = [DYNAMIC if isinstance(dim, str) else dim for dim in tensor.shape]
        value = torch.randn(shape, generator=random) + (3 if index == 0 else 0)
        if tensor.dtype == "bool":
            made.append(value > 0)
        elif tensor.dtype == "int64":
            made.append((value * 10).to(torch.int64))
        else:
            made.append(value.to(DTYPES[tensor.dtype]))
    for step in case.spec.region.steps:
        if step.kind is OpKind.BATCH_NORM and step.inputs[4] is not None:
            made[step.inputs[4]] = made[step.inputs[4]].abs() + 0.5
    return made


def expected(case: Case, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What torch computes in float64."""
    wide = [value.double() if value.is_floating_point() else value for value in given]
    steps = tuple(
        Step(
            step.kind,
            step.inputs,
            {**step.attrs, "dtype": "float64"} if "float" in str(step.attrs.get("dtype")) else step.attrs,
        )
        for step in case.spec.region.steps
    )
    region = Region(case.spec.region.operands, steps, case.spec.region.outputs)
    return _fused_region(wide, "", region.text())


def run(case: Case, name: str, source: str, library: bytes, given: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs of a case on the simulated GPU."""
    spec, tile = case.spec, case.launch

    def lying(value: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
        return (value.permute(*order) if order else value).contiguous()

    outputs = []
    for tensor in spec.outputs:
        shape = [DYNAMIC if isinstance(dim, str) else dim for dim in tensor.lying]
        empty = torch.full(shape, torch.nan) if "float" in tensor.dtype else torch.ones(shape)
        outputs.append(empty.to(DTYPES[tensor.dtype]))
    buffers = {f"x{i}_flat": lying(x, spec.operands[i].order) for i, x in enumerate(given)}
    buffers |= {f"y{i}_flat": y for i, y in enumerate(outputs)}
    names = simulated_gpu.parameters(source, f"{name}_kernel")
    arrays = [buffers[part].reshape(-1).view(torch.uint8).numpy() for part in names if part in buffers]
    scalars = [DYNAMIC for part in names if part not in buffers]
    rows = region_kernel.Trace(spec).space.rows
    count = rows.number * DYNAMIC ** len(rows.names)
    dims = (-(-count // tile.rows) * tile.parts, 1, 1, tile.threads, tile.rows, 1)
    shared = 16 * tile.span * tile.chunks if tile.streams else 4096
    cluster = tile.parts if region_kernel.Trace(spec).norms else 1
    simulated_gpu.launch(library, f"{name}_kernel", arrays, scalars, dims, shared, cluster)
    back = []
    for tensor, value in zip(spec.outputs, outputs, strict=True):
        order = tensor.order
        inverse = [order.index(axis) for axis in range(len(order))]
        back.append(value.permute(*inverse) if order else value)
    return back


def check(case: Case, name: str, source: str, library: bytes) -> None:
    """The simulated GPU's outputs are torch's."""
    given = inputs(case)
    got = run(case, name, source, library, given)
    for tensor, have, want in zip(case.spec.outputs, got, expected(case, given), strict=True):
        if tensor.dtype not in TOLERANCE:
            assert torch.equal(have, want.to(have.dtype)), name
            continue
        limit = TOLERANCE[tensor.dtype]
        torch.testing.assert_close(have.double(), want.double(), rtol=limit, atol=limit, msg=lambda m: f"{name}: {m}")


def full(shape: tuple[Any, ...], dtype: str = "float32", order: tuple[int, ...] = ()) -> tuple[Any, ...]:
    """An operand or output as `Case` has it."""
    assert dtype in BYTES
    return shape, dtype, order
