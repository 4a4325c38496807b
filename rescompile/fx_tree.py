"""Copying a graph and its module tree without its tensors; adding and removing tensors by path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from rescompile.errors import GraphError
from rescompile.fx_types import DTYPES, TORCH_DTYPES

_REGISTRIES = (
    "_parameters",
    "_buffers",
    "_non_persistent_buffers_set",
    "_modules",
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
Tensors = Callable[[torch.Tensor], torch.Tensor]


def copy_children(source: nn.Module, tensors: Tensors = lambda tensor: tensor) -> dict[str, Any]:
    """The registries of a copy of `source`: its parameters, buffers and submodules, each mapped through `tensors`.

    A tensor or a module that occurs twice is one in the copy too.
    """
    memo: dict[int, Any] = {}

    def tensor(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in memo:
            memo[id(value)] = tensors(value)
        return memo[id(value)]

    def registries(module: nn.Module) -> dict[str, Any]:
        copied: dict[str, Any] = {}
        for key, value in module.__dict__.items():
            if key in ("_parameters", "_buffers"):
                copied[key] = {name: tensor(item) for name, item in value.items()}
            elif key == "_modules":
                copied[key] = {name: child(item) for name, item in value.items()}
            elif key in _REGISTRIES:
                copied[key] = value.copy()
            else:
                # Constants that torch.export lifts are plain attributes.
                copied[key] = tensor(value)
        return copied

    def child(module: Any) -> Any:
        if module is None or id(module) in memo:
            return None if module is None else memo[id(module)]
        twin = memo[id(module)] = module.__class__.__new__(module.__class__)
        twin.__dict__.update(registries(module))
        _relink_recurrent(twin)
        if isinstance(module, fx.GraphModule):  # a branch of a condition: its code belongs to its class
            twin.graph = copy_graph(module.graph, {})
        return twin

    return registries(source)


def copy_graph(graph: fx.Graph, memo: dict[fx.Node, fx.Node]) -> fx.Graph:
    """A copy of a graph with the same node names. `memo` receives the copy of each node."""
    twin = fx.Graph(tracer_cls=graph._tracer_cls)
    for node in graph.nodes:
        memo[node] = twin.node_copy(node, memo.__getitem__)
    twin._codegen = graph._codegen
    return twin


def copy_module(
    module: fx.GraphModule, memo: dict[fx.Node, fx.Node], tensors: Tensors = lambda tensor: tensor
) -> fx.GraphModule:
    """A copy with its own graph and module tree. `memo` receives the copy of each node."""
    kind: Any = type(module).__bases__[0]  # fx makes a class for each instance
    twin: fx.GraphModule = kind.__new__(kind)
    twin.__dict__.update(copy_children(module, tensors))
    twin.meta = dict(module.meta)
    twin.graph = copy_graph(module.graph, memo)
    return twin


def _relink_recurrent(module: Any) -> None:
    """nn.LSTM and its kin keep a second list of their weights."""
    if "_flat_weights" in module.__dict__:
        names = module.__dict__["_flat_weights_names"]
        module.__dict__["_flat_weights"] = [module._parameters.get(name) for name in names]


def owner_of(root: nn.Module, path: str, *, create: bool = False) -> tuple[nn.Module, str]:
    """The module that holds the tensor at a dotted path, and the tensor's name in it."""
    *containers, leaf = path.split(".")
    module = root
    for position, name in enumerate(containers):
        child = module._modules.get(name)
        if child is None:
            if not create or name in module.__dict__ or name in module._parameters or name in module._buffers:
                raise GraphError(f"The model has no submodule '{'.'.join(containers[: position + 1])}'.")
            child = nn.Module()
            child.train(module.training)
            module.add_module(name, child)
        module = child
    return module, leaf


def add_tensor(root: nn.Module, path: str, data: np.ndarray[Any, Any], *, trainable: bool) -> torch.Tensor:
    """A new tensor at a dotted path: a parameter when it can be trained, a buffer otherwise."""
    module, leaf = owner_of(root, path, create=True)
    if hasattr(module, leaf):
        raise GraphError(f"The model already has something at '{path}': choose another name.")
    tensor = to_torch(data).to(device_of(root))
    if trainable and tensor.is_floating_point():
        parameter = nn.Parameter(tensor)
        module.register_parameter(leaf, parameter)
        return parameter
    module.register_buffer(leaf, tensor)
    return tensor


def replace_tensor(root: nn.Module, path: str, data: np.ndarray[Any, Any]) -> None:
    """Another tensor at a dotted path, a parameter or a buffer as the old one was."""
    module, leaf = owner_of(root, path)
    old = getattr(module, leaf)
    tensor = to_torch(data).to(old.device)
    if isinstance(old, nn.Parameter):
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        return
    module._buffers[leaf] = tensor


def device_of(module: nn.Module) -> torch.device:
    """Where the module's tensors are; the CPU for a module without any."""
    tensors = (tensor for group in (module.parameters(), module.buffers()) for tensor in group)
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def remove_tensor(root: nn.Module, path: str) -> None:
    """Remove the tensor at a path, and containers that it leaves empty."""
    module, leaf = owner_of(root, path)
    module._non_persistent_buffers_set.discard(leaf)
    for registry in (module._parameters, module._buffers, module.__dict__):
        registry.pop(leaf, None)
    containers = path.split(".")[:-1]
    while containers:
        parent, name = owner_of(root, ".".join(containers))
        child = parent._modules.get(name)
        if child is None or type(child) is not nn.Module or child._parameters or child._buffers or child._modules:
            return
        del parent._modules[name]
        containers.pop()


def to_torch(data: np.ndarray[Any, Any]) -> torch.Tensor:
    """A tensor with a copy of the array's contents; ml_dtypes' types by their bits."""
    dtype = TORCH_DTYPES.get(str(data.dtype))
    if dtype is None:
        raise GraphError(f"torch has no dtype '{data.dtype}'.")
    data = np.ascontiguousarray(data).reshape(data.shape)
    if data.dtype.kind == "V" or str(data.dtype) not in np.sctypeDict:
        bits = data.view(f"uint{8 * data.dtype.itemsize}")
        return torch.from_numpy(bits.copy()).view(dtype)
    return torch.from_numpy(data.copy())


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The tensor's contents; bfloat16 and float8 as ml_dtypes' types."""
    tensor = tensor.detach().cpu()
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        import ml_dtypes

        bits = torch.int16 if tensor.dtype is torch.bfloat16 else torch.uint8
        array: np.ndarray[Any, Any] = tensor.contiguous().view(bits).numpy()
        return array.view(getattr(ml_dtypes, DTYPES[tensor.dtype]))
    result: np.ndarray[Any, Any] = tensor.numpy()
    return result
