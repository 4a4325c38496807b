"""`--why NODE`: what a node is to the residual structure, in a sentence or two."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rescompile.blocks import Block, NotResidual, Report
from rescompile.detection.surroundings import Surroundings, constant_readers, operand_name
from rescompile.errors import GraphError, nearest
from rescompile.graph import Graph, Op, Role, Value
from rescompile.structure.members import BRANCH, JOIN, MIX, NORM, SHORTCUT, SUM, Membership, skip_of

_LISTED = 4


def explain(graph: Graph, report: Report, node_name: str) -> str:
    """Which block the node belongs to and in which role, or why it, as a join, ends none, and where it lies.

    `node_name`: the name of an operation, of a value, or of a native node that an operation covers; with the path in
    front of it where it is inside an operation (`If_3/then_branch/Add_1`) and the name alone is not unique. GraphError
    with the nearest name when there is none.
    """
    return str(Explainer(graph, report).why(node_name))


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a node is: its role, in which block, and for a refused join the rule and where its paths meet.

    `role`: fork, join, sum, mix, branch, shortcut, norm, scale, outside (enters a branch past the fork), refused (a
    join that ends no block), holds (a graph with blocks of its own), stem (before the first block), between (two
    blocks), head (behind the last one), beside (past all blocks), unread, input, parameter or constant. `of`: the
    operation whose parameter it is.
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

    def __post_init__(self) -> None:
        self.surroundings = Surroundings(self.graph, self.report)

    def why(self, name: str) -> Explanation:
        """What the node is. GraphError with the nearest name when there is none."""
        path, bare, found = _locate(self.graph, self.report, name)
        if isinstance(found, Value):
            return Explanation(name, tuple(self._of_leaf(found)))
        findings = self._of_op(found, path)
        if bare != found.name:
            first = findings[0]
            what = f"'{bare}' belongs to '{found.name}' ({found.kind.value}). "
            findings[0] = replace(first, text=what + first.text)
        return Explanation(name, tuple(findings))

    # ---- operations ------------------------------------------------------------------------------------------------

    def _of_op(self, op: Op, path: str) -> list[Finding]:
        members = self.report.members.of(op)
        findings = [self._part(op, member) for member in members]
        refused = self.surroundings.refused.get(op)
        if refused is not None:
            findings.append(_refusal(op, refused))
        findings += self._forks(op)
        own = f"{path}/{op.name}" if path else op.name
        inside = [block for block in self.report if block.path == own or block.path.startswith(f"{own}/")]
        if inside:
            where = ", ".join(dict.fromkeys(block.path for block in inside))
            findings.append(Finding("holds", f"'{op.name}' holds {_listed(inside)}, in {where}.", inside[0].id))
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
    skipped = skip_of(block).name
    outside = ", ".join(f"'{value.name}'" for value in block.outside)
    return (
        f"'{op.name}' is the join of {_block_text(block)}: operand {block.skip_index}, '{skipped}', is the "
        f"{block.shortcut} shortcut from the fork '{block.fork}'; the branch has {len(block.branch_ops)} operations of "
        "its own"
        + (f" and reads {outside} from outside" if outside else "")
        + f"; norm placement: {block.norm}"
        + (f" ({', '.join(block.norms)})" if block.norms else "")
        + (f"; scale: {block.scale}" if block.scale else "")
        + "".join(f"; undecided: {what}" for what in block.undecided)
        + (f"; inside the branch of block {block.parent}" if block.parent is not None else "")
        + "."
    )


def _block_text(block: Block) -> str:
    inside = f" in {block.path}" if block.path else ""
    return f"block {block.id} ({block.kind}, {block.fork} → {block.join}{inside})"


def _listed(blocks: Sequence[Block]) -> str:
    names = ", ".join(str(block.id) for block in blocks[:8])
    more = f" and {len(blocks) - 8} more" if len(blocks) > 8 else ""
    return f"block{'s' if len(blocks) > 1 else ''} {names}{more}"


def _locate(graph: Graph, report: Report, name: str) -> tuple[str, str, Op | Value]:
    """Path, bare name and what it names: in the graph, else by its path, else wherever the bare name is unique."""
    if graph.has_name(name) and (found := _find(graph, name)) is not None:
        return "", name, found
    places: list[tuple[str, str, Op | Value]] = []
    for path, body in report.bodies.items():
        bare = name.removeprefix(f"{path}/")
        if (found := _find(body, bare)) is None:
            continue
        if bare != name:
            return path, bare, found
        places.append((path, bare, found))
    if len(places) == 1:
        return places[0]
    if places:
        choices = ", ".join(f"'{path}/{name}'" for path, _, _ in places[:4])
        raise GraphError(f"There are {len(places)} operations or values '{name}' inside others: say which, {choices}.")
    for path, body in (("", graph), *report.bodies.items()):
        for op in body:
            if any(getattr(node, "name", None) == name for node in op.native):
                return path, name, op
    known = [member.name for member in (*graph, *graph.values)]
    for path, body in report.bodies.items():
        known += [f"{path}/{member.name}" for member in (*body, *body.values)]
    raise GraphError(f"There is no operation or value '{name}' in the graph{nearest(name, known)}.")


def _find(graph: Graph, name: str) -> Op | Value | None:
    """The operation of that name or behind the value of that name, else the value; None when there is neither."""
    if not graph.has_name(name):
        return None
    found = next((op for op in graph if op.name == name), None)
    if found is not None:
        return found
    value = graph.value(name)
    return value if value.producer is None else value.producer
