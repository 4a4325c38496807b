"""The driver: a graph in, a program out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rescompile.backends.require import require_tvm
from rescompile.errors import GraphError, RescompileError
from rescompile.graph import Graph, Role

if TYPE_CHECKING:
    from rescompile.backends.program import Program

Progress = Callable[[str, int, int], None]  # what is being done, how many steps of it are done, of how many


def compile_graph(
    graph: Graph,
    target: str | Mapping[str, Any] = "cpu",
    *,
    database: str | Path | None = None,
    tuning: int | None = None,
    trials: int = 0,
    runner: str | None = None,
    threads: int | None = None,
    buckets: Sequence[int] = (),
    ptx: bool = True,
    progress: Progress | None = None,
) -> Program:
    """Compile a graph, as it is, for a machine; the graph does not change.

    Args:
        graph: any graph of the protocol, from torch, ONNX or memory, with known input shapes (names for dynamic ones).
        target: `cpu`, `cpu:NAME`, `cuda:sm_90`, several GPUs as `cuda:sm_80,sm_90`, or a TVM target.
        database: folder in which chosen tiles and tuned schedules are remembered; it must exist unless `trials` are
            spent, which make it.
        tuning: how many more candidates to time for each kernel.
        trials: candidates of MetaSchedule's to build and time, over all regions; the faster of its schedules and our
            kernels is used.
        runner: where those are timed: `local`, or `rpc://host:port/key` for machines at TVM's RPC tracker.
        threads: how many threads the program runs on; all of the processors by default.
        buckets: sizes of a dynamic batch to compile static code for, on a GPU: a call is padded to the next of them.
        ptx: whether a program for GPUs holds PTX for later ones.
        progress: told of each step.

    Raises:
        UnsupportedOps: operations without a lowering, all of them, before any work is done.
        RescompileError: TVM is missing or another version, the target is unknown, an input has no shape, the
            database or the runner cannot be used, rows of the batch depend on each other where `buckets` are given.
    """
    require_tvm()
    from rescompile.backends import lowering, targets

    wheres = targets.resolve_all(target, threads)
    where = wheres[0]
    if not graph.outputs:
        raise GraphError("The graph has no outputs: there is nothing to compile.")
    imports = lowering.check(graph)
    contest = None
    if trials or database is not None:
        from rescompile.backends.tuning_contest import Contest

        contest = Contest(where, trials, database, runner, progress)
    if where.cuda:
        from rescompile.backends.cuda.compile import Settings, compile_cuda

        tell = progress or (lambda *_: None)
        return compile_cuda(graph, wheres, Settings(imports, tell, contest, database, tuning, buckets, ptx))
    if where.gpu is not None:
        from rescompile.backends.compile_gpu import compile_gpu

        return compile_gpu(graph, where, imports, progress)
    if buckets:
        raise RescompileError(f"Sizes of the batch are for GPUs: '{where.name}' runs any size on the same code.")
    from rescompile.backends.compile_cpu import compile_cpu

    return compile_cpu(graph, where, imports, database, tuning, progress, contest)


def describe(graph: Graph) -> list[str]:
    """The graph as text, for its fingerprint."""
    lines = [f"{value.name}:{value.shape}:{value.dtype}" for value in graph.inputs]
    for op in graph:
        operands = ",".join("-" if value is None else value.name for value in op.inputs)
        results = ",".join(value.name for value in op.outputs)
        lines.append(f"{results}={op.kind.value}({operands}){sorted(op.attrs.items(), key=lambda item: item[0])}")
    lines += [value.name for value in graph.outputs]
    constants = [v for v in graph.values if v.role in (Role.PARAMETER, Role.CONSTANT)]
    return [*lines, *(f"{value.name}:{value.shape}:{value.dtype}" for value in constants)]
