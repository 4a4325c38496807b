"""Who owns the memory of a program: its caller. Outputs are parameters, all else lies in one workspace, planned here.

A virtual machine that allocates takes from one pool for all streams: a tensor that a stream still writes could be
handed to another. And what a captured program points to must stay where it is. So `main(inputs..., weights)`, which
returns its outputs, becomes `main(inputs..., weights, workspace, outputs...)`, which allocates nothing, beside
`plan(extents) -> (bytes of the workspace, shapes of the outputs...)`.

Tensors of known size are packed by size, each at the lowest offset where no tensor lives that is alive at the same
time (Pisarchyk and Lee 2020, greedy by size). Where sizes are symbolic, a tensor takes the place of a dead one that is
provably as large.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeAlias

import tvm
import tvm_ffi
from tvm import relax, sym, tirx

from rescompile.backends.symbols import static
from rescompile.errors import RescompileError

Expr: TypeAlias = Any  # relax and tirx expressions; tvm's own types are loose

ALIGNMENT = 256  # of CUDA's allocations, which the kernels' 128-bit accesses and TMA descriptors rely on
_SAME_MEMORY = ("relax.reshape", "relax.memory.view", "relax.memory.ensure_zero_offset")


@dataclass
class Block:
    """One tensor of the workspace: alive from the binding that makes it to the last that reads it."""

    bytes: Expr
    start: int
    end: int
    offset: Expr = 0


@dataclass
class StoragePlan:
    """What the pass found: the workspace's size, how much its tensors would take apart, symbols in order."""

    bytes: Expr = 0
    tensors: int = 0
    apart: Expr = 0
    symbols: list[str] = field(default_factory=list)

    @property
    def peak(self) -> int | None:
        """Bytes of the workspace, None where they depend on the inputs' extents."""
        return static(self.bytes)


def plan_storage(module: tvm.IRModule) -> tuple[tvm.IRModule, StoragePlan]:
    """The module whose `main` is given its memory, with `plan` beside it. RescompileError where an output has none."""
    main = module["main"]
    bindings = [binding for block in main.body.blocks for binding in block.bindings]
    reads = _Reads(bindings)
    outputs = reads.fields(main.body.body)
    places = {root: index for index, field_ in enumerate(outputs) for root in reads.roots(field_)}
    if len(places) != len(outputs):
        raise RescompileError("An output of the lowered program has no buffer of its own: this is a bug; report it.")
    blocks = {
        binding.var: Block(_bytes(binding.var), start, reads.last[binding.var])
        for start, binding in enumerate(bindings)
        if _allocates(binding.value) and binding.var not in places
    }
    symbols = _symbols(main.params)
    size = pack(list(blocks.values()), symbols)
    workspace = relax.Var("workspace", relax.TensorType(dtype="uint8", ndim=1))
    given = [relax.Var(f"output_{index}", value.ty) for index, value in enumerate(outputs)]
    made: list[Expr] = []
    for binding in bindings:
        if not _allocates(binding.value):
            made.append(binding)
        elif binding.var in places:
            parameter = given[places[binding.var]]
            same = tvm_ffi.structural_equal(parameter.ty.shape, binding.var.ty.shape)
            value = parameter if same else relax.op.reshape(parameter, binding.var.ty.shape)
            made.append(relax.VarBinding(binding.var, value))
        else:
            made += _view(workspace, binding.var, blocks[binding.var].offset)
    nothing = relax.Tuple([])
    body = relax.SeqExpr([relax.BindingBlock(made)], nothing)
    parameters = [*main.params, workspace, *given]
    out = tvm.IRModule(dict(module.functions_items()), attrs=module.attrs)
    # TVM counts the parameters behind `num_input` as bundled weights, and reads past the end where there are others.
    owned = relax.Function(parameters, body, relax.TupleType([]), main.is_pure, main.attrs).without_attr("num_input")
    out["main"] = owned
    out["plan"] = _plan_function(symbols, size, [value.ty.shape for value in outputs])
    apart = sum((block.bytes for block in blocks.values()), 0)
    return out, StoragePlan(size, len(blocks), apart, [symbol.name for symbol in symbols])


def pack(blocks: Sequence[Block], symbols: Sequence[Expr] = ()) -> Expr:
    """Give every block an offset; returns the bytes that all take together. `symbols` are extents, and positive."""
    fixed = [block for block in blocks if static(block.bytes) is not None]
    placed: list[Block] = []
    size = 0
    for block in sorted(fixed, key=lambda block: (-_round(static(block.bytes) or 0), block.start)):
        need, offset = _round(static(block.bytes) or 0), 0
        for other in sorted(_alive_with(block, placed), key=lambda other: int(other.offset)):
            if offset + need <= other.offset:
                break
            offset = max(offset, int(other.offset) + _round(static(other.bytes) or 0))
        block.offset = offset
        placed.append(block)
        size = max(size, offset + need)
    return _pack_symbolic([block for block in blocks if static(block.bytes) is None], size, symbols)


def _pack_symbolic(blocks: Sequence[Block], start: int, symbols: Sequence[Expr]) -> Expr:
    """As `pack`, for blocks whose sizes are known only at run time, behind `start` bytes."""
    places: list[tuple[Block, list[Block]]] = []  # the block that a place was made for, and all that lie there
    analyzer = sym.Analyzer()
    for symbol in symbols:
        analyzer.bind(symbol, tvm.ir.Range.from_min_extent(1, 1 << 31))
    total: Expr = start
    for block in sorted(blocks, key=lambda block: block.start):
        for first, here in places:
            if not _alive_with(block, here) and analyzer.can_prove(block.bytes <= first.bytes):
                block.offset = first.offset
                here.append(block)
                break
        else:
            block.offset = total
            places.append((block, [block]))
            total = analyzer.simplify(total + tirx.floordiv(block.bytes + (ALIGNMENT - 1), ALIGNMENT) * ALIGNMENT)
    return total


def _alive_with(block: Block, others: Sequence[Block]) -> list[Block]:
    return [other for other in others if other.start <= block.end and block.start <= other.end]


class _Reads:
    """Which buffers the values of a function lie in, and which binding is the last to use each."""

    def __init__(self, bindings: Sequence[Expr]) -> None:
        self._roots: dict[Expr, list[Expr]] = {}
        self._fields: dict[Expr, list[Expr]] = {}
        self.last: dict[Expr, int] = {}
        for index, binding in enumerate(bindings):
            value = binding.value
            if _allocates(value):
                self._roots[binding.var] = [binding.var]
                self.last[binding.var] = index
                continue
            for root in self.roots(value):
                self.last[root] = index
            if isinstance(value, relax.Tuple):
                self._fields[binding.var] = list(value.fields)
            elif isinstance(value, relax.Var) and value in self._fields:
                self._fields[binding.var] = self._fields[value]
            if not isinstance(value, relax.Call) or getattr(value.op, "name", "") in _SAME_MEMORY:
                self._roots[binding.var] = self.roots(value)

    def fields(self, result: Expr) -> list[Expr]:
        """The values of a tuple, or the value itself."""
        return list(result.fields) if isinstance(result, relax.Tuple) else self._fields.get(result, [result])

    def roots(self, value: Expr) -> list[Expr]:
        """The allocations that a value lies in, or that a call uses."""
        if isinstance(value, relax.Var):
            return self._roots.get(value, [])
        if isinstance(value, relax.TupleGetItem):
            source = value.tuple_value
            return self.roots(self._fields[source][value.index]) if source in self._fields else self.roots(source)
        parts = value.args if isinstance(value, relax.Call) else value.fields if isinstance(value, relax.Tuple) else []
        return [root for part in parts for root in self.roots(part)]


def _view(workspace: Expr, var: Expr, offset: Expr) -> list[Expr]:
    at = tirx.IntImm("int64", offset) if isinstance(offset, int) else offset
    viewed = relax.op.memory.view(workspace, var.ty.shape, str(var.ty.dtype), relax.prim_value(at))
    part = relax.Var(f"{var.name}_part", var.ty)
    return [relax.VarBinding(part, viewed), relax.VarBinding(var, relax.op.memory.ensure_zero_offset(part))]


def _plan_function(symbols: Sequence[Expr], size: Expr, shapes: Sequence[Expr]) -> relax.Function:
    result = relax.Tuple([relax.ShapeExpr([size]), *(relax.ShapeExpr(list(shape)) for shape in shapes)])
    parameters = [relax.Var("extents", relax.ShapeType(list(symbols)))] if symbols else []
    made = relax.Var("planned", relax.TupleType([part.ty for part in result.fields]))
    body = relax.SeqExpr([relax.BindingBlock([relax.VarBinding(made, result)])], made)
    attributes = tvm.ir.make_node("ir.DictAttrs", global_symbol="plan", **{"relax.force_pure": True})
    return relax.utils.copy_with_new_vars(relax.Function(parameters, body, made.ty, True, attributes))


def _symbols(parameters: Sequence[Expr]) -> list[Expr]:
    """Symbolic extents of the inputs, in the order in which their shapes name them."""
    found: list[Expr] = []
    for parameter in parameters:
        shape = getattr(parameter.ty, "shape", None)
        for extent in shape if shape is not None else []:
            if isinstance(extent, tirx.Var) and not any(extent.same_as(other) for other in found):
                found.append(extent)
    return found


def _allocates(value: Expr) -> bool:
    return isinstance(value, relax.Call) and getattr(value.op, "name", "") == "relax.builtin.alloc_tensor"


def _bytes(var: Expr) -> Expr:
    extents = [extent if (known := static(extent)) is None else known for extent in var.ty.shape]
    size = -(-tvm.DataType(str(var.ty.dtype)).bits // 8)
    return prod((extent for extent in extents if isinstance(extent, int)), start=size) * prod(
        (extent for extent in extents if not isinstance(extent, int)), start=1
    )


def _round(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
