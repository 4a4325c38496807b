"""The order of an ONNX model's nodes: whether there is one (what they read exists, nothing reads what comes of it).

Of a model in memory, a copy that holds all that its nodes read.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from rescompile.errors import GraphError, RescompileError
from rescompile.onnx_ops import nodes_within, own_graphs


def put_in_order(model: ir.Model, where: str) -> None:
    """Sort the nodes where they are not in order, which ONNX asks for and some exporters forget.

    RescompileError for a cycle, for an operand that nothing produces, and for an output that nothing produces.
    """
    found = _check(model.graph, set(), where)
    for function in model.functions.values():
        name = f"{where}'s function {function.domain}::{function.name}"
        found |= _check(function, set(), name)
    if not found:
        return
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        try:
            graph.sort()
        except ValueError as error:
            raise RescompileError(
                f"{where} has a cycle{_through(graph)}: no order of its nodes computes it; export it again."
            ) from error


def copied(model: ir.Model, where: str) -> ir.Model:
    """A copy of a model, in which each constant that a node reads is an initializer.

    The optimiser behind torch.onnx.export (onnxscript 0.7) makes one of equal constants, and leaves some of them out.
    RescompileError for an operand that nothing produces.
    """
    strays = {
        value: None
        for node in nodes_within(model.graph)
        for value in node.inputs
        if value is not None and value.producer() is None and value.graph is None and value.const_value is not None
    }
    _check(model.graph, set(strays), where)
    for function in model.functions.values():
        _check(function, set(), f"{where}'s function {function.domain}::{function.name}")
    if not strays:
        return model.clone()
    graph = model.graph.clone(allow_outer_scope_values=True)
    own = set(nodes_within(graph))
    for value in strays:
        twin = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
        while twin.name in graph.initializers:
            twin.name = f"{twin.name}_"
        for node, index in list(value.uses()):
            if node in own:
                node.replace_input_with(index, twin)
        graph.register_initializer(twin)
    return ir.Model(
        graph,
        ir_version=model.ir_version,
        producer_name=model.producer_name,
        producer_version=model.producer_version,
        domain=model.domain,
        model_version=model.model_version,
        doc_string=model.doc_string,
        functions=[function.clone() for function in model.functions.values()],
        metadata_props=dict(model.metadata_props),
    )


def sort(graph: ir.Graph) -> None:
    """Put every node behind what it and the graphs inside it read; a node keeps its place unless that comes later.

    GraphError for a cycle, and for an operand that nothing produces.
    """
    done: set[ir.Node] = set()
    for root in graph:
        producers = _producers(root, graph)
        if not done.issuperset(producers):
            graph.insert_before(root, _late(root, producers, graph, done))
        done.add(root)


def _late(root: ir.Node, producers: list[ir.Node], graph: ir.Graph, done: set[ir.Node]) -> list[ir.Node]:
    """What must come before `root` and is not `done`, in order; it is done from then on."""
    late: list[ir.Node] = []
    entered = {root}
    stack = [(root, iter(producers))]
    while stack:
        node, pending = stack[-1]
        producer = next((each for each in pending if each not in done), None)
        if producer is None:
            stack.pop()
            done.add(node)
            late.append(node)
        elif producer in entered:
            raise GraphError(f"The model's nodes cannot be put in order: there is a cycle through {_label(producer)}.")
        else:
            entered.add(producer)
            stack.append((producer, iter(_producers(producer, graph))))
    return late[:-1]


def _producers(node: ir.Node, graph: ir.Graph) -> list[ir.Node]:
    """The nodes of `graph` whose results the node, and the graphs inside it, read."""
    found: list[ir.Node] = []
    for value in node.inputs:
        if value is None:
            continue
        producer = value.producer()
        if producer is not None:
            found.append(producer)
        elif value.graph is not graph:
            raise GraphError(f"'{node.name}' reads '{value.name}', which nothing in the model produces.")
    if node.attributes:
        for inner in own_graphs(node):
            within = (value.producer() for each in nodes_within(inner) for value in each.inputs if value is not None)
            found += [producer for producer in within if producer is not None and producer.graph is graph]
            results = (value.producer() for value in inner.outputs)
            found += [producer for producer in results if producer is not None and producer.graph is graph]
    return found


def _check(graph: ir.Graph | ir.Function, known: set[ir.Value], where: str) -> bool:
    """Whether the nodes are out of order. `known`: what has been produced before this graph is needed; grows."""
    known.update(graph.inputs)
    if isinstance(graph, ir.Graph):
        known.update(graph.initializers.values())
    disorder = False
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                if value.producer() is None:
                    raise RescompileError(
                        f"{where} has a node {_label(node)} that reads '{value.name}', which nothing produces: "
                        "export it again, or make it an input."
                    )
                disorder = True
        for inner in own_graphs(node):
            disorder |= _check(inner, known, where)
        known.update(node.outputs)
    for value in graph.outputs:
        if value not in known:
            raise RescompileError(f"{where} has the output '{value.name}', which nothing produces: export it again.")
    return disorder


def _through(graph: ir.Graph | ir.Function) -> str:
    """Where the cycle is: a node of it."""
    nodes = list(graph)
    blocked = {node: set(_needed((node,))) for node in nodes}
    ready = [node for node, needed in blocked.items() if not needed]
    readers: dict[ir.Node, list[ir.Node]] = {}
    for node, needed in blocked.items():
        for producer in needed:
            readers.setdefault(producer, []).append(node)
    while ready:
        node = ready.pop()
        del blocked[node]
        for reader in readers.get(node, ()):
            blocked[reader].discard(node)
            if not blocked[reader]:
                ready.append(reader)
    # What is left is on a cycle or behind one: going back from any of it, one comes to a node twice.
    if not blocked:
        return " in a graph inside a node"
    node = next(iter(blocked))
    seen: set[ir.Node] = set()
    while node not in seen:
        seen.add(node)
        node = next(iter(blocked[node]))
    return f" through the node {_label(node)}"


def _needed(nodes: Iterable[ir.Node]) -> Iterable[ir.Node]:
    """The nodes whose results these nodes, and the graphs inside them, read."""
    pending = list(nodes)
    own = pending[0].graph
    while pending:
        node = pending.pop()
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer.graph is own:
                yield producer
        for inner in own_graphs(node):
            pending.extend(inner)


def _label(node: ir.Node) -> str:
    name = node.name or (node.outputs[0].name if node.outputs else "")
    return f"'{name}' ({node.op_type})"
