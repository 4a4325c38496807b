"""One operation of a torch graph, through `torch.export` and TVM's importer of exported programs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import fx
from tvm import relax
from tvm.relax.frontend.torch import from_exported_program

from rescompile.backends.fallback import NARROW, Imported, spelled
from rescompile.errors import RescompileError
from rescompile.graph import Graph, Op, Value

# Any extent does for a dynamic one, as long as no two are taken for the same and none for a constant.
_EXAMPLE_EXTENTS = (11, 13, 17, 19, 23, 29)


def read(graph: Graph, op: Op) -> Imported:
    """Import the operation. RescompileError, with its name, when torch or TVM cannot."""
    return imported(op, lambda: _module(graph, op))


Parts: TypeAlias = tuple[torch.nn.Module, list[int], tuple[Any, ...], tuple[Any, ...]]


def imported(op: Op, make: Callable[[], Parts]) -> Imported:
    """What the importer makes of a module, its operands' indices, examples of them and their dynamic extents."""
    try:
        module, taken, examples, dynamic = make()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, examples, dynamic_shapes=(dynamic,) if any(dynamic) else None)
            return Imported(from_exported_program(program, custom_convert_map=_CORRECTED), taken)
    except RescompileError:
        raise
    except Exception as error:
        raise RescompileError(f"{spelled(op)} ({_first_line(error)})") from error


def _module(graph: Graph, op: Op) -> Parts:
    """The operation's nodes as a module of their own, the operands that it takes, and examples of them."""
    body = fx.Graph()
    made: dict[Any, fx.Node] = {}
    taken: list[int] = []
    examples: list[torch.Tensor] = []
    dynamic: list[dict[int, Any]] = []
    extents: dict[str, int] = {}
    written = {value.native for value in op.outputs if value.native in {_native(v) for v in op.operands}}
    views = _views(op, written)
    for index, value in enumerate(op.inputs):
        if value is None or _native(value) in made or _native(value) in views:
            continue
        made[_native(value)] = body.placeholder(f"x{index}")
        taken.append(index)
        examples.append(example(value, extents))
        names = {axis: torch.export.Dim.AUTO for axis, dim in enumerate(value.shape or ()) if isinstance(dim, str)}
        dynamic.append(names)
    root: Any = getattr(graph, "module", None)

    def replace(node: fx.Node) -> fx.Node:
        if node.op == "get_attr" and node not in made and isinstance(_attribute(root, node), torch.nn.Module):
            made[node] = body.get_attr(str(node.target))  # the body of a higher-order operation
            return made[node]
        key = str(node.target) if node.op == "get_attr" and str(node.target) in made else node
        if key not in made:
            raise RescompileError(f"{spelled(op)} (it reads '{node.name}', which is no tensor of the graph)")
        return made[key]

    for node in written - views.keys():
        made[node] = body.call_function(torch.ops.aten.clone.default, (made[node],))
    for chain in views.values():
        for node in chain:
            if node not in made:
                made[node] = body.node_copy(node, replace)
    for node in op.native:
        made[node] = body.node_copy(node, replace)
    outputs = []
    for value in op.outputs:
        native = value.native
        outputs.append(made[native] if native in made else _item(body, made, native, spelled(op)))
    body.output(tuple(outputs))
    return (
        fx.GraphModule(root if isinstance(root, torch.nn.Module) else {}, body),
        taken,
        tuple(examples),
        tuple(dynamic),
    )


def _views(op: Op, written: set[Any]) -> dict[fx.Node, list[fx.Node]]:
    """Operands that are views of another tensor that the operation writes into, with the nodes that make them of it.

    The operation changes both; so the view is taken anew, of the tensor that is written.
    """
    natives = {_native(value) for value in op.operands}
    found: dict[fx.Node, list[fx.Node]] = {}
    for native in natives if written else ():
        chain: list[fx.Node] = []
        node = native
        while isinstance(node, fx.Node) and (not chain or node not in natives):
            chain.insert(0, node)
            node = node.args[0] if node.args else None
        if node in written and node is not native:
            found[native] = chain
    return found


def _attribute(root: Any, node: fx.Node) -> Any:
    for part in str(node.target).split("."):
        root = getattr(root, part, None)
    return root


def _native(value: Value) -> Any:
    """What the graph's nodes name the value by: a node, or an attribute's path."""
    target = getattr(value.native, "target", None)
    return value.native if isinstance(value.native, fx.Node) or target is None else str(target)


def _item(body: fx.Graph, made: dict[Any, fx.Node], native: Any, name: str) -> fx.Node:
    node, index = getattr(native, "node", None), getattr(native, "index", None)
    if node not in made or index is None:
        raise RescompileError(f"{name} (one of its outputs is not made by it)")
    import operator

    return body.call_function(operator.getitem, (made[node], index))


def example(value: Value, extents: dict[str, int]) -> torch.Tensor:
    """A tensor of the value's type; `extents` remembers what symbolic ones count as."""
    if value.shape is None or value.dtype is None:
        raise RescompileError(f"an operation on '{value.name}', whose shape is unknown")
    shape = []
    for dim in value.shape:
        if isinstance(dim, str):
            dim = extents.setdefault(dim, _EXAMPLE_EXTENTS[len(extents) % len(_EXAMPLE_EXTENTS)])
        shape.append(dim)
    dtype = "float32" if value.dtype in NARROW else value.dtype
    return torch.zeros(shape, dtype=getattr(torch, dtype))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:120]}" if lines else type(error).__name__


def _scaled(combine: Callable[[Any, Any], Any], swap: bool = False) -> Callable[[fx.Node, Any], Any]:
    """torch's add, sub and rsub with `alpha`, which TVM's own converters leave out."""

    def convert(node: fx.Node, importer: Any) -> Any:
        emit = importer.block_builder.emit
        a, b = (importer.env[arg] if isinstance(arg, fx.Node) else arg for arg in node.args[:2])
        tensor = next(x for x in (a, b) if isinstance(x, relax.Expr))
        dtype = str(tensor.ty.dtype)
        a, b = (x if isinstance(x, relax.Expr) else relax.const(x, dtype) for x in (a, b))
        alpha = node.kwargs.get("alpha", node.args[2] if len(node.args) > 2 else 1)
        if alpha != 1:
            b = emit(relax.op.multiply(b, relax.const(alpha, dtype))) if not swap else b
            a = emit(relax.op.multiply(a, relax.const(alpha, dtype))) if swap else a
        return emit(combine(b, a) if swap else combine(a, b))

    return convert


_CORRECTED: dict[str, Any] = {
    "add.Tensor": _scaled(relax.op.add),
    "sub.Tensor": _scaled(relax.op.subtract),
    "rsub.Tensor": _scaled(relax.op.subtract, swap=True),
    "rsub.Scalar": _scaled(relax.op.subtract, swap=True),
}
