"""Operations that the vocabulary does not know, read one at a time by TVM's own frontends.

One operation's native nodes become a model of their own: a `torch.export` program, or an ONNX model of those nodes.
What the frontend makes of it is a private Relax function, inlined where the operation stood. Half precision is widened
to float32 around it, as the frontends write `out_dtype="float32"` whatever the operands are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from rescompile.backends.emitter import Emitter
from rescompile.errors import RescompileError
from rescompile.graph import Graph, Op
from rescompile.kinds import OpKind

NARROW = ("float16", "bfloat16")


@dataclass
class Imported:
    """What a frontend made of one operation: `main` takes the operands `taken`, widened, and gives the outputs."""

    module: tvm.IRModule
    taken: list[int]


@dataclass
class Imports:
    """The operations that frontends read, by name; those that they cannot read, with the reason."""

    found: dict[str, Imported] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def unsupported(self, graph: Graph, op: Op) -> str | None:
        """Why no frontend reads the operation, None when one does (it then has)."""
        if op.name not in self.found and op.name not in self.refused:
            try:
                self.found[op.name] = _read(graph, op)
            except RescompileError as error:
                self.refused[op.name] = str(error)
        return self.refused.get(op.name)

    def lower(self, e: Emitter, op: Op) -> None:
        """Emit the operation as its IR's frontend translates it."""
        imported = self.found[op.name]
        operands = []
        for index in imported.taken:
            value = op.inputs[index]
            if value is not None:
                x = e.get(value)
                operands.append(e.cast(x, "float32") if e.dtype(x) in NARROW else x)
        main = _added(e, imported.module, op)
        result = e.emit(relax.Call(main, operands))
        for index, value in enumerate(op.outputs):
            part = e.emit(relax.TupleGetItem(result, index)) if isinstance(result.ty, relax.TupleType) else result
            e.bind(value, e.cast(part, value.dtype))


def spelled(op: Op) -> str:
    """The operation as its IR calls it."""
    return str(op.attrs.get("target") or op.kind.value)


def _read(graph: Graph, op: Op) -> Imported:
    if graph.ir == "fx":
        from rescompile.backends.fallback_fx import read

        return read(graph, op)
    if op.kind is OpKind.RECURRENT:
        from rescompile.backends.fallback_recurrent import read as read_recurrent

        return read_recurrent(op)
    if graph.ir == "onnx":
        from rescompile.backends.fallback_onnx import read as read_onnx

        return read_onnx(graph, op)
    raise RescompileError(spelled(op))


def _added(e: Emitter, module: tvm.IRModule, op: Op) -> Any:
    """The module's functions in the emitter's, private; the global variable of `main`."""
    renamed: dict[str, Any] = {}
    for variable, function in module.functions.items():
        if not isinstance(function, relax.Function):
            renamed[variable.name_hint] = e.bb.add_func(function, variable.name_hint)
    main = module["main"]
    if renamed:
        main = _Renamer(renamed).visit_expr(main)
    private = relax.Function(main.params, main.body, main.ret_ty, main.is_pure)
    return e.bb.add_func(private, f"imported_{''.join(c if c.isalnum() else '_' for c in op.name)}")


@mutator
class _Renamer(PyExprMutator):  # type: ignore[misc]
    """Lets calls reach functions under the names that they were given."""

    def __init__(self, renamed: dict[str, Any]) -> None:
        super().__init__()
        self.renamed = renamed

    def visit_global_var_(self, variable: Any) -> Any:
        """The new variable."""
        return self.renamed.get(variable.name_hint, variable)
