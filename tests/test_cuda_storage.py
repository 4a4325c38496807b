"""Memory of a program that is its caller's: planned without overlaps, given to `main`, right on a processor too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

tvm = pytest.importorskip("tvm")

import tvm_ffi  # noqa: E402
from tvm import relax, topi  # noqa: E402

from rescompile.backends import lowering, tvm_runtime  # noqa: E402
from rescompile.backends.cuda import compile as compile_module  # noqa: E402
from rescompile.backends.cuda.outputs import own_outputs  # noqa: E402
from rescompile.backends.cuda.storage import ALIGNMENT, Block, StoragePlan, pack, plan_storage  # noqa: E402


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 20), st.integers(0, 8)), max_size=30))
@settings(max_examples=60, deadline=None)
def test_tensors_that_live_together_do_not_overlap(drawn: list[tuple[int, int, int]]) -> None:
    blocks = [Block(size, start, start + length) for size, start, length in drawn]
    total = pack(blocks)
    for index, a in enumerate(blocks):
        assert a.offset % ALIGNMENT == 0
        assert a.offset + a.bytes <= total
        for b in blocks[:index]:
            if a.start <= b.end and b.start <= a.end:
                assert a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
    alive = [sum(block.bytes for block in blocks if block.start <= step <= block.end) for step in range(29)]
    assert total >= max(alive)
    assert total <= sum(-(-block.bytes // ALIGNMENT) * ALIGNMENT for block in blocks)


def test_a_chain_needs_two_buffers_however_long_it_is() -> None:
    assert pack([Block(1024, step, step + 2) for step in range(0, 40, 2)]) == 2048


def _module(rows: Any, build: Any) -> tvm.IRModule:
    """`main(x, weights)` with `build(builder, x)` as its outputs."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((rows, 4), "float32"))
    weights = relax.Var("weights", relax.TupleType([]))
    with builder.function("main", [x, weights], attrs={"num_input": 1}):
        with builder.dataflow():
            outputs = build(builder, x)
            result = builder.emit_output(outputs[0] if len(outputs) == 1 else relax.Tuple(outputs))
        builder.emit_func_output(result)
    return own_outputs(builder.get())


def _run(module: tvm.IRModule, x: np.ndarray[Any, Any]) -> tuple[list[np.ndarray[Any, Any]], StoragePlan]:
    """Outputs on this processor, all memory given, the workspace full of NaN before."""
    plans: list[StoragePlan] = []

    @tvm.transform.module_pass(opt_level=0, name="PlanStorage")
    def storage(made: tvm.IRModule, _: Any) -> tvm.IRModule:
        planned, plan = plan_storage(made)
        plans.append(plan)
        return planned

    built = relax.build(module, target=tvm.target.Target("llvm"), relax_pipeline=lowering.build_passes(storage))
    here = tvm_runtime.device(tvm_runtime.CPU)
    machine = tvm_runtime.VirtualMachine(built.jit(), here)
    extents = [tvm_ffi.Shape((x.shape[0],))] if plans[0].symbols else []
    (size,), *shapes = [tuple(shape) for shape in machine["plan"](*extents)]
    workspace = tvm_runtime.placed(np.full(max(size, 1), 0xFF, np.uint8), here)
    outputs = [tvm_runtime.placed(np.full(shape, np.nan, np.float32), here) for shape in shapes]
    machine["main"](tvm_runtime.placed(x, here), tvm_ffi.convert([]), workspace, *outputs)
    return [tvm_runtime.download(out, out.shape, np.float32) for out in outputs], plans[0]


X = np.arange(24, dtype=np.float32).reshape(6, 4)


@pytest.mark.parametrize("rows", [6, tvm.tirx.Var("N", "int64")], ids=["static", "dynamic"])
def test_outputs_lie_where_the_caller_says(rows: Any) -> None:
    def build(b: Any, x: Any) -> list[Any]:
        doubled = b.emit_te(topi.add, x, x)
        turned = b.emit_te(topi.negative, doubled)
        again = b.emit_te(topi.add, turned, x)
        flat = b.emit(relax.op.reshape(again, (rows * 2, 2)))
        return [flat, b.emit_te(topi.multiply, doubled, again)]

    (flat, product), plan = _run(_module(rows, build), X)
    np.testing.assert_array_equal(flat, (X - 2 * X).reshape(12, 2))
    np.testing.assert_array_equal(product, 2 * X * (X - 2 * X))
    assert plan.tensors == 2  # doubled and turned; the others are outputs
    assert plan.peak == (512 if rows == 6 else None)


def test_inputs_views_and_values_returned_twice_are_copied() -> None:
    def build(b: Any, x: Any) -> list[Any]:
        doubled = b.emit_te(topi.add, x, x)
        view = b.emit(relax.op.reshape(doubled, (4, 6)))
        return [doubled, x, doubled, view, b.emit(relax.op.reshape(x, (24,)))]

    found, _ = _run(_module(6, build), X)
    for got, want in zip(found, (2 * X, X, 2 * X, (2 * X).reshape(4, 6), X.reshape(24)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_outputs_that_are_their_own_are_not_copied() -> None:
    module = _module(6, lambda b, x: [b.emit_te(topi.negative, x), b.emit_te(topi.add, x, x)])
    assert [name.name_hint for name in module.get_global_vars() if "copy" in name.name_hint] == []


def test_calls_of_libraries_read_and_write_planned_memory() -> None:
    seen = []

    def library(words: str, x: Any, y: Any) -> None:
        seen.append(words)
        tvm_runtime.upload(tvm_runtime.download(x, x.shape, np.float32) * 3, y)

    tvm_ffi.register_global_func("tests.triple", library, override=True)

    def build(b: Any, x: Any) -> list[Any]:
        words = tvm.ir.StringImm("as text")
        doubled = b.emit_te(topi.add, x, x)
        tripled = b.emit(relax.op.call_dps_packed("tests.triple", (words, doubled), x.ty))
        return [b.emit_te(topi.negative, tripled)]

    module = _module(6, build)
    assert compile_module.packed_functions(module) == ["tests.triple"]
    (found,), plan = _run(module, X)
    np.testing.assert_array_equal(found, -6 * X)
    assert seen == ["as text"]
    assert plan.peak == 512


def test_symbolic_tensors_take_the_place_of_dead_ones_as_large() -> None:
    rows = tvm.tirx.Var("N", "int64")
    blocks = [Block(rows * 64, 0, 2), Block(rows * 32, 2, 4), Block(rows * 16, 4, 6), Block(rows * 128, 6, 8)]
    pack(blocks, [rows])
    assert tvm_ffi.structural_equal(blocks[2].offset, blocks[0].offset)  # 16·N fits where 64·N was
    assert not tvm_ffi.structural_equal(blocks[1].offset, blocks[0].offset)  # both are alive at 2
    assert not any(tvm_ffi.structural_equal(blocks[3].offset, other.offset) for other in blocks[:3])  # larger
