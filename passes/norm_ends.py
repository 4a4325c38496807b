"""The norm behind a stack of blocks: added where the stack would end un-normed, removed where it ends normed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rescompile.blocks import Block
from rescompile.errors import RescompileError
from rescompile.graph import Graph, Op, Role, Value
from rescompile.kinds import Trait
from rescompile.passes.norm_blocks import NormedBlock, keeps_features
from rescompile.passes.norm_moves import new_norm
from rescompile.passes.norm_stacks import Stacks
from rescompile.passes.sketch import Sketch
from rescompile.plans import Erase, FreshNames, ReplaceUses, SetOperand

_CLOSED = ("post", "deepnorm")  # placements under which a stack ends normed by itself


class Ends:
    """What becomes of the end of each stack whose last block is converted."""

    def __init__(
        self,
        graph: Graph,
        stacks: Stacks,
        target: str,
        finals: str | tuple[str, ...],
        converted: Mapping[Block, NormedBlock],
        fresh: FreshNames,
    ) -> None:
        self.graph = graph
        self.stacks = stacks
        self.closed = target in _CLOSED
        self.names = (finals,) if isinstance(finals, str) else finals
        self.fresh = fresh
        self._moving = {op for normed in converted.values() for unit in normed.units.values() for op in unit.ops}
        self._given = self._assigned(converted)

    def name_for(self, block: Block) -> str | None:
        """What the norm to add behind a block is called; None where none is."""
        return self._given.get(block)

    def add(self, sketch: Sketch, normed: NormedBlock, *, like: bool = False) -> str:
        """Norm the end of the stack where nothing does; in words what was done, empty for nothing.

        With `like` the new norm copies the block's own.
        """
        name = self.name_for(normed.block)
        if name is None:
            return ""
        own = self._present(name)
        at = normed.units["close"].input
        if own is not None:
            if own.output.shape != at.shape:
                raise RescompileError(f"The norm '{name}' does not fit '{at.name}': they differ in shape.")
            sketch.edits.append(ReplaceUses(own.output.name, own.operands[0].name))
            sketch.edits.append(ReplaceUses(at.name, own.output.name))
            sketch.edits.append(SetOperand(own.name, 0, at.name))
            return f"'{own.name}' moves behind the stack"
        final = Sketch(self.graph, self.fresh, name, sketch.dtype, 0)
        made = new_norm(final, at, normed.norm, like=like)
        sketch.edits += final.edits
        sketch.parameters += final.parameters
        sketch.edits.append(ReplaceUses(at.name, made.name))
        sketch.edits.append(SetOperand(made.name, 0, at.name))
        return f"the stack ends in a new norm, {name}"

    def drop(self, sketch: Sketch, normed: NormedBlock, stream: Value) -> str:
        """Remove the norm that reads the end of a stack which is normed by itself now; in words, empty for nothing."""
        if not self.closed or self.stacks.next_blocks(normed.block) or normed.placed in _CLOSED:
            return ""
        end = normed.sum
        while len(end.uses) == 1 and keeps_features(end.users[0]):
            end = end.users[0].output
        reader = end.users[0] if len(end.uses) == 1 and not self.graph.is_output(end) else None
        if reader is None or not reader.has(Trait.NORM) or not self._goes(reader):
            return ""
        sketch.edits.append(ReplaceUses(reader.output.name, (stream if end is normed.sum else end).name))
        sketch.edits.append(Erase(reader.name))
        return f"'{reader.name}' behind the stack goes"

    def _present(self, name: str) -> Op | None:
        """The norm of that name, which may leave out the outer modules, that the model has outside the blocks."""
        free = [op for op in self.graph if op.has(Trait.NORM) and op not in self._moving]
        exact = [op for op in free if name in _names(op)]
        found = exact or [op for op in free if any(own.endswith(f".{name}") for own in _names(op))]
        if len(found) > 1:
            several = ", ".join(f"'{op.name}'" for op in found[:3])
            raise RescompileError(f"The name '{name}' in final_norm fits several norms ({several}): write it whole.")
        return found[0] if found else None

    def _goes(self, norm: Op) -> bool:
        if self.names == ("auto",):
            return bool(norm.provenance)
        return self.names == ("none",) or any(name in _names(norm) for name in self.names)

    def _assigned(self, converted: Mapping[Block, NormedBlock]) -> dict[Block, str]:
        """By last block, what the norm behind its stack is called."""
        if self.closed or self.names == ("none",):
            return {}
        names = iter(() if self.names == ("auto",) else self.names)
        found: dict[Block, str] = {}
        for block, normed in converted.items():
            if normed.placed in _CLOSED and self.stacks.ends_unnormed(normed, normed.out):
                name = next(names, None)
                if name is None and self.names != ("auto",):
                    raise RescompileError(
                        f"More stacks than the {len(self.names)} norms of the option final_norm would end un-normed: "
                        "name one for each, or let it be auto."
                    )
                found[block] = name or self._own_name(block, set(found.values()))
        return found

    def _own_name(self, last: Block, taken: set[str]) -> str:
        """`final_norm`, in the module that all norms of the stack are in."""
        paths = []
        for block in self.stacks.stack_of(last):
            normed = self.stacks.read[block]
            if isinstance(normed, NormedBlock):
                paths += [
                    value.name.split(".")[:-1] for value in normed.norm.norm.operands if value.role is Role.PARAMETER
                ]
        common = list(_common(paths))
        while common and not common[-1].isdecimal() and len(set(map(tuple, paths))) == 1:
            common.pop()  # the one norm's own modules
        while common and common[-1].isdecimal():
            common.pop()
        common = common[:-1]  # the list that holds the layers
        name = ".".join([*common, "final_norm"])
        count = 0
        while name in taken or self.graph.has_name(f"{name}.weight"):
            count += 1
            name = ".".join([*common, f"final_norm_{count}"])
        return name


def _names(norm: Op) -> Iterator[str]:
    """The names by which a user may call a norm: its own, its module's, and its parameters' prefix."""
    yield norm.name
    if norm.module:
        yield norm.module
    for value in norm.operands[1:]:
        if value.role is Role.PARAMETER:
            yield value.name.rpartition(".")[0]


def _common(paths: list[list[str]]) -> Iterator[str]:
    for parts in zip(*paths, strict=False):
        if len(set(parts)) != 1:
            return
        yield parts[0]
