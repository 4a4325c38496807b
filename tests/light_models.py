"""The light ONNX models that ship with the onnx package, with weights that make the output depend on the input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def randomised(name: str, seed: int = 0) -> onnx.ModelProto:
    """`light_<name>.onnx` with a random initializer in the place of every ConstantOfShape weight.

    Weights are drawn so that activations keep their scale through the network: contractions by fan-in, norms around the
    identity.
    """
    model = onnx.load(str(FOLDER / f"light_{name}.onnx"))
    rng = np.random.default_rng(seed)
    shapes = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    roles = {
        operand: (node.op_type, index) for node in model.graph.node for index, operand in enumerate(node.input) if index
    }
    fixed = []
    for node in list(model.graph.node):
        if node.op_type != "ConstantOfShape":
            continue
        shape = tuple(int(extent) for extent in shapes[node.input[0]])
        kind, index = roles.get(node.output[0], ("", 1))
        if kind == "BatchNormalization":
            data = rng.uniform(0.8, 1.2, shape) if index in (1, 4) else rng.normal(0, 0.1, shape)
        else:
            fan_in = max(int(np.prod(shape[1:])), 1)
            data = rng.standard_normal(shape) * (0.7 / fan_in) ** 0.5 if len(shape) > 1 else rng.normal(0, 0.1, shape)
        fixed.append(numpy_helper.from_array(data.astype(np.float32), node.output[0]))
        model.graph.node.remove(node)
    model.graph.initializer.extend(fixed)
    return model
