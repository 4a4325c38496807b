"""A compiled model: called with torch tensors or numpy arrays, returning the same, without copies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from rescompile.backends import artifact, threads
from rescompile.backends.artifact import Manifest, TensorInfo
from rescompile.backends.cuda import libraries
from rescompile.errors import RescompileError

if TYPE_CHECKING:
    import torch

# What generated code takes for granted of every buffer that it is given.
ALIGNMENT = 64


class Program:
    """y = program(x, ...): the model as machine code.

    Tensors go in the order of the graph's inputs and come out in the order of its outputs: one tensor, or a tuple
    where there are several. torch tensors give torch tensors, numpy arrays numpy arrays.
    """

    def __init__(self, executable: Any, weights: dict[str, Any], manifest: Manifest) -> None:
        self.manifest = manifest
        self._executable = executable
        self._weights = weights
        self._call: Any = None
        self._bound: Any = None
        self._threads = 0

    # ---- running -----------------------------------------------------------------------------------------------

    def __call__(self, *inputs: torch.Tensor | np.ndarray[Any, Any]) -> Any:
        """Run the model. RescompileError when an input's number, shape, dtype or device is not the declared one."""
        if self._call is None:
            self._start()
        if len(inputs) != len(self.manifest.inputs):
            names = ", ".join(info.name for info in self.manifest.inputs)
            raise RescompileError(
                f"{len(inputs)} inputs were given where the program takes {len(self.manifest.inputs)}: {names}."
            )
        if self._threads != threads.current():
            threads.use(self._threads)
        if isinstance(inputs[0], np.ndarray) if inputs else True:
            return self._run_numpy(inputs)
        return self._run_torch(inputs)

    def _run_torch(self, inputs: Sequence[Any]) -> Any:
        extents: dict[str, int] = {}
        ready = []
        for info, tensor in zip(self.manifest.inputs, inputs, strict=True):
            dtype = str(getattr(tensor, "dtype", "")).removeprefix("torch.")
            if not dtype:
                raise _wrong(info, f"is a {type(tensor).__name__}", "a torch tensor, as the other inputs")
            _check(info, tuple(tensor.shape), dtype, extents)
            if tensor.device.type != self.manifest.device:
                raise _wrong(info, f"is on {tensor.device}", f"one on {self.manifest.device}")
            if tensor.requires_grad:
                tensor = tensor.detach()
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
            if tensor.data_ptr() % ALIGNMENT:
                tensor = tensor.clone()
            ready.append(tensor)
        result = self._call(*ready, self._bound)
        if isinstance(result, tvm_ffi.Array):
            return tuple(_to_torch(part) for part in result)
        return _to_torch(result)

    def _run_numpy(self, inputs: Sequence[Any]) -> Any:
        extents: dict[str, int] = {}
        ready = []
        for info, array in zip(self.manifest.inputs, inputs, strict=True):
            if not isinstance(array, np.ndarray):
                raise _wrong(info, f"is a {type(array).__name__}", "a numpy array, as the other inputs")
            _check(info, array.shape, str(array.dtype), extents)
            ready.append(tvm.runtime.tensor(array, device=self._device()))
        result = self._call(*ready, self._bound)
        if isinstance(result, tvm_ffi.Array):
            return tuple(part.numpy() for part in result)
        return result.numpy()

    def _device(self) -> Any:
        return tvm.cuda(0) if self.manifest.device == "cuda" else tvm.cpu(0)

    def _start(self) -> None:
        """Link the code into the process and put the weights where it runs."""
        if self.manifest.device == "cuda" and not tvm.cuda(0).exist:
            raise RescompileError(
                f"The program is compiled for {self.manifest.target}, and this machine has no CUDA GPU: "
                f"run it where there is one, or compile it for cpu."
            )
        if self.manifest.device == "cuda":
            libraries.register()
        if self.manifest.device == "cpu":
            threads.prepare()
            self._threads = min(self.manifest.threads, threads.available())
            threads.use(self._threads)
        device = self._device()
        self._call = relax.VirtualMachine(self._executable, device)["main"]
        self._bound = tvm_ffi.convert([tvm.runtime.tensor(data, device=device) for data in self._weights.values()])

    # ---- keeping -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the program into one file, whole or not at all."""
        if self._executable is None:
            raise RescompileError(
                f"The program is compiled for {self.manifest.target} and was loaded on a machine without CUDA, which "
                f"does not keep its code: copy the file that it was loaded from."
            )
        return artifact.write(Path(path), self._executable, self._weights, self.manifest)

    @staticmethod
    def load(path: str | Path) -> Program:
        """A program from its file; neither torch nor the model's code is needed."""
        executable, weights, manifest = artifact.read(Path(path))
        return Program(executable, weights, manifest)

    # ---- reading -----------------------------------------------------------------------------------------------

    def explain(self) -> list[dict[str, Any]]:
        """What each region of the program is: operations, kernel, tile, candidates tried, time, FLOPs, bytes."""
        return [dict(region) for region in self.manifest.regions]

    def __repr__(self) -> str:
        def said(infos: Sequence[TensorInfo]) -> str:
            return ", ".join(f"{info.name}: {info.dtype}{list(info.shape)}" for info in infos)

        return f"<Program {self.manifest.target}: ({said(self.manifest.inputs)}) -> ({said(self.manifest.outputs)})>"


def load(path: str | Path) -> Program:
    """A program from its file."""
    return Program.load(path)


def _to_torch(tensor: Any) -> Any:
    import torch

    return tensor if isinstance(tensor, torch.Tensor) else torch.utils.dlpack.from_dlpack(tensor)


def _check(info: TensorInfo, shape: Sequence[int], dtype: str, extents: dict[str, int]) -> None:
    if dtype != info.dtype:
        raise _wrong(info, f"is {dtype}", info.dtype)
    if len(shape) != len(info.shape):
        raise _wrong(info, f"has shape {list(shape)}", f"one of {len(info.shape)} dimensions, {list(info.shape)}")
    for have, want in zip(shape, info.shape, strict=True):
        fixed = extents.setdefault(want, have) if isinstance(want, str) else want
        if have != fixed:
            raise _wrong(info, f"has shape {list(shape)}", f"shape {list(info.shape)}" + _where(extents))


def _where(extents: dict[str, int]) -> str:
    return f" with {', '.join(f'{name} = {extent}' for name, extent in extents.items())}" if extents else ""


def _wrong(info: TensorInfo, found: str, wanted: str) -> RescompileError:
    return RescompileError(f"The input '{info.name}' {found}; the program takes {wanted}.")
