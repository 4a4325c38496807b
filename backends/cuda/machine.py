"""Whether this machine can run programs for NVIDIA GPUs, and why not, in one sentence."""

from __future__ import annotations

from rescompile.backends import tvm_runtime
from rescompile.backends.cuda import cudart
from rescompile.errors import RescompileError


def check_machine(index: int) -> None:
    """RescompileError where the GPU of that index is not there, or its driver does not serve this CUDA."""
    missing = tvm_runtime.load_cuda()
    if "libcuda.so" in missing:
        raise RescompileError(
            "This machine has no NVIDIA driver, which the program needs: run it where there is a GPU, or compile the "
            "model for cpu."
        )
    if tvm_runtime.CUDART in missing:
        raise RescompileError(
            f"The program needs CUDA's runtime library {tvm_runtime.CUDART}, which is not here: "
            f"pip install 'nvidia-cuda-runtime>=13,<14'."
        )
    if missing:
        raise RescompileError(f"TVM's runtime for NVIDIA GPUs cannot be loaded: {missing}.")
    count, status = cudart.device_count()
    if status == cudart.INSUFFICIENT_DRIVER:
        driver, runtime = (".".join(map(str, of())) for of in (cudart.driver_version, cudart.runtime_version))
        raise RescompileError(
            f"The driver of this machine serves CUDA {driver} at most, and the runtime is that of CUDA {runtime}: "
            f"update the driver."
        )
    if not count:
        raise RescompileError(
            "This machine has an NVIDIA driver and no GPU that it can use: run the program where there is one."
        )
    if index >= count:
        raise RescompileError(f"There is no GPU cuda:{index} here: the last is cuda:{count - 1}.")
