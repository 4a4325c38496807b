"""Properties: on random residual graphs detection finds what was generated, whatever the order and the names."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from rescompile.detection import inspect_graph
from rescompile.detection.chains import order
from rescompile.detection.reach import Reach
from rescompile.graph import Graph, Value
from tests.graphs import Builder, K

WIDTH = 8


# ---- nearest common ancestors --------------------------------------------------------------------------------------


@st.composite
def dags(draw: st.DrawFn) -> tuple[Graph, list[Value]]:
    """Sums and activations over earlier values; most read one value, so that there are chains."""
    b = Builder()
    values = [b.input(2, WIDTH) for _ in range(draw(st.integers(1, 2)))]
    for _ in range(draw(st.integers(1, 40))):
        recent = st.integers(max(0, len(values) - 6), len(values) - 1)
        first = values[draw(recent)]
        if draw(st.integers(0, 3)):
            values.append(b.relu(first))
        else:
            values.append(b.mul(first, values[draw(st.integers(0, len(values) - 1))]))
    return b.output(values[-1]), values


def ancestors(value: Value) -> set[Value]:
    found: set[Value] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            stack.extend(value.producer.operands if value.producer else ())
    return found


@given(dags(), st.data())
@settings(max_examples=150, deadline=None)
def test_meet_is_the_latest_common_ancestor(made: tuple[Graph, list[Value]], data: st.DataObject) -> None:
    graph, values = made
    reach = Reach(graph, near=data.draw(st.sampled_from((0, 4, 24))))
    left = data.draw(st.sampled_from(values))
    right = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=3))
    common = ancestors(left) & set().union(*map(ancestors, right))
    met = reach.meet(left, right)
    if not common:
        assert met is None
        return
    assert met in common
    assert order(met) == max(map(order, common))


@given(dags(), st.data())
@settings(max_examples=100, deadline=None)
def test_between_is_what_lies_on_the_ways(made: tuple[Graph, list[Value]], data: st.DataObject) -> None:
    graph, values = made
    reach = Reach(graph)
    fork, top = data.draw(st.sampled_from(values)), data.draw(st.sampled_from(values))
    region, outside = reach.between(fork, [top])
    on_the_way = {
        value.producer for value in ancestors(top) if value is not fork and fork in ancestors(value) and value.producer
    }
    assert set(region) == on_the_way
    assert [op.order for op in region] == sorted(op.order for op in region)
    read = {value for op in region for value in op.operands}
    assert set(outside) == {value for value in read if fork not in ancestors(value)}


# ---- residual graphs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Made:
    """What the generator meant a join to be."""

    join: str
    fork: str
    kind: str
    parent: str | None
    norm: str


def residual_stack(draw: st.DrawFn, b: Builder, x: Value, depth: int, parent: str | None, made: list[Made]) -> Value:
    for _ in range(draw(st.integers(1, 3))):
        x = residual_block(draw, b, x, depth, parent, made)
        if draw(st.booleans()):
            x = decoy(draw, b, x)
    return x


def decoy(draw: st.DrawFn, b: Builder, x: Value) -> Value:
    """Something with a join that is none."""
    choice = draw(st.integers(0, 4))
    if choice == 0:
        return b.add(b.linear(x, WIDTH), b.param(WIDTH))
    if choice == 1:
        return b.add(x, b.param(5, WIDTH))
    if choice == 2:
        y = b.linear(x, WIDTH)
        return b.op(K.TANH, b.add(y, b.mul(b.op(K.POW, y, 3.0), 0.044715)))
    if choice == 3:
        return b.linear(b.concat(b.relu(b.linear(x, 4)), b.relu(b.linear(x, 4)), axis=2), WIDTH)
    return b.add(b.relu(b.linear(x, WIDTH)), b.relu(b.linear(x, WIDTH)))


def residual_block(draw: st.DrawFn, b: Builder, x: Value, depth: int, parent: str | None, made: list[Made]) -> Value:
    join = f"join{len(made)}_{draw(st.integers(0, 10**6))}"
    norm = draw(st.sampled_from(["pre", "post", "branch", "sandwich", "none"]))
    gated = norm == "none" and draw(st.booleans())
    index = len(made)
    made.append(Made(join, x.name, "gated" if gated else "add", parent, norm))
    y = b.layer_norm(x) if norm in ("pre", "sandwich") else x
    y = b.relu(b.linear(y, WIDTH))
    if depth and draw(st.booleans()):
        y = residual_stack(draw, b, y, depth - 1, join, made)
        if norm == "none":  # a norm in a nested block is none of this one's
            made[index] = Made(join, x.name, made[index].kind, parent, "any")
        elif norm == "post":
            made[index] = Made(join, x.name, "add", parent, "any")
    y = b.linear(y, WIDTH)
    if norm in ("branch", "sandwich"):
        y = b.layer_norm(y)
    if gated:
        gate = b.op(K.SIGMOID, b.linear(x, WIDTH))
        if draw(st.booleans()):
            return b.relu(b.add(x, b.mul(gate, b.sub(y, x)), name=join))
        return b.relu(b.add(b.mul(gate, y), b.mul(b.sub(1.0, gate), x), name=join))
    scale = draw(st.sampled_from([None, "alpha", "vector"]))
    if scale == "vector":
        y = b.mul(y, b.param(WIDTH))
    scales = (1.0, 0.5) if scale == "alpha" else ()
    operands = (x, y)
    if draw(st.booleans()):
        operands, scales = (y, x), scales[::-1]
    total = b.add(*operands, scales=scales, name=join)
    return b.relu(b.layer_norm(total)) if norm == "post" else b.relu(total)


@st.composite
def residual_graphs(draw: st.DrawFn) -> tuple[Graph, list[Made]]:
    b = Builder()
    made: list[Made] = []
    x = b.linear(b.input(2, 5, WIDTH), WIDTH)
    x = residual_stack(draw, b, x, draw(st.integers(0, 2)), None, made)
    return b.output(b.linear(x, 3)), made


@given(residual_graphs())
@settings(max_examples=100, deadline=None)
def test_detection_finds_what_was_generated(generated: tuple[Graph, list[Made]]) -> None:
    graph, made = generated
    report = inspect_graph(graph)
    found = {block.join: block for block in report}
    assert set(found) == {entry.join for entry in made}
    by_id = {block.id: block for block in report}
    for entry in made:
        block = found[entry.join]
        assert (block.fork, block.kind, block.shortcut) == (entry.fork, entry.kind, "identity")
        assert (None if block.parent is None else by_id[block.parent].join) == entry.parent
        if entry.norm != "any":
            assert block.norm == entry.norm
    joins = {op.name for op in graph if op.kind in (K.ADD, K.CONCAT)}
    told = {op.name for block in report for op in block.join_ops} | {join.join for join in report.not_residual}
    assert joins == told


@given(residual_graphs())
@settings(max_examples=50, deadline=None)
def test_detection_is_deterministic_and_pure(generated: tuple[Graph, list[Made]]) -> None:
    graph, _ = generated
    assert inspect_graph(graph).to_dict() == inspect_graph(graph).to_dict()
    assert inspect_graph(graph.clone()).to_dict() == inspect_graph(graph).to_dict()
