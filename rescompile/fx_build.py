"""Making the neutral operations that rules ask for: operands looked up, literals and outputs named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from rescompile.fx_aliases import Aliases
from rescompile.fx_ops import Attr
from rescompile.fx_rules import Step, is_number
from rescompile.fx_types import UNKNOWN, Dims
from rescompile.fx_view import Deferred, Item, Native, made_by, module_path, tensor_at
from rescompile.graph import Graph, Op, Role, Value, ValueType
from rescompile.kinds import OpKind as K


class Builder:
    """Values of the nodes read so far, and operations on them."""

    def __init__(self, graph: Graph, module: fx.GraphModule, dims: Dims) -> None:
        self.graph = graph
        self.module = module
        self.dims = dims
        self.native = Native()
        self.modules: Mapping[str, nn.Module] = dict(module.named_modules())
        self.current: dict[fx.Node, Value | list[Value] | Deferred | None] = {}
        self.aliases = Aliases(self.current, self.native.hidden)
        self.taken = {node.name for node in module.graph.nodes if node.op != "get_attr"}

    def realise(self, deferred: Deferred) -> Value | None:
        """Make the operation of a deferred node after all."""
        raise NotImplementedError

    # ---- values ------------------------------------------------------------------------------------------------

    def peek(self, argument: fx.Node | Attr) -> Value | None:
        """The value that an argument stands for, without making an operation for it."""
        if isinstance(argument, Attr):
            return self.attribute(argument.target)
        found = self.current.get(argument)
        if isinstance(found, Deferred):
            return found.preview
        return found if isinstance(found, Value) else None

    def attribute(self, target: str) -> Value | None:
        """The value of a tensor at a path of the module; None for what is no tensor."""
        found = self.native.targets.get(target)
        if found is not None:
            return found
        tensor = tensor_at(self.module, target)
        if not isinstance(tensor, torch.Tensor):
            return None
        value = self._constant(self.free(target), tensor, Attr(target), Role.CONSTANT)
        self.native.targets[target] = value
        return value

    def read_state(self) -> None:
        seen: dict[int, Value] = {}
        for key, tensor in self.module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, torch.Tensor):
                continue
            value = seen.get(id(tensor))
            if value is None:
                value = seen[id(tensor)] = self._constant(self.free(key), tensor, Attr(key), Role.PARAMETER)
            self.native.targets[key] = value

    def _constant(self, name: str, tensor: torch.Tensor, native: Attr, role: Role) -> Value:
        kind = self.dims.of_value(tensor)
        return self.graph.add_constant(name, kind.shape, kind.dtype, native, role)

    def free(self, stem: str) -> str:
        """A name that no value and no node has."""
        name, count = stem, 0
        while name in self.taken or self.graph.has_name(name):
            count += 1
            name = f"{stem}_{count}"
        self.taken.add(name)
        return name

    def expand(self, node: fx.Node) -> list[Value]:
        """The value of a node, or all of them."""
        found = self.current.get(node)
        if isinstance(found, Deferred):
            found = self.realise(found)
        if found is None:
            return []
        return found if isinstance(found, list) else [found]

    def operand(self, argument: Any, like: str | None, node: fx.Node, built: dict[Step, Op]) -> Value | None:
        """The value of an argument of a step; numbers become literals of dtype `like`."""
        if isinstance(argument, fx.Node):
            values = self.expand(argument)
            return values[0] if values else None
        if isinstance(argument, Attr):
            return self.attribute(argument.target)
        if isinstance(argument, Value):
            return argument
        if isinstance(argument, Step):
            return built[argument].output
        if isinstance(argument, tuple):
            return built[argument[0]].outputs[argument[1]]
        return self._literal(argument, like, node) if is_number(argument) else None

    def _literal(self, number: float, like: str | None, node: fx.Node) -> Value:
        """A Python number takes the dtype of the tensor that it meets, unless it is of a higher category."""
        dtype = "bool" if isinstance(number, bool) else "int64" if isinstance(number, int) else "float32"
        floating = like is not None and like.startswith(("float", "bfloat", "complex"))
        if like is not None and (floating or dtype == "bool" or (dtype == "int64" and like != "bool")):
            dtype = like
        return self.graph.add_constant(self.free(f"{node.name}_c"), (), dtype, number, Role.CONSTANT)

    # ---- making operations -------------------------------------------------------------------------------------

    def make_one(self, node: fx.Node, step: Step, out: ValueType) -> Value | None:
        """The common case: one operation whose operands are single values; None for any other."""
        inputs: list[Value | None] = []
        for argument in step.inputs:
            value: Any = self.current.get(argument) if argument.__class__ is fx.Node else argument
            if value is not None and value.__class__ is not Value:
                return None
            inputs.append(value)
        signature = step.kind.spec.operands
        if len(inputs) < len(signature) and "*" not in signature[-1]:
            inputs.extend([None] * (len(signature) - len(inputs)))
        name = node.name
        op = self.graph.add_op(
            step.kind,
            inputs,
            ((name, out),),
            step.attrs,
            name=name,
            native=(*step.native, node),
            natives=(node,),
            module=self._path(node),
        )
        self._count_training(step, op)
        op.provenance = made_by(node)
        return op.outputs[0]

    def make_steps(
        self, node: fx.Node, steps: tuple[Step, ...], outs: Sequence[ValueType], items: Mapping[int, fx.Node] | None
    ) -> list[Value]:
        """The results of a node: one for each step, or of its one step. `items`: the nodes that read each of several
        results, None for a node with one."""
        natives = (*(n for step in steps for n in step.native), node, *(items or {}).values())
        ops: list[Op] = []
        built: dict[Step, Op] = {}
        results: list[Value] = []
        for index, step in enumerate(steps):
            self._build_operands(step, node, built, ops)
            if items is None:
                op = self._make(step, [(node.name, outs[0])], node, built, [node])
            else:
                count = len(step.types) if step.types is not None and len(steps) == 1 else 1
                places = range(count) if len(steps) == 1 else (index,)
                labels = [items[i].name if i in items else self.free(f"{node.name}_item{i}") for i in places]
                kinds = [outs[i] if i < len(outs) else UNKNOWN for i in places]
                values = [items.get(i, Item(node, i)) for i in places]
                op = self._make(step, list(zip(labels, kinds, strict=True)), node, built, values)
            ops.append(op)
            results.extend(op.outputs)
        for op in ops:
            op.native = natives
            if len(ops) > 1:
                op.group = ops
        return results

    def _path(self, node: fx.Node) -> str:
        return module_path(node) or (str(node.target) if node.op == "call_module" else "")

    def _count_training(self, step: Step, op: Op) -> None:
        # A norm of constants by their own statistics (weight standardisation) is the same in evaluation.
        if step.kind is K.DROPOUT or (step.kind is K.BATCH_NORM and step.attrs["training"] and not op.output.constant):
            self.native.training_nodes += 1

    def _build_operands(self, step: Step, node: fx.Node, built: dict[Step, Op], ops: list[Op]) -> None:
        for operand in step.inputs:
            inner = operand[0] if isinstance(operand, tuple) else operand
            if not isinstance(inner, Step) or inner in built:
                continue
            self._build_operands(inner, node, built, ops)
            types = inner.types if inner.types is not None else (self.dims.of(node),)
            stem = f"{node.name}_{inner.suffix or inner.kind.value}"
            outputs = [(self.free(stem if len(types) == 1 else f"{stem}{i}"), kind) for i, kind in enumerate(types)]
            built[inner] = self._make(inner, outputs, node, built, None)
            ops.append(built[inner])

    def _make(
        self,
        step: Step,
        outputs: Sequence[tuple[str, ValueType]],
        node: fx.Node,
        built: dict[Step, Op],
        natives: Sequence[Any] | None,
    ) -> Op:
        like = None
        if any(is_number(operand) for operand in step.inputs):
            for operand in step.inputs:
                value = None if is_number(operand) else self.operand(operand, None, node, built)
                if value is not None and value.dtype is not None and (like is None or value.shape):
                    like = value.dtype
        inputs: list[Value | None] = []
        for operand in step.inputs:
            if isinstance(operand, fx.Node) and step.kind in (K.CONCAT, K.EINSUM):
                inputs.extend(self.expand(operand))
            else:
                inputs.append(self.operand(operand, like, node, built))
        signature = step.kind.spec.operands
        if len(inputs) < len(signature) and "*" not in signature[-1]:
            inputs.extend([None] * (len(signature) - len(inputs)))
        name = node.name if natives is not None and len(outputs) > 1 else outputs[0][0]
        op = self.graph.add_op(
            step.kind, inputs, outputs, step.attrs, name=name, native=(node,), natives=natives, module=self._path(node)
        )
        op.provenance = made_by(node)
        self._count_training(step, op)
        return op
