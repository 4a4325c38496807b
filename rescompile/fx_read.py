"""Reading a `torch.fx.GraphModule` into the neutral view: one pass over its nodes.

What the view sees differently from the native graph: operations in place arrive as functions, with the readers that
come later reading their result; assertions and guards are left out; `getitem`s of a split are its outputs; a transposed
weight belongs to the product that reads it; `stack([a, b]).sum(0)` is a sum.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from rescompile.fx_build import Builder
from rescompile.fx_ops import Call, is_extent, spell
from rescompile.fx_rules import Rule, Site, Step
from rescompile.fx_rules_math import MATH_RULES
from rescompile.fx_rules_nn import NN_RULES
from rescompile.fx_rules_reduce import REDUCE_RULES
from rescompile.fx_rules_shape import SHAPE_RULES
from rescompile.fx_types import UNKNOWN
from rescompile.fx_view import Deferred, Item, Native, is_check, module_path, target_name, works
from rescompile.graph import Role, Value, ValueType
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait

RULES: dict[str, Rule] = {**MATH_RULES, **REDUCE_RULES, **NN_RULES, **SHAPE_RULES}

_SEVERAL = frozenset(
    {"split", "chunk", "split_with_sizes", "tensor_split", "unbind", "meshgrid", "topk", "lstm", "gru"}
    | {"var_mean", "std_mean"}
)
_COPIES = frozenset({"clone", "lift_fresh_copy", "_to_copy", "copy"})
_FREE = frozenset(kind for kind in K if kind.has(Trait.FREE))
_DEFERRED = frozenset({"t", "transpose", "permute", "numpy_T", "stack"})
_PRODUCTS = frozenset({"mm", "matmul", "addmm", "linear"})


class Reader(Builder):
    """Fills a graph from a module. One use each."""

    def read(self) -> Native:
        """Read all nodes."""
        self.read_state()
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

    def _outputs(self, node: fx.Node) -> list[Value]:
        values: list[Value] = []

        def collect(argument: Any) -> None:
            if isinstance(argument, fx.Node):
                values.extend(self.expand(argument))
            elif isinstance(argument, list | tuple):
                for item in argument:
                    collect(item)
            elif isinstance(argument, Mapping):
                for item in argument.values():
                    collect(item)

        collect(node.args[0])
        return values

    def realise(self, deferred: Deferred) -> Value | None:
        """Make the operation of a deferred node after all."""
        del self.current[deferred.node]
        self._apply(deferred.node, deferred.call, defer=False)
        found = self.current[deferred.node]
        return found if isinstance(found, Value) else None

    # ---- calls -------------------------------------------------------------------------------------------------

    def _hide_checks(self) -> None:
        hidden = self.native.hidden
        nodes = [node for node in self.module.graph.nodes if is_check(node)]
        hidden.update(nodes)
        while nodes:
            for argument in nodes.pop().all_input_nodes:
                if argument in hidden or not (self.dims.is_scalar(argument) or is_extent(argument)):
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
        if call.name == "getattr":
            call = self._attribute(call)
        rule = RULES.get(call.name)
        if rule is None:
            self._opaque(node, call)
            return
        outs, several = self._results(node, call)
        if call.name == "arange":
            call.args.setdefault("end", call.args.get("input"))
        site = Site(call.name, call.args, node, self, outs)
        target = call.args.get(call.writes) if call.writes else None
        if isinstance(target, fx.Node) and not self.aliases.is_plain_write(node, target):
            self._write(node, call, target)
            return
        found = rule(site)
        if found is None or (several and not self._serves(node, found)):
            self._opaque(node, call)
            return
        if defer and call.name in _DEFERRED and isinstance(found, Step) and self._defer(node, call, found, site):
            return
        if call.name == "stack" and site.out.shape is None:
            self._opaque(node, call)  # a sum of it is known without shapes, its parts' places on the axis are not
            return
        if not several and isinstance(found, Step):
            value = self.make_one(node, found, outs[0])
            if value is not None:
                self._publish(node, call, [value], None)
                return
        steps = found if isinstance(found, tuple) else (found,)
        items = {index % len(outs): item for index, item in self._items(node).items()} if several else None
        self._publish(node, call, self.make_steps(node, self._shorten(steps, site), outs, items), items)

    def _attribute(self, call: Call) -> Call:
        """`x.shape`, `x.T`, `x.mT`"""
        owner, attribute = call.args["args"][:2]
        name = {"shape": "size", "T": "t", "mT": "mT"}.get(attribute, "getattr")
        return Call(name, {"input": owner})

    def _results(self, node: fx.Node, call: Call) -> tuple[list[ValueType], bool]:
        """Types of the node's results, and whether they come as a tuple."""
        val = node.meta.get("val")
        if isinstance(val, tuple | list):
            if all(isinstance(item, int | torch.SymInt) for item in val):
                return [ValueType((len(val),), "int64")], False
            return [self.dims.of_value(item) for item in val], True
        if val is not None:
            return [self.dims.of_value(val)], False
        if call.name in _SEVERAL or (call.name in ("max", "min") and "dim" in call.args):
            chunks = call.args.get("chunks", 0)
            sizes = call.args.get("split_size", call.args.get("split_sizes"))
            listed = len(sizes) if isinstance(sizes, list | tuple) else 0
            return [UNKNOWN] * max(chunks, listed, 1, self._reached(node)), True
        return [self.dims.of(node)], False

    def _items(self, node: fx.Node) -> dict[int, fx.Node]:
        """The first `getitem` of each result, by index as it is written: negative ones count from the end."""
        items: dict[int, fx.Node] = {}
        for user in node.users:
            if user.target is operator.getitem and user.args[0] is node and isinstance(user.args[1], int):
                items.setdefault(user.args[1], user)
        return items

    def _reached(self, node: fx.Node) -> int:
        """How many results a node has, by what is read of them: those counted from the end are other ones."""
        indices = self._items(node)
        front = max((index + 1 for index in indices if index >= 0), default=0)
        return front + max((-index for index in indices if index < 0), default=0)

    def _serves(self, node: fx.Node, found: Step | tuple[Step, ...]) -> bool:
        """Whether a rule's steps give every result of a node with several that is read."""
        count = len(found) if isinstance(found, tuple) else len(found.types) if found.types is not None else 1
        return all(
            user.target is operator.getitem
            and (count > 1 or isinstance(user.args[1], int))
            and (not isinstance(user.args[1], int) or -count <= user.args[1] < count)
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
        if node.op in ("placeholder", "output"):
            return False
        call = spell(node, self.modules)
        return call is not None and call.name in _PRODUCTS

    def _summed(self, node: fx.Node, call: Call, site: Site) -> bool:
        """Whether the only reader of a stack adds up its parts."""
        if len(node.users) != 1 or not isinstance(call.args.get("tensors"), list | tuple):
            return False
        reader = next(iter(node.users))
        if reader.op in ("output", "call_module"):
            return False
        total = spell(reader, self.modules)
        if total is None or total.name not in ("sum", "mean") or total.args.get("dtype") is not None:
            return False
        summed, stacked = total.args.get("dim"), call.args.get("dim", 0)
        dims: list[int] = [summed] if isinstance(summed, int) else list(summed or ())
        if total.args.get("keepdim"):
            return False
        if site.out.shape is None:  # then they agree where both count from the same end
            return dims == [stacked]
        rank = len(site.out.shape)
        return [dim % rank for dim in dims] == [stacked % rank]

    def _shorten(self, steps: tuple[Step, ...], site: Site) -> tuple[Step, ...]:
        """Take a deferred operand into the one step that was waiting for it."""
        if len(steps) != 1:
            return steps
        last = steps[0]
        for step in (last, *(operand for operand in last.inputs if isinstance(operand, Step))):
            if step.kind is K.LINEAR and isinstance(step.inputs[1], fx.Node):
                deferred = self.current.get(step.inputs[1])
                if isinstance(deferred, Deferred):
                    weight = self.operand(deferred.call.args["input"], None, site.node, {})
                    step.inputs = [step.inputs[0], weight, *step.inputs[2:]]
                    step.attrs = {"transpose_weight": not step.attrs["transpose_weight"]}
                    last.native = (*last.native, deferred.node)
        if last.kind in (K.SUM, K.MEAN) and isinstance(last.inputs[0], fx.Node):
            deferred = self.current.get(last.inputs[0])
            if isinstance(deferred, Deferred):
                parts = list(deferred.call.args["tensors"])
                mean = last.kind is K.MEAN
                attrs = {"scales": (1.0 / len(parts),) * len(parts)} if mean else {}
                return (Step(K.ADD, parts, attrs, native=(deferred.node,)),)
        return steps

    def _publish(self, node: fx.Node, call: Call, results: list[Value], items: Mapping[int, fx.Node] | None) -> None:
        """Let later nodes find the results of `node`, and note what shares memory with what."""
        if items is None:
            self.current[node] = results[0]
        else:
            self.current[node] = results
            for index, item in items.items():
                self.current[item] = results[index]
        producer = results[0].producer
        if call.writes:
            self._written(node, call.args[call.writes], results[0])
        elif producer is not None and producer.kind in _FREE and call.name not in _COPIES:
            source = call.args.get("input")
            if isinstance(source, fx.Node):
                self.aliases.add(node, source, exact=producer.kind is K.IDENTITY)
                for item in (items or {}).values():
                    self.aliases.add(item, source, exact=False)

    def _opaque(self, node: fx.Node, call: Call | None = None) -> None:
        inputs = [value for argument in node.all_input_nodes for value in self.expand(argument)]
        val = node.meta.get("val")
        items = self._items(node)
        several = isinstance(val, tuple | list) or (val is None and bool(items) and len(items) == len(node.users))
        if several:
            count = len(val) if isinstance(val, tuple | list) else max(items) + 1
            kinds = [self.dims.of_value(val[i]) if val is not None else UNKNOWN for i in range(count)]
            labels = [items[i].name if i in items else self.free(f"{node.name}_item{i}") for i in range(count)]
            natives: list[Any] = [items.get(i, Item(node, i)) for i in range(count)]
        else:
            labels, kinds, natives = [node.name], [self.dims.of(node)], [node]
        affected = self._written_nodes(node, call)
        for member in affected:
            current = self.peek(member)
            if current is not None and all(current is not value for value in inputs):
                inputs.append(current)
            labels.append(self.free(f"{member.name}_after_{node.name}"))
            kinds.append(self.dims.of(member))
            natives.append(member)
        own = len(labels) - len(affected)
        attrs = {"target": target_name(node, self.modules)} | ({} if works(node) else {"works": False})
        op = self.graph.add_op(
            K.OPAQUE,
            inputs,
            list(zip(labels, kinds, strict=True)),
            attrs,
            name=node.name,
            native=(node, *items.values()) if several else (node,),
            natives=natives,
            module=module_path(node) or (str(node.target) if node.op == "call_module" else ""),
        )
        self.current[node] = op.outputs[:own] if several else op.outputs[0]
        for index, item in items.items() if several else ():
            self.current[item] = op.outputs[index]
        for member, value in zip(affected, op.outputs[own:], strict=True):
            self.current[member] = value
            self.native.versions.setdefault(member, []).append(value)
            self._keep_copy(member)

    # ---- operations in place -----------------------------------------------------------------------------------

    def _write(self, node: fx.Node, call: Call, target: fx.Node) -> None:
        """A write that something besides the readers of the same tensor sees."""
        if self.aliases.is_counter(node, target):
            self.native.hidden.add(node)
            self.current[node] = None
            return
        fresh = self.aliases.scatter_write(self.module, node, target)
        if fresh is None:
            self._opaque(node, call)
        else:
            self.taken.update(new.name for new in fresh)
            self._call(node)

    def _written(self, node: fx.Node, target: Any, value: Value) -> None:
        if not isinstance(target, fx.Node):
            return
        family = self.aliases.family(target)
        self.native.in_place.append((node, tuple(family)))
        for member in family:
            self.current[member] = value
        self.aliases.add(node, target, exact=True)

    def _written_nodes(self, node: fx.Node, call: Call | None) -> list[fx.Node]:
        """Nodes whose tensor an opaque call changes, and that are read later."""
        target = call.args.get(call.writes) if call is not None and call.writes else None
        if call is not None and call.name == "setitem":
            target = node.args[0]
        if not isinstance(target, fx.Node):
            return []
        affected = self.aliases.affected(node, target)
        self.aliases.add(node, target, exact=False)
        return affected

    def _keep_copy(self, member: fx.Node) -> None:
        """A copy that is written to later is one that must stay."""
        root = self.aliases.root(member)
        maker = next((op for op in self.graph if root in op.native), None)
        if maker is not None and maker.kind is K.IDENTITY:
            maker.kind = K.OPAQUE
            maker.attrs = {"target": target_name(root, self.modules)}
