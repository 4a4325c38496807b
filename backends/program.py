"""A compiled model: called with torch tensors or numpy arrays, returning the same, without copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rescompile.backends import artifact, tvm_runtime
from rescompile.backends.artifact import CODE, Manifest, TensorInfo
from rescompile.errors import RescompileError

if TYPE_CHECKING:
    import torch

    from rescompile.backends.cuda.gpu_program import GpuProgram
    from rescompile.backends.cuda.memory import TorchMemory

# What generated code takes for granted of every buffer that it is given.
ALIGNMENT = 64


class Program:
    """y = program(x, ...): the model as machine code.

    Tensors go in the order of the graph's inputs and come out in the order of its outputs: one tensor, or a tuple
    where there are several. torch tensors give torch tensors, numpy arrays numpy arrays.

    On a GPU torch tensors are used where they lie, the kernels run on torch's current stream, and the outputs are
    ordered on it. Arrays are copied there and back, and are there when the call returns. Weights are uploaded by the
    first call, to the GPU that its tensors are on. Where shapes are static, later calls replay a CUDA graph; with
    `graphs = False` each kernel is launched by itself.
    """

    def __init__(self, code: Any, weights: dict[str, Any], manifest: Manifest) -> None:
        self.manifest = manifest
        self._code: Mapping[str, Any] = code if isinstance(code, Mapping) else {CODE: code}
        self._weights = weights
        self._call: Any = None
        self._bound: Any = None
        self._gpu: GpuProgram | None = None
        self._memory: TorchMemory | None = None
        self._graphs = True
        self._threads = 0

    # ---- running -----------------------------------------------------------------------------------------------

    def __call__(self, *inputs: torch.Tensor | np.ndarray[Any, Any]) -> Any:
        """Run the model. RescompileError when an input's number, shape, dtype or device is not the declared one."""
        if self.manifest.device not in ("cpu", "cuda"):
            target, note = self.manifest.target, self.manifest.note
            raise RescompileError(f"The program is compiled for {target}, which this process cannot run: {note}.")
        if len(inputs) != len(self.manifest.inputs):
            names = ", ".join(info.name for info in self.manifest.inputs)
            raise RescompileError(
                f"{len(inputs)} inputs were given where the program takes {len(self.manifest.inputs)}: {names}."
            )
        if isinstance(inputs[0], np.ndarray) if inputs else True:
            return self._run_numpy(inputs)
        return self._run_torch(inputs)

    @property
    def graphs(self) -> bool:
        """Whether calls on a GPU replay CUDA graphs."""
        return self._graphs

    @graphs.setter
    def graphs(self, on: bool) -> None:
        self._graphs = on
        if self._gpu is not None:
            self._gpu.set_graphs(on)

    @property
    def note(self) -> str:
        """What is to be known of how it runs: why launches are not captured, or that the code is source."""
        return (self._gpu.note if self._gpu is not None else "") or self.manifest.note

    def _run_torch(self, inputs: Sequence[Any]) -> Any:
        extents: dict[str, int] = {}
        ready = []
        for info, tensor in zip(self.manifest.inputs, inputs, strict=True):
            dtype = str(getattr(tensor, "dtype", "")).removeprefix("torch.")
            if not dtype or isinstance(tensor, np.ndarray):
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
        if self.manifest.device == "cuda":
            return _packed(self._run_on_gpu(ready, extents))
        import tvm_ffi

        result = self._on_cpu()(*ready, self._bound)
        if isinstance(result, tvm_ffi.Array):
            return tuple(_to_torch(part) for part in result)
        return _to_torch(result)

    def _run_on_gpu(self, tensors: Sequence[Any], extents: Mapping[str, int]) -> list[Any]:
        import torch

        from rescompile.backends.cuda.memory import TorchMemory

        index = tensors[0].device.index
        for info, tensor in zip(self.manifest.inputs, tensors, strict=True):
            if tensor.device.index != index:
                raise _wrong(info, f"is on {tensor.device}", f"one on cuda:{index}, as the others")
        if self._gpu is not None and self._gpu.index != index:
            raise RescompileError(
                f"The program runs on cuda:{self._gpu.index}, where its weights are, and the inputs are on "
                f"cuda:{index}: load the program once more for that GPU."
            )
        current = torch.cuda.current_device()
        if current != index:
            raise RescompileError(
                f"The inputs are on cuda:{index} and the current device is cuda:{current}: "
                f"call the program under `with torch.cuda.device({index})`."
            )
        gpu = self._on_gpu(index)
        if self._memory is None:
            self._memory = TorchMemory(index, libraries=bool(self.manifest.libraries))
        return gpu.run(tensors, extents, self._memory)

    def _run_numpy(self, inputs: Sequence[Any]) -> Any:
        extents: dict[str, int] = {}
        for info, array in zip(self.manifest.inputs, inputs, strict=True):
            if not isinstance(array, np.ndarray):
                raise _wrong(info, f"is a {type(array).__name__}", "a numpy array, as the other inputs")
            _check(info, array.shape, str(array.dtype), extents)
        if self.manifest.device == "cuda":
            return _packed(self._on_gpu(0 if self._gpu is None else self._gpu.index).run_numpy(inputs, extents))
        import tvm_ffi

        call, here = self._on_cpu(), tvm_runtime.device(tvm_runtime.CPU)
        result = call(*(tvm_runtime.placed(array, here) for array in inputs), self._bound)
        parts = list(result) if isinstance(result, tvm_ffi.Array) else [result]
        infos = self.manifest.outputs
        return _packed(
            [
                tvm_runtime.download(part, part.shape, tvm_runtime.numpy_dtype(info.dtype))
                for part, info in zip(parts, infos, strict=True)
            ]
        )

    def _on_gpu(self, index: int) -> GpuProgram:
        """Choose the code for the GPU, and put it and the weights there."""
        if self._gpu is None:
            from rescompile.backends.cuda.gpu_program import GpuProgram

            self._gpu = GpuProgram(self._code, self._weights, self.manifest, index)
            self._gpu.set_graphs(self._graphs)
        return self._gpu

    def _on_cpu(self) -> Any:
        """Link the code into the process and put the weights where it reads them."""
        from rescompile.backends import threads

        if self._call is None:
            import tvm_ffi

            tvm_runtime.load()
            threads.prepare()
            self._threads = min(self.manifest.threads, threads.available())
            device = tvm_runtime.device(tvm_runtime.CPU)
            code = self._code[CODE]
            library = artifact.loaded(code) if isinstance(code, bytes) else code.jit()
            self._call = tvm_runtime.VirtualMachine(library, device)["main"]
            weights = [tvm_runtime.placed(data, device) for data in self._weights.values()]
            self._bound = tvm_ffi.convert(weights)
        if self._threads != threads.current():
            threads.use(self._threads)
        return self._call

    # ---- keeping -----------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the program into one file, whole or not at all."""
        return artifact.write(Path(path), self._code, self._weights, self.manifest)

    @staticmethod
    def load(path: str | Path) -> Program:
        """A program from its file; neither torch nor the model's code is needed."""
        code, weights, manifest = artifact.read(Path(path))
        return Program(code, weights, manifest)

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


def _packed(outputs: list[Any]) -> Any:
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


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
