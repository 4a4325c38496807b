"""Which torch call computes an operation of a graph that is not torch's own.

`EMITTERS` says it for every kind whose operands and attributes are neutral. Here is the rest: operands that another IR
passes as tensors where torch takes numbers, kinds whose operands are the IR's own, fused kinds, and operations that
nobody knows, which the IR's own evaluator computes as long as no gradient has to go through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rescompile.errors import GraphError
from rescompile.extents import extent_of
from rescompile.fused import expand
from rescompile.fx_emit import EMITTERS, emit
from rescompile.fx_torch import Emitter, aten
from rescompile.fx_tree import to_numpy, to_torch
from rescompile.fx_twin_recurrent import recurrent
from rescompile.fx_types import TORCH_DTYPES
from rescompile.graph import Attrs, Graph, Op
from rescompile.kinds import OpKind as K
from rescompile.kinds import Trait


def rule_of(graph: Graph, op: Op) -> Emitter:
    """The rule that computes an operation; GraphError names the operation when there is none."""
    if op.kind is K.OPAQUE:
        return _evaluated(graph, op)
    if op.has(Trait.FUSED):
        return lambda t, x, attrs: expand(
            op.kind,
            x,
            attrs,
            lambda kind, inputs, own: own["value"] if kind is K.FULL else emit(t, kind, inputs, own),
        )
    rule = _RULES.get(op.kind) or EMITTERS.get(op.kind)
    if rule is None:
        raise GraphError(f"'{op.name}' cannot be computed in torch: there is no torch form of '{op.kind.value}'.")
    return rule


def _evaluated(graph: Graph, op: Op) -> Emitter:
    target = op.attr("target") or op.kind.value
    evaluate = graph.native_evaluator(op)

    def rule(t: Any, x: list[Any], _: Attrs) -> Any:
        if torch.is_grad_enabled() and any(isinstance(operand, Tensor) and operand.requires_grad for operand in x):
            raise GraphError(
                f"'{op.name}' ({target}) has no torch form, and no gradient goes through it: "
                "give the model with that operation replaced."
            )
        arrays = evaluate([None if operand is None else to_numpy(operand) for operand in x])
        return [to_torch(array).to(t.device) for array in arrays]

    return rule


def _whole_numbers(tensor: Any) -> list[int]:
    return [int(extent) for extent in tensor.reshape(-1).tolist()]


def _full(t: Any, x: list[Any], attrs: Attrs) -> Any:
    shape = [extent for operand in x for extent in _whole_numbers(operand)] if x else list(t.out_shape())
    return t(aten.full.default, shape, attrs["value"], dtype=t.out_dtype())


def _arange(t: Any, bounds: list[Any], attrs: Attrs) -> Any:
    """Operands: the end, or start, end and step; start and step are attributes as well."""
    if not bounds:
        return EMITTERS[K.ARANGE](t, bounds, attrs)
    end = bounds[1 if len(bounds) > 1 else 0].item()
    return t(aten.arange.start_step, attrs["start"], end, attrs["step"], dtype=t.out_dtype())


def _shape(t: Any, x: list[Any], attrs: Attrs) -> Any:
    shape, axis = x[0].shape, attrs["axis"]
    return torch.tensor(list(shape) if axis is None else shape[axis], dtype=torch.int64, device=t.device)


def _gather(t: Any, x: list[Any], attrs: Attrs) -> Any:
    """Indices may count from the end."""
    return t(aten.index.Tensor, x[0], [None] * attrs["axis"] + [x[1].long()])


def _embedding(t: Any, x: list[Any], _: Attrs) -> Any:
    weight, indices = x
    return t(aten.embedding.default, weight, torch.where(indices < 0, indices + weight.shape[0], indices))


def _slice(t: Any, x: list[Any], attrs: Attrs) -> Any:
    def number(bound: Any) -> Any:
        known = extent_of(bound, t.extents) if isinstance(bound, str) else bound
        if known is None:
            raise GraphError("a slice ends at an extent that is not known")
        return known

    result = x[0]
    for axis, start, stop, step in zip(*(attrs[key] for key in ("axes", "starts", "stops", "steps")), strict=True):
        first, last = number(start), number(stop)
        if step > 0:
            result = t(aten.slice.Tensor, result, axis, first, last, step)
        else:
            places = range(*slice(first, last, step).indices(result.shape[axis]))
            result = t(aten.index_select.default, result, axis, torch.tensor(list(places), device=t.device))
    return result


def _topk(t: Any, x: list[Any], attrs: Attrs) -> Any:
    count = int(x[1].item()) if len(x) > 1 and x[1] is not None else attrs["k"]
    return t(aten.topk.default, x[0], count, attrs["axis"], attrs["largest"])


def _prelu(t: Any, x: list[Any], _: Attrs) -> Any:
    return t(aten.prelu.default, x[0], x[1].reshape(-1))


def _cast(t: Any, x: list[Any], attrs: Attrs) -> Any:
    return t(aten.to.dtype, x[0], TORCH_DTYPES[attrs["dtype"]])


def _local_response_norm(t: Any, x: list[Any], attrs: Attrs) -> Any:
    if attrs["size"] % 2 == 0:
        raise GraphError("a local response norm over an even number of channels has no torch form")
    options = {"alpha": attrs["alpha"], "beta": attrs["beta"], "k": attrs["bias"]}
    return torch.nn.functional.local_response_norm(x[0], attrs["size"], **options)


def _scatter(t: Any, x: list[Any], attrs: Attrs) -> Any:
    data, indices, updates = x[0], x[1].long(), x[2]
    accumulate = attrs["reduction"] == "add"
    if attrs["reduction"] not in ("none", "add"):
        raise GraphError(f"a scatter that takes the '{attrs['reduction']}' has no torch form here")
    if attrs.get("op") == "ScatterND":
        coordinates = [torch.where(i < 0, i + n, i) for i, n in zip(indices.unbind(-1), data.shape, strict=False)]
        return t(aten.index_put.default, data, coordinates, updates, accumulate)
    axis = attrs.get("axis", 0)
    indices = torch.where(indices < 0, indices + data.shape[axis], indices)
    return t(aten.scatter_add.default if accumulate else aten.scatter.src, data, axis, indices, updates)


def _random(t: Any, x: list[Any], attrs: Attrs) -> Any:
    op = str(attrs.get("op", ""))
    if op == "Bernoulli":
        return torch.bernoulli(x[0])
    shape = list(x[0].shape) if x else list(t.out_shape())
    dtype = t.out_dtype() or torch.float32
    if op.startswith("RandomNormal"):
        drawn = torch.randn(shape, dtype=dtype, device=t.device)
        return drawn * attrs.get("scale", 1.0) + attrs.get("mean", 0.0)
    low, high = attrs.get("low", 0.0), attrs.get("high", 1.0)
    return torch.rand(shape, dtype=dtype, device=t.device) * (high - low) + low


_RULES: dict[K, Emitter] = {
    K.FULL: _full,
    K.ARANGE: _arange,
    K.SHAPE: _shape,
    K.GATHER: _gather,
    K.EMBEDDING: _embedding,
    K.SLICE: _slice,
    K.TOPK: _topk,
    K.PRELU: _prelu,
    K.CAST: _cast,
    K.LOCAL_RESPONSE_NORM: _local_response_norm,
    K.SCATTER: _scatter,
    K.RANDOM: _random,
    K.RECURRENT: recurrent,
}
