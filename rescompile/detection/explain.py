"""`--why NODE`: what a node is to the residual structure, in a sentence or two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rescompile.blocks import Block, NotResidual, Report
from rescompile.detection.surroundings import Surroundings, constant_readers, operand_name
from rescompile.errors import GraphError, nearest
from rescompile.graph import Graph, Op, Role, Value
from rescompile.structure.members import BRANCH, JOIN, MIX, NORM, SHORTCUT, SUM, Membership

_LISTED = 4


def explain(graph: Graph, report: Report, node_name: str) -> str:
    """Which block the node belongs to and in which role, or why it, as a join, ends none, and where it lies.

    `node_name`: the name of an operation, of a value, or of a native node that an operation covers. GraphError with the
    nearest name when there is none.
    """
    return str(Explainer(graph, report).why(node_name))


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a node is: its role, in which block, and for a refused join the rule and where its paths meet.

    `role`: fork, join, sum, mix, branch, shortcut, norm, scale, outside (enters a branch past the fork), refused (a
    join that ends no block), stem (before the first block), between (two blocks), head (behind the last one), beside
    (past all blocks), unread, input, parameter or constant. `of`: the operation whose parameter it is.
    """

    role: str
    text: str
    block: int | None = None
    rule: str | None = None
    meet: str | None = None
    of: str | None = None


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a node is to the residual structure: at least one finding, the most telling first."""

    node: str
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        return "\n".join(finding.text for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As in `inspect --why --json`; `block`, `rule` and `meet` are those of the first finding that has any."""
        rows = [
            {"role": each.role, "block": each.block, "rule": each.rule, "meet": each.meet, "of": each.of}
            for each in self.findings
        ]
        first = {name: next((row[name] for row in rows if row[name] is not None), None) for name in rows[0]}
        return {
            "node": self.node,
            "explanation": str(self),
            "block": first["block"],
            "role": rows[0]["role"],
            "rule": first["rule"],
            "meet": first["meet"],
            "roles": rows,
        }


@dataclass
class Explainer:
    """Explanations of the nodes of one graph."""

    graph: Graph
    report: Report
    surroundings: Surroundings = field(init=False)
    _refused: dict[str, NotResidual] = field(init=False)

    def __post_init__(self) -> None:
        self.surroundings = Surroundings(self.graph, self.report)
        self._refused = {join.join: join for join in self.report.not_residual}

    def why(self, name: str) -> Explanation:
        """What the node is. GraphError with the nearest name when there is none."""
        op, value = self._find(name)
        if op is None and value is not None:
            op = value.producer
        if op is None:
            return Explanation(name, tuple(self._of_leaf(value)) if value is not None else ())
        findings = self._of_op(op)
        if name != op.name:
            first = findings[0]
            what = f"'{name}' belongs to '{op.name}' ({op.kind.value}). "
            findings[0] = Finding(first.role, what + first.text, first.block, first.rule, first.meet, first.of)
        return Explanation(name, tuple(findings))

    def _find(self, name: str) -> tuple[Op | None, Value | None]:
        if self.graph.has_name(name):
            op = next((op for op in self.graph if op.name == name), None)
            return op, None if op is not None else self.graph.value(name)
        for op in self.graph:
            if any(getattr(node, "name", None) == name for node in op.native):
                return op, None
        known = [op.name for op in self.graph] + [value.name for value in self.graph.values]
        raise GraphError(f"There is no operation or value '{name}' in the graph{nearest(name, known)}.")

    # ---- operations ------------------------------------------------------------------------------------------------

    def _of_op(self, op: Op) -> list[Finding]:
        members = self.report.members.of(op)
        findings = [self._part(op, member) for member in members]
        refused = self._refused.get(op.name)
        if refused is not None:
            findings.append(_refusal(op, refused))
        findings += self._forks(op)
        for value in op.outputs:
            blocks = self.surroundings.outside.get(value, ())
            if blocks:
                text = f"'{op.name}' makes what enters the branch of {_listed(blocks)} from outside."
                findings.append(Finding("outside", text, blocks[0].id))
        if all(value.constant for value in op.outputs):
            findings += [
                Finding("constant", f"'{op.name}' ({op.kind.value}) computes a constant: {text}.", block, of=of.name)
                for of, text, block in self._readers(op.outputs)
            ]
        if not members and not (findings and findings[0].role == "constant"):
            place = self.surroundings.place(op)
            text = f"'{op.name}' ({op.kind.value}) is in no block: {place.text}."
            findings.append(Finding(place.role, text, place.block))
        return findings

    def _part(self, op: Op, member: Membership) -> Finding:
        block, what = member.block, _block_text(member.block)
        if member.role == JOIN:
            return Finding("join", _join_text(op, block), block.id)
        within = "" if block.parent is None else f", inside the branch of block {block.parent}"
        placed = f", its {block.norm} norm" if op in block.norm_ops else ""
        if block.scale is not None and any(value.name == block.scale.factor for value in op.operands):
            placed += f", where it scales the {block.scale.on} by '{block.scale.factor}'"
        texts = {
            SUM: f"is one of the sums that make up the join of {what}",
            MIX: f"is a factor in the join of {what}",
            BRANCH: f"is in the branch of {what}",
            SHORTCUT: f"is in the {block.shortcut} shortcut of {what}",
            NORM: f"is the {block.norm} norm of {what}",
        }
        text = f"'{op.name}' ({op.kind.value}) {texts[member.role]}"
        return Finding(member.role, text + ("" if member.role == NORM else placed) + within + ".", block.id)

    def _forks(self, op: Op) -> list[Finding]:
        findings = []
        for value in op.outputs:
            blocks = self.surroundings.forks.get(value, ())
            if blocks:
                findings.append(Finding("fork", f"'{op.name}' produces the fork of {_listed(blocks)}.", blocks[0].id))
        return findings

    # ---- inputs, parameters, constants -----------------------------------------------------------------------------

    def _of_leaf(self, value: Value) -> list[Finding]:
        findings = []
        forks = self.surroundings.forks.get(value, ())
        if forks:
            findings.append(Finding("fork", f"'{value.name}' is the fork of {_listed(forks)}.", forks[0].id))
        outside = self.surroundings.outside.get(value, ())
        if outside:
            text = f"'{value.name}' enters the branch of {_listed(outside)} from outside."
            findings.append(Finding("outside", text, outside[0].id))
        for block in self.report:
            if block.scale is not None and block.scale.factor == value.name:
                text = f"'{value.name}' is the factor that scales the {block.scale.on} of {_block_text(block)}."
                findings.append(Finding("scale", text, block.id))
        role = {Role.INPUT: "input", Role.PARAMETER: "parameter"}.get(value.role, "constant")
        if role == "input":
            if not findings:
                place = self.surroundings.place_of(value)
                findings.append(
                    Finding("input", f"'{value.name}' is an input of the graph: {place.text}.", place.block)
                )
            return findings
        findings += [
            Finding(role, f"'{value.name}' is a {role}: {text}.", block, of=of.name)
            for of, text, block in self._readers([value])
        ]
        if not findings:
            where = "an output of the graph" if self.graph.is_output(value) else "read by nothing"
            findings.append(Finding(role, f"'{value.name}' is a {role}, {where}."))
        return findings

    def _readers(self, values: Iterable[Value]) -> list[tuple[Op, str, int | None]]:
        """The first operations that read constants on each call: which, as what, in which block."""
        rows: list[tuple[Op, str, int | None]] = []
        readers = constant_readers(values)
        for op, index in list(readers.items())[:_LISTED]:
            parts = self.report.members.of(op)
            if parts:
                finding = self._part(op, parts[0])
                text, block = finding.text.removesuffix("."), finding.block
                if parts[0].role == JOIN:
                    text = f"'{op.name}' ({op.kind.value}) is the join of {_block_text(parts[0].block)}"
            else:
                place = self.surroundings.place(op)
                text, block = f"'{op.name}' ({op.kind.value}) is in no block: {place.text}", place.block
            more = f", and {len(readers) - _LISTED} more read it" if len(readers) > _LISTED else ""
            rows.append((op, f"{operand_name(op, index)} of '{op.name}', and {text}{more if not rows else ''}", block))
        return rows


def _refusal(op: Op, refused: NotResidual) -> Finding:
    where = "" if refused.meet is None else f" The paths of its operands meet at '{refused.meet}'."
    text = f"'{op.name}' is a join ({op.kind.value}) and ends no residual block: {refused.reason}.{where}"
    return Finding("refused", text, None, refused.reason.split(":")[0], refused.meet)


def _join_text(op: Op, block: Block) -> str:
    skip = op.inputs[block.skip_index]
    skipped = block.fork if skip is None else skip.name
    outside = ", ".join(f"'{value.name}'" for value in block.outside)
    return (
        f"'{op.name}' is the join of {_block_text(block)}: operand {block.skip_index}, '{skipped}', is the "
        f"{block.shortcut} shortcut from the fork '{block.fork}'; the branch has {len(block.branch_ops)} operations of "
        "its own"
        + (f" and reads {outside} from outside" if outside else "")
        + f"; norm placement: {block.norm}"
        + (f" ({', '.join(block.norms)})" if block.norms else "")
        + (f"; scale: {block.scale}" if block.scale else "")
        + (f"; inside the branch of block {block.parent}" if block.parent is not None else "")
        + "."
    )


def _block_text(block: Block) -> str:
    return f"block {block.id} ({block.kind}, {block.fork} → {block.join})"


def _listed(blocks: Sequence[Block]) -> str:
    names = ", ".join(str(block.id) for block in blocks[:8])
    more = f" and {len(blocks) - 8} more" if len(blocks) > 8 else ""
    return f"block{'s' if len(blocks) > 1 else ''} {names}{more}"
