"""Machine code of generated CUDA source: what the assembler says of it, and of source that is none."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from rescompile.backends.cuda.cubin import compilers, to_cubin


def test_source_that_does_not_compile_is_one_sentence() -> None:
    if not compilers():
        pytest.skip("neither nvcc nor NVRTC here")
    from rescompile.errors import RescompileError

    with pytest.raises(RescompileError, match="does not compile for sm_90"):
        to_cubin('extern "C" __global__ void f() { g(); }', "sm_90")


def test_report_of_the_assembler_is_read() -> None:
    from rescompile.backends.cuda.cubin import ResourceUsage, usage

    log = (
        "ptxas info    : Compiling entry function 'f_kernel' for 'sm_90'\n"
        "ptxas info    : Function properties for f_kernel\n"
        "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 32 bytes smem\n"
        "ptxas info    : Compiling entry function 'g_kernel' for 'sm_90'\n"
        "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 8 registers, used 0 barriers, 400 bytes cmem[0]\n"
    )
    assert usage(log) == (
        ResourceUsage("f_kernel", 40, spill_stores=8, spill_loads=4, shared=32, stack=16),
        ResourceUsage("g_kernel", 8, spill_stores=0, spill_loads=0, shared=0, stack=0),
    )
    assert usage(log)[0].spills == 12
