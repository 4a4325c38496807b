"""What a region takes of a GPU at best, what generated loops move and compute, and how it is told."""

from __future__ import annotations

from typing import Any

import pytest

from rescompile.backends.roofline import GPUS, LAUNCH, gpu_of, named_gpu, predict, roofline
from rescompile.errors import RescompileError

tvm = pytest.importorskip("tvm")

from tvm import relax  # noqa: E402

from rescompile.backends.loop_costs import cost_of  # noqa: E402

H200 = named_gpu("h200")


def _region(**entries: Any) -> dict[str, Any]:
    return {"calls": 1, "tile": "", "dtype": "float16", "bytes": 0, "flops": 0, **entries}


def test_a_copy_is_bound_by_memory_at_the_measured_rate() -> None:
    found = predict(_region(bytes=int(4.3e9)), H200)
    assert (found.bound, found.microseconds) == ("memory", 1000.0)


@pytest.mark.parametrize(
    ("tile", "dtype", "unit", "rate"),
    [
        ("mma MmaTile(rows=128)", "bfloat16", "tensor cores", 790e12),
        ("library cublas", "float16", "tensor cores", 790e12),
        ("mma MmaTile(rows=128)", "float32", "tensor cores", 494.5e12 * 790 / 989),
        ("Matmul", "float16", "vector units", 67e12 * 0.9),
        ("mma MmaTile(rows=128)", "float64", "tensor cores", 67e12 * 0.45),
    ],
)
def test_a_product_is_bound_by_the_unit_that_computes_it(tile: str, dtype: str, unit: str, rate: float) -> None:
    found = predict(_region(bytes=1 << 20, flops=10**13, tile=tile, dtype=dtype), H200)
    assert found.bound == unit
    assert found.microseconds == pytest.approx(1e13 / rate * 1e6, rel=1e-3)


def test_a_small_region_is_bound_by_its_launch() -> None:
    found = predict(_region(bytes=4096, flops=4096), H200)
    assert (found.bound, found.microseconds) == ("launch", LAUNCH * 1e6)


def test_dynamic_extents_are_not_guessed() -> None:
    found = roofline([_region(bytes=None), _region(bytes=int(4.3e9), calls=3)], H200)
    assert found.unknown == 1
    assert found.microseconds == 3000.0
    assert found.bytes == 3 * int(4.3e9)
    assert found.bound == {"memory": 1.0}


def test_an_architecture_has_a_gpu_and_a_name_must_be_of_it() -> None:
    assert gpu_of("sm_90a") is H200
    assert gpu_of("sm_90", "H100") is GPUS["H100"]
    assert gpu_of("sm_75") is None
    with pytest.raises(RescompileError, match="is of architecture sm_80, and the program is for sm_90"):
        gpu_of("sm_90", "A100")
    with pytest.raises(RescompileError, match="did you mean 'H200'"):
        named_gpu("H20O")


def test_every_gpu_has_peaks_and_their_source() -> None:
    for gpu in GPUS.values():
        assert gpu.bandwidth > 1e11
        assert gpu.tensor16 > gpu.vector32 > 1e12
        assert gpu.source


def _functions() -> dict[str, Any]:
    builder = relax.BlockBuilder()
    kinds = {"x": ((4, 8), "float32"), "table": ((1000, 8), "float32"), "at": ((4,), "int64")}
    x, table, at = (relax.Var(name, relax.TensorType(shape, dtype)) for name, (shape, dtype) in kinds.items())
    with builder.function("main", [x, table, at]):
        y = builder.emit(relax.op.add(x, relax.op.take(table, at, axis=0)))
        builder.emit_func_output(builder.emit(relax.op.matmul(y, relax.op.permute_dims(table))))
    module = relax.transform.LegalizeOps()(builder.get())
    return {var.name_hint: f for var, f in module.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}


def test_generated_loops_tell_what_they_move_and_compute() -> None:
    costs = {name: cost_of(function) for name, function in _functions().items()}
    assert (costs["add"].bytes, costs["add"].flops) == (3 * 4 * 32, 32)
    assert costs["matmul"].flops == 2 * 4 * 8 * 1000
    assert costs["matmul"].bytes == 4 * (4 * 8 + 8 * 1000 + 4 * 1000)
    # A lookup reads of its table what it returns.
    assert costs["take"].bytes == 4 * 8 + 2 * 4 * 32
