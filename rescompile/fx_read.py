"""Reading a `torch.fx.GraphModule` into the neutral view: one pass over its nodes.

What the view sees differently from the native graph: operations in place arrive as functions, with the readers that
come later reading their result; assertions and guards are left out; `getitem`s of a split are its outputs; a transposed
weight belongs to the product that reads it; `stack([a, b]).sum(0)` is a sum.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from rescompile.fx_ops import Attr, Call, spell
from rescompile.fx_rules import RULES, Rule, Site, Step, is_number
from rescompile.fx_rules_nn import NN_RULES
from rescompile.fx_rules_shape import SHAPE_RULES
from rescompile.fx_types import UNKNOWN, Dims
from rescompile.graph import Graph, Op, Role, Value, ValueType
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait

TABLE: dict[str, Rule] = {**RULES, **NN_RULES, **SHAPE_RULES}

# Checks: they compute nothing that the model's outputs depend on.
_CHECKS = frozenset(
    {
        "_assert_tensor_metadata",
        "_assert_scalar",
        "_assert_async",
        "_functional_assert_async",
        "_functional_assert_scalar",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
        "_assert",
        "_check",
    }
)
_SEVERAL = frozenset({"split", "chunk", "split_with_sizes", "tensor_split", "unbind", "topk", "lstm", "gru"})
_COPIES = frozenset({"clone", "lift_fresh_copy", "_to_copy"})
_PRODUCTS = frozenset({"mm", "matmul", "addmm"})


@dataclass(frozen=True, slots=True)
class Item:
    """One result of a node that has several, while no `getitem` node reads it."""

    node: fx.Node
    index: int


@dataclass(slots=True)
class Deferred:
    """A node that is read into an operation only when something other than its one expected reader asks for it."""

    node: fx.Node
    call: Call
    preview: Value


@dataclass(slots=True)
class Native:
    """What the reader learnt of the native graph beside the view."""

    # In-place nodes whose effect the view already shows as a function, with the nodes that are the same tensor.
    in_place: list[tuple[fx.Node, tuple[fx.Node, ...]]] = field(default_factory=list)
    duplicates: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)  # a second getitem, and the first
    hidden: set[fx.Node] = field(default_factory=set)
    targets: dict[str, Value] = field(default_factory=dict)  # attribute path -> value, tied paths to the same
    training_nodes: int = 0


def is_check(node: fx.Node) -> bool:
    """Whether a node only checks what it reads."""
    if node.op == "call_module":
        return node.target == "_guards_fn"
    name = getattr(node.target, "_opname", None) or getattr(node.target, "__name__", "")
    return node.op == "call_function" and name in _CHECKS


def module_path(node: fx.Node) -> str:
    """Dotted path of the innermost module whose forward made the node, "" when unknown."""
    ours = (node.meta.get("custom") or {}).get("rescompile")
    if ours and "module" in ours:
        return str(ours["module"])
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = next(reversed(stack.values()))
    path = path[0] if isinstance(path, tuple | list) else path
    return "" if path.startswith("_empty_nn_module_stack") else path.removeprefix("L['self'].")


class Reader:
    """Fills a graph from a module. One use each."""

    def __init__(self, graph: Graph, module: fx.GraphModule, dims: Dims) -> None:
        self.graph = graph
        self.module = module
        self.dims = dims
        self.native = Native()
        self.modules: Mapping[str, nn.Module] = dict(module.named_modules())
        self.current: dict[fx.Node, Value | list[Value] | Deferred | None] = {}
        self.same: dict[fx.Node, list[fx.Node]] = {}  # nodes that are one tensor, a list shared by all of them
        self.root: dict[fx.Node, fx.Node] = {}
        self.views: dict[fx.Node, list[fx.Node]] = {}
        self.taken = {node.name for node in module.graph.nodes if node.op != "get_attr"}

    def read(self) -> Native:
        """Read all nodes."""
        self._read_state()
        self._hide_checks()
        for node in self.module.graph.nodes:
            op = node.op
            if op == "placeholder":
                kind = self.dims.of(node)
                self.current[node] = self.graph.add_input(node.name, kind.shape, kind.dtype, node)
            elif op == "get_attr":
                self.current[node] = self.attribute(str(node.target))
            elif op == "output":
                self.graph.set_outputs(self._outputs(node))
            elif node not in self.current and node not in self.native.hidden:
                self._call(node)
        return self.native

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
        tensor = _lookup(self.module, target)
        if not isinstance(tensor, torch.Tensor):
            return None
        value = self._constant(self._free(target), tensor, Attr(target), Role.CONSTANT)
        self.native.targets[target] = value
        return value

    def _read_state(self) -> None:
        seen: dict[int, Value] = {}
        for key, tensor in self.module.state_dict(keep_vars=True).items():
            if not isinstance(tensor, torch.Tensor):
                continue
            value = seen.get(id(tensor))
            if value is None:
                value = seen[id(tensor)] = self._constant(self._free(key), tensor, Attr(key), Role.PARAMETER)
            self.native.targets[key] = value

    def _constant(self, name: str, tensor: torch.Tensor, native: Attr, role: Role) -> Value:
        kind = self.dims.of_value(tensor)
        return self.graph.add_constant(name, kind.shape, kind.dtype, native, role)

    def _free(self, stem: str) -> str:
        name, count = stem, 0
        while name in self.taken or self.graph.has_name(name):
            count += 1
            name = f"{stem}_{count}"
        self.taken.add(name)
        return name

    def _realise(self, deferred: Deferred) -> Value | None:
        del self.current[deferred.node]
        self._apply(deferred.node, deferred.call, defer=False)
        found = self.current[deferred.node]
        return found if isinstance(found, Value) else None

    def _outputs(self, node: fx.Node) -> list[Value]:
        values: list[Value] = []

        def collect(argument: Any) -> None:
            if isinstance(argument, fx.Node):
                values.extend(self._expand(argument))
            elif isinstance(argument, list | tuple):
                for item in argument:
                    collect(item)
            elif isinstance(argument, Mapping):
                for item in argument.values():
                    collect(item)

        collect(node.args[0])
        return values

    def _expand(self, node: fx.Node) -> list[Value]:
        found = self.current.get(node)
        if isinstance(found, Deferred):
            found = self._realise(found)
        if found is None:
            return []
        return found if isinstance(found, list) else [found]

    def _operand(self, argument: Any, like: str | None, node: fx.Node, built: dict[Step, Op]) -> Value | None:
        if isinstance(argument, fx.Node):
            values = self._expand(argument)
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
        if (like is not None and (dtype == "bool" or like.startswith(("float", "bfloat", "complex")))) or (
            like is not None and dtype == "int64" and like != "bool"
        ):
            dtype = like
        return self.graph.add_constant(self._free(f"{node.name}_c"), (), dtype, number, Role.CONSTANT)

    # ---- calls -------------------------------------------------------------------------------------------------

    def _hide_checks(self) -> None:
        hidden = self.native.hidden
        nodes = [node for node in self.module.graph.nodes if is_check(node)]
        hidden.update(nodes)
        while nodes:
            for argument in nodes.pop().all_input_nodes:
                if argument in hidden or argument.op != "call_function" or not self.dims.is_scalar(argument):
                    continue
                if all(user in hidden for user in argument.users):
                    hidden.add(argument)
                    nodes.append(argument)

    def _call(self, node: fx.Node) -> None:
        call = spell(node, self.modules)
        if call is None:
            self._opaque(node)
        elif call.name == "getitem" and self._is_item(node, call):
            self._item(node, call)
        else:
            self._apply(node, call, defer=True)

    def _is_item(self, node: fx.Node, call: Call) -> bool:
        source = call.args["input"]
        return isinstance(source, fx.Node) and isinstance(self.current.get(source), list)

    def _item(self, node: fx.Node, call: Call) -> None:
        source, index = call.args["input"], call.args["other"]
        values = self.current[source]
        if not isinstance(values, list) or not isinstance(index, int) or not -len(values) <= index < len(values):
            self._opaque(node)
            return
        value = values[index]
        self.current[node] = value
        if isinstance(value.native, fx.Node):
            self.native.duplicates.append((node, value.native))

    def _apply(self, node: fx.Node, call: Call, *, defer: bool) -> None:
        call = self._python_spellings(call)
        rule = TABLE.get(call.name)
        if rule is None:
            self._opaque(node, call)
            return
        outs, several = self._results(node, call)
        if call.name == "arange":
            call.args.setdefault("end", call.args.get("input"))
        site = Site(call.name, call.args, node, self, outs)
        if call.writes and not self._may_write(node, call):
            if self._counts(node, call):
                self.native.hidden.add(node)
                self.current[node] = None
            else:
                self._opaque(node, call)
            return
        found = rule(site)
        if found is None or (several and not self._serves(node, found)):
            self._opaque(node, call)
            return
        if defer and isinstance(found, Step) and self._defer(node, call, found, site):
            return
        steps = found if isinstance(found, tuple) else (found,)
        self._emit(node, call, self._shorten(steps, site), outs, several)

    def _python_spellings(self, call: Call) -> Call:
        """`getattr(x, "T")`, `x.shape`, `sum([x, y])`: calls of Python's own functions."""
        if call.name == "getattr":
            owner, attribute = call.args["args"][:2]
            name = {"shape": "size", "T": "t", "mT": "transpose"}.get(attribute, "getattr")
            return Call(name, {"input": owner, "dim0": -2, "dim1": -1} if attribute == "mT" else {"input": owner})
        return call

    def _results(self, node: fx.Node, call: Call) -> tuple[list[ValueType], bool]:
        """Types of the node's results, and whether they come as a tuple."""
        val = node.meta.get("val")
        if isinstance(val, tuple | list):
            if call.name == "size":
                return [ValueType((len(val),), "int64")], False
            return [self.dims.of_value(item) for item in val], True
        if val is not None:
            return [self.dims.of_value(val)], False
        if call.name in _SEVERAL or (call.name in ("max", "min") and "dim" in call.args):
            chunks = call.args.get("chunks", 0)
            count = max([chunks, 1, *(index + 1 for index in self._items(node))])
            return [UNKNOWN] * count, True
        return [self.dims.of(node)], False

    def _items(self, node: fx.Node) -> dict[int, fx.Node]:
        items: dict[int, fx.Node] = {}
        for user in node.users:
            if user.target is operator.getitem and user.args[0] is node and isinstance(user.args[1], int):
                items.setdefault(user.args[1], user)
        return items

    def _serves(self, node: fx.Node, found: Step | tuple[Step, ...]) -> bool:
        """Whether a rule's steps give every result of a node with several that is read."""
        count = len(found) if isinstance(found, tuple) else len(found.types) if found.types is not None else 1
        return all(
            user.target is operator.getitem and isinstance(user.args[1], int) and 0 <= user.args[1] < count
            for user in node.users
            if count == 1 or user.target is operator.getitem
        )

    def _defer(self, node: fx.Node, call: Call, step: Step, site: Site) -> bool:
        if call.writes or not node.users:
            return False
        if step.kind is K.PERMUTE and step.attrs["perm"] == (1, 0):
            value = site.value(step.inputs[0])
            if value is None or not value.constant or not all(self._is_product(user) for user in node.users):
                return False
        elif call.name != "stack" or not self._summed(node, call, site):
            return False
        preview = Value(node.name, site.out.shape, site.out.dtype, Role.RESULT)
        preview.constant = step.kind is K.PERMUTE
        self.current[node] = Deferred(node, call, preview)
        return True

    def _is_product(self, node: fx.Node) -> bool:
        if node.op == "placeholder" or node.op == "output":
            return False
        call = spell(node, self.modules)
        return call is not None and call.name in _PRODUCTS

    def _summed(self, node: fx.Node, call: Call, site: Site) -> bool:
        """Whether the only reader of a stack adds up its parts."""
        if len(node.users) != 1 or site.out.shape is None or not isinstance(call.args.get("tensors"), list | tuple):
            return False
        reader = next(iter(node.users))
        if reader.op in ("output", "call_module"):
            return False
        total = spell(reader, self.modules)
        if total is None or total.name not in ("sum", "mean") or total.args.get("dtype") is not None:
            return False
        rank, dims = len(site.out.shape), total.args.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        wanted = call.args.get("dim", 0) % rank
        return bool(dims) and [dim % rank for dim in dims] == [wanted] and not total.args.get("keepdim")

    def _shorten(self, steps: tuple[Step, ...], site: Site) -> tuple[Step, ...]:
        """Take a deferred operand into the one step that was waiting for it."""
        if len(steps) != 1:
            return steps
        last = steps[0]
        for step in (last, *(operand for operand in last.inputs if isinstance(operand, Step))):
            if step.kind is K.LINEAR and isinstance(step.inputs[1], fx.Node):
                deferred = self.current.get(step.inputs[1])
                if isinstance(deferred, Deferred):
                    weight = self._operand(deferred.call.args["input"], None, site.node, {})
                    step.inputs = [step.inputs[0], weight, *step.inputs[2:]]
                    step.attrs = {"transpose_weight": True}
                    last.native = (*last.native, deferred.node)
        if last.kind in (K.SUM, K.MEAN) and isinstance(last.inputs[0], fx.Node):
            deferred = self.current.get(last.inputs[0])
            if isinstance(deferred, Deferred):
                parts = list(deferred.call.args["tensors"])
                mean = last.kind is K.MEAN
                attrs = {"scales": (1.0 / len(parts),) * len(parts)} if mean else {}
                return (Step(K.ADD, parts, attrs, native=(deferred.node,)),)
        return steps

    # ---- making operations -------------------------------------------------------------------------------------

    def _emit(
        self, node: fx.Node, call: Call, steps: tuple[Step, ...], outs: Sequence[ValueType], several: bool
    ) -> None:
        items = self._items(node) if several else {}
        natives = (*(n for step in steps for n in step.native), node, *items.values())
        path = module_path(node) or (str(node.target) if node.op == "call_module" else "")
        ops: list[Op] = []
        built: dict[Step, Op] = {}
        results: list[Value] = []
        for index, step in enumerate(steps):
            self._build_operands(step, node, built, ops, path)
            if not several:
                labels, kinds, values = [node.name], outs[:1], [node]
            else:
                count = len(step.types) if step.types is not None and len(steps) == 1 else 1
                places = range(count) if len(steps) == 1 else (index,)
                labels = [items[i].name if i in items else self._free(f"{node.name}_item{i}") for i in places]
                kinds = [outs[i] if i < len(outs) else UNKNOWN for i in places]
                values = [items.get(i, Item(node, i)) for i in places]  # type: ignore[misc]
            op = self._make(step, list(zip(labels, kinds, strict=True)), node, built, path, values)
            ops.append(op)
            results.extend(op.outputs)
        for op in ops:
            op.native = natives
            if len(ops) > 1:
                op.group = ops
        self._publish(node, call, results, items, several)

    def _build_operands(self, step: Step, node: fx.Node, built: dict[Step, Op], ops: list[Op], path: str) -> None:
        for operand in step.inputs:
            inner = operand[0] if isinstance(operand, tuple) else operand
            if not isinstance(inner, Step) or inner in built:
                continue
            self._build_operands(inner, node, built, ops, path)
            types = inner.types if inner.types is not None else (self.dims.of(node),)
            stem = f"{node.name}_{inner.suffix or inner.kind.value}"
            outputs = [(self._free(stem if len(types) == 1 else f"{stem}{i}"), kind) for i, kind in enumerate(types)]
            built[inner] = self._make(inner, outputs, node, built, path, None)
            ops.append(built[inner])

    def _make(
        self,
        step: Step,
        outputs: Sequence[tuple[str, ValueType]],
        node: fx.Node,
        built: dict[Step, Op],
        path: str,
        natives: Sequence[Any] | None,
    ) -> Op:
        like = None
        if any(is_number(operand) for operand in step.inputs):
            for operand in step.inputs:
                value = None if is_number(operand) else self._operand(operand, None, node, built)
                if value is not None and value.dtype is not None and (like is None or value.shape):
                    like = value.dtype
        inputs: list[Value | None] = []
        for operand in step.inputs:
            if isinstance(operand, fx.Node) and step.kind in (K.CONCAT, K.EINSUM):
                inputs.extend(self._expand(operand))
            else:
                inputs.append(self._operand(operand, like, node, built))
        name = node.name if natives is not None and len(outputs) > 1 else outputs[0][0]
        op = self.graph.add_op(
            step.kind, inputs, outputs, step.attrs, name=name, native=(node,), natives=natives, module=path
        )
        if step.kind in (K.DROPOUT, K.BATCH_NORM) and (step.kind is K.DROPOUT or step.attrs["training"]):
            self.native.training_nodes += 1
        return op

    def _publish(
        self, node: fx.Node, call: Call, results: list[Value], items: dict[int, fx.Node], several: bool
    ) -> None:
        if several:
            self.current[node] = results
            for index, item in items.items():
                self.current[item] = results[index]
        else:
            self.current[node] = results[0]
        producer = results[0].producer
        if call.writes:
            self._written(node, call, results[0])
        elif producer is not None and producer.has(Trait.FREE) and call.name not in _COPIES:
            source = call.args.get("input")
            if isinstance(source, fx.Node):
                self._alias(node, source, producer.kind is K.IDENTITY)
                for item in items.values():
                    self._alias(item, source, exact=False)

    def _opaque(self, node: fx.Node, call: Call | None = None) -> None:
        inputs = [value for argument in node.all_input_nodes for value in self._expand(argument)]
        val = node.meta.get("val")
        items = self._items(node)
        several = isinstance(val, tuple | list) or (val is None and bool(items) and len(items) == len(node.users))
        if several:
            count = len(val) if isinstance(val, tuple | list) else max(items) + 1
            kinds = [self.dims.of_value(val[i]) if val is not None else UNKNOWN for i in range(count)]
            labels = [items[i].name if i in items else self._free(f"{node.name}_item{i}") for i in range(count)]
            natives: list[Any] = [items.get(i, Item(node, i)) for i in range(count)]
        else:
            labels, kinds, natives = [node.name], [self.dims.of(node)], [node]
        affected = self._affected(node, call)
        for member in affected:
            current = self.peek(member)
            if current is not None and all(current is not value for value in inputs):
                inputs.append(current)
            labels.append(self._free(f"{member.name}_after_{node.name}"))
            kinds.append(self.dims.of(member))
            natives.append(member)
        if not labels:
            labels, kinds, natives = [node.name], [UNKNOWN], [node]
        op = self.graph.add_op(
            K.OPAQUE,
            inputs,
            list(zip(labels, kinds, strict=True)),
            {"target": target_name(node, self.modules)},
            name=node.name,
            native=(node, *items.values()) if several else (node,),
            natives=natives,
            module=module_path(node) or (str(node.target) if node.op == "call_module" else ""),
        )
        own = len(labels) - len(affected)
        self.current[node] = op.outputs[:own] if several else op.outputs[0]
        for index, item in items.items() if several else ():
            self.current[item] = op.outputs[index]
        for member, value in zip(affected, op.outputs[own:], strict=True):
            self.current[member] = value

    # ---- operations in place -----------------------------------------------------------------------------------

    def _alias(self, node: fx.Node, source: fx.Node, exact: bool) -> None:
        root = self.root.get(source, source)
        self.root[node] = root
        self.views.setdefault(root, []).append(node)
        if exact:
            family = self.same.setdefault(source, [source])
            family.append(node)
            self.same[node] = family

    def _unread(self, nodes: Iterable[fx.Node], now: fx.Node) -> list[fx.Node]:
        """Nodes that a node after `now` reads."""
        pending = self.native.hidden
        return [n for n in nodes if any(u is not now and u not in self.current and u not in pending for u in n.users)]

    def _may_write(self, node: fx.Node, call: Call) -> bool:
        """Whether a write can be shown as a function: nobody outside the graph, and no other view, sees it."""
        target = call.args.get(call.writes)
        if not isinstance(target, fx.Node):
            return True
        root = self.root.get(target, target)
        if root.op in ("placeholder", "get_attr"):
            return False
        family = self.same.get(target, [target])
        return not self._unread((n for n in (root, *self.views.get(root, ())) if n not in family), node)

    def _counts(self, node: fx.Node, call: Call) -> bool:
        """Whether a call only advances a counter of the module's state, as batch norm's number of batches."""
        target = call.args[call.writes]
        return target.op == "get_attr" and node.all_input_nodes == [target] and not self._unread((target, node), node)

    def _written(self, node: fx.Node, call: Call, value: Value) -> None:
        target = call.args.get(call.writes)
        if not isinstance(target, fx.Node):
            return
        family = self.same.get(target, [target])
        self.native.in_place.append((node, tuple(family)))
        for member in family:
            self.current[member] = value
        self._alias(node, target, exact=True)

    def _affected(self, node: fx.Node, call: Call | None) -> list[fx.Node]:
        """Nodes whose tensor an opaque call changes, and that are read later."""
        target = call.args.get(call.writes) if call is not None and call.writes else None
        if call is not None and call.name == "setitem":
            target = node.args[0]
        if not isinstance(target, fx.Node):
            return []
        root = self.root.get(target, target)
        members = dict.fromkeys((root, *self.views.get(root, ()), target))
        affected = self._unread(members, node)
        self._alias(node, target, exact=False)
        return affected


def target_name(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """What an opaque node calls, for people: "aten.sort.default", "torch.nn.MultiheadAttention", ".numpy"."""
    if node.op == "call_module":
        kind = type(modules[str(node.target)])
        return f"{kind.__module__}.{kind.__qualname__}"
    if node.op == "call_method":
        return f".{node.target}"
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', None) or ''}.{getattr(target, '__name__', target)}".lstrip(".")


def _lookup(module: nn.Module, path: str) -> Any:
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    return found
