"""A linear's bias that an exporter wrote as an addition of its own: x·W followed by + b."""

from __future__ import annotations

from rescompile.composites.region import Recogniser
from rescompile.graph import Op
from rescompile.kinds import OpKind


def linear_bias(recogniser: Recogniser, add: Op) -> Op | None:
    """y = x·W + b → LINEAR(x, W, b), where b is a constant [out_features] and nothing else reads x·W."""
    if len(add.inputs) != 2 or add.scales != (1.0, 1.0):
        return None
    for index, product in enumerate(add.inputs):
        bias = add.inputs[1 - index]
        linear = None if product is None else product.producer
        if linear is None or linear.kind is not OpKind.LINEAR or linear.operand("bias") is not None:
            continue
        weight = linear.inputs[1]
        if weight is None or bias is None or not bias.constant or weight.shape is None or len(weight.shape) != 2:
            continue
        width = weight.shape[0 if linear.attr("transpose_weight") else 1]
        if bias.shape == (width,):
            inputs = [linear.inputs[0], weight, bias]
            return recogniser.cover([linear, add], OpKind.LINEAR, inputs, add.output, dict(linear.attrs))
    return None
