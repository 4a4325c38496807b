"""`--why NODE`: what a node is to the residual structure, in a sentence or two."""

from __future__ import annotations

from rescompile.blocks import Block, Report
from rescompile.errors import GraphError, nearest
from rescompile.graph import Graph, Op, Value


def explain(graph: Graph, report: Report, node_name: str) -> str:
    """Which block the node belongs to and in which role, or why it, as a join, ends none.

    `node_name`: the name of an operation or of a value, with the path in front of it where it is inside an operation
    (`If_3/then_branch/Add_1`) and the name alone is not unique. GraphError with the nearest name when there is none.
    """
    path, name, found = _locate(graph, report, node_name)
    op = found if isinstance(found, Op) else None
    if op is None:
        starts = [block for block in report if block.fork == name and block.path == path]
        if starts:
            return f"'{node_name}' is the fork of {_listed(starts)}."
        return f"'{node_name}' is an input or a parameter, and no block starts from it."
    lines: list[str] = []
    for block in report:
        lines += _roles(block, op)
    for join in report.not_residual:
        if join.join == op.name and join.path == path:
            where = "" if join.meet is None else f" The paths of its operands meet at '{join.meet}'."
            lines.append(f"'{op.name}' is a join ({op.kind.value}) and ends no residual block: {join.reason}.{where}")
    names = {value.name for value in op.outputs}
    starts = [block for block in report if block.fork in names and block.path == path]
    if starts:
        lines.append(f"'{op.name}' produces the fork of {_listed(starts)}.")
    own = f"{path}/{op.name}" if path else op.name
    inside = [block for block in report if block.path == own or block.path.startswith(f"{own}/")]
    if inside:
        lines.append(f"'{op.name}' holds {_listed(inside)}, in {', '.join(dict.fromkeys(b.path for b in inside))}.")
    if lines:
        return "\n".join(lines)
    around = _around(report, op, path)
    if around:
        return f"'{op.name}' ({op.kind.value}) is in no block; it lies between {around}."
    return f"'{op.name}' ({op.kind.value}) is in no block's branch, shortcut or join."


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
    known = [member.name for member in (*graph, *graph.values)]
    for path, body in report.bodies.items():
        known += [f"{path}/{member.name}" for member in (*body, *body.values)]
    raise GraphError(f"There is no operation or value '{name}' in the graph{nearest(name, known)}.")


def _find(graph: Graph, name: str) -> Op | Value | None:
    """The operation of that name or behind the value of that name, else the value; None when there is neither."""
    for op in graph:
        if op.name == name:
            return op
    value = next((value for value in graph.values if value.name == name), None)
    return value if value is None or value.producer is None else value.producer


def _roles(block: Block, op: Op) -> list[str]:
    where = f" in {block.path}" if block.path else ""
    what = f"block {block.id} ({block.kind}, {block.fork} → {block.join}{where})"
    lines = []
    if op is block.join_op:
        skip = op.inputs[block.skip_index]
        skipped = block.fork if skip is None else skip.name
        outside = ", ".join(f"'{value.name}'" for value in block.outside)
        lines.append(
            f"'{op.name}' is the join of {what}: operand {block.skip_index}, '{skipped}', is the {block.shortcut} "
            f"shortcut from the fork '{block.fork}'; the branch has {len(block.branch_ops)} operations of its own"
            + (f" and reads {outside} from outside" if outside else "")
            + f"; norm placement: {block.norm}"
            + (f" ({', '.join(block.norms)})" if block.norms else "")
            + (f"; scale: {block.scale}" if block.scale else "")
            + (f"; inside the branch of block {block.parent}" if block.parent is not None else "")
            + "."
        )
    elif op in block.join_ops:
        lines.append(f"'{op.name}' is one of the sums that make up the join of {what}.")
    if op in block.branch_ops and op is not block.join_op:
        lines.append(f"'{op.name}' is in the branch of {what}.")
    if op in block.shortcut_ops:
        lines.append(f"'{op.name}' is in the {block.shortcut} shortcut of {what}.")
    if op in block.norm_ops and op not in block.branch_ops and op is not block.join_op:
        lines.append(f"'{op.name}' is the {block.norm} norm of {what}.")
    return lines


def _listed(blocks: list[Block]) -> str:
    names = ", ".join(str(block.id) for block in blocks[:8])
    more = f" and {len(blocks) - 8} more" if len(blocks) > 8 else ""
    return f"block{'s' if len(blocks) > 1 else ''} {names}{more}"


def _around(report: Report, op: Op, path: str) -> str:
    """The blocks before and after an operation that is in none."""
    before = [block for block in report if block.path == path and block.join_op.order < op.order]
    after = [block for block in report if block.path == path and block.join_op.order > op.order]
    parts = []
    if before:
        parts.append(f"block {before[-1].id}")
    if after:
        parts.append(f"block {after[0].id}")
    return " and ".join(parts) if len(parts) == 2 else ""
