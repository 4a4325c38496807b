"""The cost of detection, loading not counted: `python -m benchmarks.detection [--onnx]`.

Growth over 1k, 10k and 100k operations of three networks, and the shapes that cost a careless search quadratic time.
Times are of the process (seconds of CPU), the best of three.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from rescompile.detection import inspect_graph
from rescompile.graph import Graph
from tests.graphs import Builder, attention, residual_mlp, transformer_layer

SIZES = (1_000, 10_000, 100_000)


def mlp_chain(nodes: int) -> Graph:
    """x + W·relu(W·x)"""
    return residual_mlp(nodes // 4)


def resnet(nodes: int) -> Graph:
    """Basic blocks, a projection in every fourth."""
    b = Builder()
    x = b.relu(b.input(1, 8, 8, 8))
    while len(b.graph) < nodes:
        for stride in (0, 1, 1, 1):
            y = b.relu(b.batch_norm(b.conv(x, 8)))
            y = b.batch_norm(b.conv(y, 8))
            x = b.relu(b.add(y, x if stride else b.batch_norm(b.conv(x, 8, 1))))
    return b.output(x)


def transformer(nodes: int) -> Graph:
    """Pre-norm decoder layers with a mask and a memory that reach every one of them."""
    b = Builder()
    x, memory, mask = b.input(1, 5, 8), b.input(1, 7, 8), b.input(1, 1, 5, 5)
    while len(b.graph) < nodes:
        x = transformer_layer(b, x, "pre", memory, mask)
    return b.output(x)


def one_fork(joins: int = 10_000) -> Graph:
    """y ← x + f(y): every join goes back to the same fork."""
    b = Builder()
    x = y = b.input(2, 8)
    for _ in range(joins):
        y = b.add(x, b.linear(b.relu(y), 8))
    return b.output(y)


def star(joins: int = 10_000) -> Graph:
    """x + fᵢ(x), each an output of its own."""
    b = Builder()
    x = b.relu(b.input(2, 8))
    return b.output(*(b.add(x, b.linear(x, 8)) for _ in range(joins)))


def nested(depth: int = 1_000) -> Graph:
    """x + f(x + f(x + f(...)))"""
    b = Builder()
    forks = [b.relu(b.input(2, 8))]
    for _ in range(depth):
        forks.append(b.linear(forks[-1], 8))
    y = b.relu(forks[-1])
    for fork in reversed(forks):
        y = b.add(fork, b.linear(y, 8))
    return b.output(y)


def plain_chain(layers: int = 10_000) -> Graph:
    """No join at all, then one over everything."""
    b = Builder()
    x = y = b.relu(b.input(2, 8))
    for _ in range(layers):
        y = b.relu(b.linear(y, 8))
    return b.output(b.add(x, y))


def positions(layers: int = 5_000) -> Graph:
    """A position embedding that every layer adds to its queries: a join that fails far back, in each."""
    b = Builder()
    x, position = b.input(1, 5, 8), b.input(1, 5, 8)
    for _ in range(layers):
        x = b.layer_norm(b.add(x, attention(b, b.add(x, position))))
    return b.output(x)


def dense(layers: int = 200) -> Graph:
    """All features concatenated anew in each layer."""
    b = Builder()
    x = b.input(1, 8, 8, 8)
    features, joined = [x], x
    for _ in range(layers):
        features.append(b.conv(b.relu(joined), 4))
        joined = b.concat(*features)
    return b.output(joined)


def towers(layers: int = 2_000) -> Graph:
    """Two stacks of blocks from one input whose sums are refused in each layer."""
    b = Builder()
    x = b.relu(b.input(2, 8))
    left, right = b.relu(b.linear(x, 8)), b.relu(b.linear(x, 8))
    sums = []
    for _ in range(layers):
        left, right = (b.add(side, b.linear(b.relu(side), 8)) for side in (left, right))
        sums.append(b.add(left, right))
    return b.output(left, right, *sums)


GROWING: tuple[Callable[[int], Graph], ...] = (mlp_chain, resnet, transformer)
SHAPES: tuple[Callable[[], Graph], ...] = (one_fork, star, nested, plain_chain, positions, dense, towers)


def measure(graph: Graph, repeats: int = 3) -> tuple[float, int]:
    """Seconds, and the number of blocks found."""
    best, found = float("inf"), 0
    for _ in range(repeats):
        start = time.process_time()
        found = len(inspect_graph(graph))
        best = min(best, time.process_time() - start)
    return best, found


def onnx_chain(nodes: int, folder: Path) -> Graph:
    """The chain of `mlp_chain` as an ONNX file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from rescompile import onnx_files

    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    layers, x = [], "x"
    for index in range(nodes // 4):
        names = [f"n{index}_{step}" for step in range(4)]
        layers.append(helper.make_node("MatMul", [x, "w"], [names[0]]))
        layers.append(helper.make_node("Relu", [names[0]], [names[1]]))
        layers.append(helper.make_node("MatMul", [names[1], "w"], [names[2]]))
        layers.append(helper.make_node("Add", [x, names[2]], [names[3]]))
        x = names[3]
    kind = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 8]) for name in ("x", x)]
    body = helper.make_graph(layers, "chain", kind[:1], kind[1:], [weight])
    path = folder / f"chain_{nodes}.onnx"
    onnx.save(helper.make_model(body, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return onnx_files.load(path)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", action="store_true", help="ONNX files too (loading 100,000 nodes takes a while)")
    arguments = parser.parse_args()
    for build in GROWING:
        for size in SIZES:
            _print(build.__name__, build(size))
    for shape in SHAPES:
        _print(shape.__name__, shape())
    if arguments.onnx:
        with tempfile.TemporaryDirectory() as folder:
            for size in SIZES:
                _print("onnx chain", onnx_chain(size, Path(folder)))


def _print(name: str, graph: Graph) -> None:
    seconds, blocks = measure(graph)
    per_node = seconds / len(graph) * 1e6
    print(
        f"{name:12} {len(graph):8,} operations {blocks:7,} blocks {seconds:8.3f} s {per_node:7.1f} µs each", flush=True
    )


if __name__ == "__main__":
    main()
