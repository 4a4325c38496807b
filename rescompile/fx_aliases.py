"""Which nodes of a graph share a tensor, while it is being read, and what a write to one of them means.

Only nodes that something still reads matter, so the others are forgotten as the reader passes them: a chain of
operations in place costs the same for each link.
"""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch import fx

from rescompile.fx_functional import out_of_place, replay, scatter_back


class Aliases:
    """Views and tensors they are views of. `read` and `hidden`: nodes that the reader has passed, or leaves out."""

    def __init__(self, read: Container[fx.Node], hidden: Container[fx.Node]) -> None:
        self._read = read
        self._hidden = hidden
        self._root: dict[fx.Node, fx.Node] = {}
        self._parent: dict[fx.Node, fx.Node] = {}
        self._views: dict[fx.Node, list[fx.Node]] = {}
        self._same: dict[fx.Node, list[fx.Node]] = {}  # nodes that are one tensor: a list shared by all of them

    def add(self, node: fx.Node, source: fx.Node, *, exact: bool) -> None:
        """`node` is a view of `source`; `exact`: of all of it, in the same shape."""
        self._parent[node] = source
        root = self._root[node] = self.root(source)
        self._views.setdefault(root, []).append(node)
        if exact:
            family = self._same.setdefault(source, [source])
            family.append(node)
            self._same[node] = family

    def root(self, node: fx.Node) -> fx.Node:
        """The node that made the tensor."""
        return self._root.get(node, node)

    def is_outside(self, node: fx.Node) -> bool:
        """Whether the tensor is an input, or part of the module's state."""
        return self.root(node).op in ("placeholder", "get_attr")

    def family(self, node: fx.Node) -> list[fx.Node]:
        """The nodes still to be read that are the same tensor as `node`, itself included."""
        family = self._same.get(node)
        if family is None:
            return [node]
        family[:] = [member for member in family if member is node or self._pending(member)]
        return list(family)

    def unread(self, nodes: Iterable[fx.Node], now: fx.Node) -> list[fx.Node]:
        """Those that a node after `now` reads."""
        return [n for n in nodes if any(u is not now and self._awaits(u) for u in n.users)]

    def members(self, node: fx.Node) -> list[fx.Node]:
        """All nodes still to be read that share the tensor of `node`."""
        root = self.root(node)
        views = self._views.get(root)
        if views is None:
            return [root]
        views[:] = [view for view in views if view is node or self._pending(view)]
        return [root, *views]

    def is_plain_write(self, node: fx.Node, target: fx.Node) -> bool:
        """Whether a write to `target` can be shown as a function: nobody outside, and no other view, sees it."""
        if self.is_outside(target):
            return False
        family = self.family(target)
        return not self.unread((n for n in self.members(target) if n not in family), node)

    def is_counter(self, node: fx.Node, target: fx.Node) -> bool:
        """Whether a write only advances a counter of the module's state, as batch norm's number of batches."""
        return target.op == "get_attr" and node.all_input_nodes == [target] and not self.unread((target, node), node)

    def affected(self, node: fx.Node, target: fx.Node) -> list[fx.Node]:
        """Nodes read later whose tensor an unknown write to `target` changes."""
        return self.unread(dict.fromkeys((*self.members(target), target)), node)

    def scatter_write(self, module: fx.GraphModule, node: fx.Node, target: fx.Node) -> set[fx.Node] | None:
        """Rewrite, natively, a write through a view, or below other views, as functions. The nodes that it takes.

        They come right behind `node`, so that a reader meets them next. None where the views are not understood.
        """
        if self.is_outside(target):
            return None
        affected = self.affected(node, target)
        path = self._path(target)
        versions: dict[fx.Node, fx.Node] = {target: node}
        made: list[fx.Node] = []
        part = node
        with node.graph.inserting_before(node.next):
            for step in reversed(path):
                whole = self._parent[step]
                scattered = scatter_back(step, whole, part)
                if scattered is None:
                    for leftover in reversed(made):
                        node.graph.erase_node(leftover)
                    return None
                if scattered is not part:
                    made.append(scattered)
                versions[whole] = part = scattered
            for member in affected:
                if member not in versions:
                    versions[member] = replay(self._path(member), versions)
        if not out_of_place(module, node):
            return None
        fresh = {node, *versions.values(), *made}
        for member, version in versions.items():
            for user in [u for u in member.users if self._awaits(u) and u not in fresh]:
                user.replace_input_with(member, version)
        return fresh

    def _path(self, node: fx.Node) -> list[fx.Node]:
        """The views that lead from a root to `node`, the root left out."""
        path = []
        while node in self._parent:
            path.append(node)
            node = self._parent[node]
        return path[::-1]

    def _awaits(self, node: fx.Node) -> bool:
        return node not in self._read and node not in self._hidden

    def _pending(self, node: fx.Node) -> bool:
        return any(self._awaits(user) for user in node.users)
