"""The default schedule: same numbers as the unscheduled function, vectors and tasks where they pay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("tvm")
import tvm
from tvm import relax

from rescompile.backends.kernels import LayoutSpec, candidates, prim_func, schedule_default
from tests.kernels_harness import HOST

ROWS = 37


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def legalised(op: Callable[..., Any], *shapes: tuple[Any, ...]) -> tvm.tirx.PrimFunc:
    """The PrimFunc that Relax makes of one op."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{i}", relax.TensorType(shape, "float32")) for i, shape in enumerate(shapes)]
    with builder.function("main", inputs):
        with builder.dataflow():
            out = builder.emit_output(builder.emit(op(*inputs)))
        builder.emit_func_output(out)
    module = relax.transform.LegalizeOps()(builder.get())
    (func,) = [f for f in module.functions.values() if isinstance(f, tvm.tirx.PrimFunc)]
    return func


def outputs(funcs: list[tvm.tirx.PrimFunc], *shapes: tuple[Any, ...]) -> list[torch.Tensor]:
    """What each function makes of the same random inputs."""
    module = tvm.IRModule({f"f{i}": f.with_attr("global_symbol", f"f{i}") for i, f in enumerate(funcs)})
    built = tvm.compile(module, target=HOST.tvm_target())
    inputs = [torch.randn([n if isinstance(n, int) else ROWS for n in shape]) for shape in shapes]
    shape = [int(n) if isinstance(n, tvm.tirx.IntImm) else ROWS for n in funcs[0].params[-1].ty.shape]
    dtype = getattr(torch, str(funcs[0].params[-1].ty.dtype))
    results = []
    for i in range(len(funcs)):
        result = torch.zeros(shape, dtype=dtype)
        built[f"f{i}"](*inputs, result)
        results.append(result)
    return results


op = relax.op
DYNAMIC = tvm.tirx.Var("n", "int64")
CASES: dict[str, tuple[Callable[..., Any], tuple[tuple[Any, ...], ...]]] = {
    "add": (op.add, ((1, 64, 28, 28), (1, 64, 28, 28))),
    "broadcast": (op.add, ((1, 64, 28, 28), (64, 1, 1))),
    "odd extents": (op.add, ((101, 197), (101, 197))),
    "dynamic rows": (op.add, ((DYNAMIC, 768), (768,))),
    "transpose": (lambda x: op.permute_dims(x, [0, 2, 3, 1]), ((1, 64, 28, 28),)),
    "concat": (lambda x, y: op.concat([x, y], 1), ((1, 8, 28, 28), (1, 24, 28, 28))),
    "softmax": (lambda x: op.nn.softmax(x, -1), ((4, 100, 128),)),
    "dynamic softmax": (lambda x: op.nn.softmax(x, -1), ((DYNAMIC, 768),)),
    "layer norm": (lambda x, g, b: op.nn.layer_norm(x, g, b, [-1]), ((1, 128, 768), (768,), (768,))),
    "mean of planes": (lambda x: op.mean(x, [2, 3]), ((1, 64, 28, 28),)),
    "mean of columns": (lambda x: op.mean(x, [1]), ((4, 100, 64),)),
    "sum of all": (op.sum, ((64, 1000),)),
    "argmax": (lambda x: op.argmax(x, -1), ((64, 1000),)),
    "matmul": (op.matmul, ((4, 64, 32), (4, 32, 64))),
    "pool": (lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), (1, 1)), ((1, 16, 28, 28),)),
    "convolution": (lambda x, w: op.nn.conv2d(x, w, padding=(1, 1)), ((1, 8, 14, 14), (16, 8, 3, 3))),
    "prime extents": (lambda x: op.mean(x, [-1]), ((101, 197),)),
}


def test_scheduled_functions_keep_their_numbers() -> None:
    for name, (make, shapes) in CASES.items():
        func = legalised(make, *shapes)
        before, after = outputs([func, schedule_default(func)], *shapes)
        error = (before.double() - after.double()).abs().max() / before.double().abs().max()
        assert error < 1e-5, name


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("odd extents", "pool", "prime extents")])
def test_vectors_and_tasks_are_used(name: str) -> None:
    make, shapes = CASES[name]
    text = schedule_default(legalised(make, *shapes)).script()
    assert "T.vectorized(" in text
    assert "T.parallel(" in text or name == "sum of all"


@pytest.mark.parametrize("name", ["odd extents", "pool", "prime extents"])
def test_without_a_dividing_vector_tasks_are_still_used(name: str) -> None:
    make, shapes = CASES[name]
    assert "T.parallel(" in schedule_default(legalised(make, *shapes)).script()


def test_small_functions_stay_serial() -> None:
    assert "T.parallel(" not in schedule_default(legalised(op.add, (8, 64), (8, 64))).script()


def test_a_producer_is_inlined_where_nothing_is_computed_twice() -> None:
    text = schedule_default(legalised(lambda x: op.nn.gelu(x), (64, 768))).script()
    assert text.count("T.writes(") == 1


def test_a_producer_of_a_windowed_reduction_is_not_inlined() -> None:
    make, shapes = CASES["convolution"]
    assert "pad_temp" in schedule_default(legalised(make, *shapes)).script()


def test_functions_that_are_not_blocks_come_back_unchanged() -> None:
    spec = LayoutSpec(1, 4, 4, 3)
    func = prim_func(spec, candidates(spec, HOST)[0])
    assert schedule_default(func).script() == func.script()
    scheduled = schedule_default(legalised(op.add, (64, 768), (64, 768)))
    assert schedule_default(scheduled).script() == scheduled.script()
