"""A program on one GPU: the code that this GPU runs, the weights it shares, and the size of batch that a call takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rescompile.backends import artifact, tvm_runtime
from rescompile.backends.artifact import Code, Manifest, TensorInfo
from rescompile.backends.cuda import codes, cudart
from rescompile.backends.cuda.machine import check_machine
from rescompile.backends.cuda.memory import Memory
from rescompile.backends.cuda.runner import GpuRunner
from rescompile.errors import RescompileError

_SOURCE_CALLBACK = "tvm_callback_cuda_compile"  # TVM asks it for machine code of a library that holds source


class GpuProgram:
    """Code and weights on the GPU of that index. RescompileError where it cannot run there.

    A program with sizes of batch pads a call to the next of them, and cuts the outputs: its rows are independent. One
    that is larger than all of them runs on the code for any size.
    """

    def __init__(
        self, code: Mapping[str, Any], weights: Mapping[str, np.ndarray[Any, Any]], manifest: Manifest, index: int
    ) -> None:
        check_machine(index)
        self.index = index
        self._manifest = manifest
        device = cudart.capability(index)
        chosen = codes.choose(manifest.codes, device, cudart.driver_version())
        if any(one.form == "cuda" for one in chosen):
            _compile_source_for(f"sm_{device[0]}{device[1]}")
        if manifest.libraries:
            from rescompile.backends.cuda import libraries

            libraries.register()
        self._batch = next((symbol for one in chosen for symbol in one.extents), "")
        self._runners: dict[int, GpuRunner] = {}
        self._padded: dict[tuple[int, ...], list[Any]] = {}
        with cudart.on_device(index):
            where = tvm_runtime.device(tvm_runtime.CUDA, index)
            wanted = {name for one in chosen for name in one.weights}
            placed = {name: tvm_runtime.placed(data, where) for name, data in weights.items() if name in wanted}
            for one in chosen:
                self._runners[one.extents.get(self._batch, 0)] = self._runner(code[one.file], one, placed)
        self._sizes = sorted(size for size in self._runners if size)

    @property
    def note(self) -> str:
        """Why launches are not captured, where they could be."""
        return next((runner.note for runner in self._runners.values() if runner.note), "")

    def set_graphs(self, on: bool) -> None:
        """Whether launches are captured and replayed."""
        for runner in self._runners.values():
            runner.graphs = on

    def run(self, inputs: Sequence[Any], extents: Mapping[str, int], memory: Memory) -> list[Any]:
        """The outputs, in memory of the caller's, ordered on its stream."""
        runner, values, size = self._for(extents)
        rows = extents.get(self._batch, 0)
        if size in (0, rows):
            return runner.run(inputs, values, memory)
        outputs = runner.run(self._grown(inputs, runner, size, rows, values, memory), values, memory)
        return [
            memory.rows(tensor, rows) if batched else tensor
            for tensor, batched in zip(outputs, self._batched(self._manifest.outputs), strict=True)
        ]

    def run_numpy(self, arrays: Sequence[np.ndarray[Any, Any]], extents: Mapping[str, int]) -> list[Any]:
        """The outputs as arrays, when they are there."""
        runner, values, size = self._for(extents)
        rows = extents.get(self._batch, 0)
        if size in (0, rows):
            return runner.run_numpy(arrays, values)
        grown = [
            np.concatenate([array, np.zeros((size - rows, *array.shape[1:]), array.dtype)]) if batched else array
            for array, batched in zip(arrays, self._batched(self._manifest.inputs), strict=True)
        ]
        outputs = runner.run_numpy(grown, values)
        return [
            array[:rows] if batched else array
            for array, batched in zip(outputs, self._batched(self._manifest.outputs), strict=True)
        ]

    # ---- inside --------------------------------------------------------------------------------------------------

    def _for(self, extents: Mapping[str, int]) -> tuple[GpuRunner, list[int], int]:
        """The code for these extents, what it is told of them, and the size of batch that it is for; 0 is any."""
        rows = extents.get(self._batch, 0)
        size = next((size for size in self._sizes if size >= rows), 0) if rows else 0
        fixed = (self._batch,) if size else ()
        return self._runners[size], [extents[name] for name in self._manifest.symbols if name not in fixed], size

    def _grown(
        self, inputs: Sequence[Any], runner: GpuRunner, size: int, rows: int, values: Sequence[int], memory: Memory
    ) -> list[Any]:
        """The inputs with further rows: zeros at first, after that of an earlier call, which are as valid."""
        stream = memory.stream
        key = (stream, size, *values)
        batched = self._batched(self._manifest.inputs)
        if key not in self._padded:
            fresh = []
            for info, tensor in zip(runner.inputs, inputs, strict=True):
                shape = (size, *tensor.shape[1:])
                made = memory.empty(shape, info.dtype)
                cudart.clear(memory.pointer(made), tvm_runtime.nbytes(shape, info.dtype), stream)
                fresh.append(made)
            self._padded[key] = fresh
        grown = []
        for tensor, held, info, one in zip(inputs, self._padded[key], runner.inputs, batched, strict=True):
            if one:
                shape = (rows, *tensor.shape[1:])
                size_ = tvm_runtime.nbytes(shape, info.dtype)
                cudart.copy(memory.pointer(held), memory.pointer(tensor), size_, stream)
            grown.append(held if one else tensor)
        return grown

    def _batched(self, infos: Sequence[TensorInfo]) -> list[bool]:
        return [bool(info.shape) and info.shape[0] == self._batch for info in infos]

    def _runner(self, library: Any, code: Code, placed: Mapping[str, Any]) -> GpuRunner:
        module = artifact.loaded(library) if isinstance(library, bytes) else library.jit()
        weights = [placed[name] for name in code.weights]
        symbols = [symbol for symbol in self._manifest.symbols if symbol not in code.extents]
        inputs, outputs = (_at(infos, code.extents) for infos in (self._manifest.inputs, self._manifest.outputs))
        return GpuRunner(module, weights, inputs, outputs, dynamic=bool(symbols), index=self.index)


def _at(infos: Sequence[TensorInfo], extents: Mapping[str, int]) -> list[TensorInfo]:
    return [
        replace(
            info,
            shape=tuple(extents.get(extent, extent) if isinstance(extent, str) else extent for extent in info.shape),
        )
        for info in infos
    ]


def _compile_source_for(arch: str) -> None:
    """Let TVM have source compiled by us. RescompileError where there is nothing to compile it with."""
    import tvm_ffi

    from rescompile.backends.cuda.cubin import compilers, to_cubin

    if not compilers():
        raise RescompileError(
            "The program holds CUDA source, as there was no compiler where it was made, and neither nvcc nor NVRTC is "
            "here to compile it: pip install nvidia-cuda-nvrtc."
        )

    def compiled(source: str) -> bytes:
        made = to_cubin(source, arch)
        return made.data if made is not None else b""

    tvm_ffi.register_global_func(_SOURCE_CALLBACK, compiled, override=True)
