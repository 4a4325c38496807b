"""Recurrent layers as ONNX lays them out, computed by torch.

Operands: X [T, B, I], W [D, G·H, I], R [D, G·H, H], B [D, 2·G·H], lengths, h0 [D, B, H], and for an LSTM c0 and
peepholes; D directions, G gates. Results: Y [T, D, B, H], the last h [D, B, H], the last c. (ONNX operators LSTM, GRU
and RNN, versions 7 to 22.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rescompile.errors import GraphError
from rescompile.graph import Attrs

# Where torch's gates stand among ONNX's: i o f c against i f g o, z r h against r z n.
_GATES = {"lstm": (0, 2, 3, 1), "gru": (1, 0, 2), "rnn_tanh": (0,), "rnn_relu": (0,)}
_LAYERS: dict[str, Any] = {
    "lstm": torch._VF.lstm,
    "gru": torch._VF.gru,
    "rnn_tanh": torch._VF.rnn_tanh,
    "rnn_relu": torch._VF.rnn_relu,
}


def recurrent(t: Any, inputs: list[Any], attrs: Attrs) -> tuple[Tensor, ...]:
    """Y, and the last states."""
    x, weight, recurrence, bias, lengths, state, cell, peepholes = (*inputs, *[None] * 8)[:8]
    mode = attrs["mode"]
    for refused, what in (
        (lengths is not None, "lengths for each sequence"),
        (peepholes is not None, "peepholes"),
        (attrs.get("clip") is not None, "clipping"),
        (bool(attrs.get("input_forget")), "coupled gates"),
    ):
        if refused:
            raise GraphError(f"a recurrent layer with {what} has no torch form")
    batch_first = bool(attrs.get("layout", 0))
    if batch_first:
        x = x.transpose(0, 1)
        state, cell = (None if part is None else part.transpose(0, 1) for part in (state, cell))
    directions, hidden = recurrence.shape[0], recurrence.shape[2]
    backwards = _text(attrs.get("direction", "forward")) == "reverse"
    if backwards:
        x = x.flip(0)
    nothing = x.new_zeros(directions, x.shape[1], hidden)
    first = [nothing if state is None else state]
    if mode == "lstm":
        first.append(nothing if cell is None else cell)
    parameters = []
    for index in range(directions):
        parts = [weight[index], recurrence[index]]
        if bias is not None:
            parts += bias[index].chunk(2)
        parameters += [_reordered(part, mode) for part in parts]
    if mode == "gru" and not attrs.get("linear_before_reset"):
        y, *last = _early_reset(x, first[0], parameters, bias is not None)
    else:
        options = (bias is not None, 1, 0.0, False, directions == 2, False)
        y, *last = _LAYERS[mode](x, first if mode == "lstm" else first[0], parameters, *options)
    y = y.flip(0) if backwards else y
    y = y.reshape(y.shape[0], y.shape[1], directions, hidden)
    if batch_first:
        return (y.transpose(0, 1), *(part.transpose(0, 1) for part in last))
    return (y.transpose(1, 2), *last)


def _early_reset(x: Tensor, first: Tensor, parameters: list[Tensor], biased: bool) -> tuple[Tensor, Tensor]:
    """A GRU whose reset gate acts in front of the recurrence: n = tanh(W·x + R·(r ⊙ h) + b). torch has none."""
    each = 4 if biased else 2
    outputs, last = [], []
    for index, h in enumerate(first):
        weight, recurrence, *biases = parameters[each * index : each * (index + 1)]
        steps = x if index == 0 else x.flip(0)
        given = (steps @ weight.T + (biases[0] + biases[1] if biases else 0)).chunk(3, -1)
        reset, update, new = recurrence.chunk(3)
        states = []
        for in_reset, in_update, in_new in zip(*given, strict=True):
            r, z = torch.sigmoid(in_reset + h @ reset.T), torch.sigmoid(in_update + h @ update.T)
            h = (1 - z) * torch.tanh(in_new + (r * h) @ new.T) + z * h
            states.append(h)
        outputs.append(torch.stack(states if index == 0 else states[::-1]))
        last.append(h)
    return torch.cat(outputs, -1), torch.stack(last)


def _reordered(part: Tensor, mode: str) -> Tensor:
    order = _GATES[mode]
    gates = part.chunk(len(order))
    return torch.cat([gates[gate] for gate in order]) if len(order) > 1 else part


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
