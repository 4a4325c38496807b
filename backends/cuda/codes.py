"""Which of a program's libraries a GPU can run, and why none, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Sequence

from rescompile.backends.artifact import Code
from rescompile.errors import RescompileError

_NAME = re.compile(r"sm_(\d+?)(\d)([af]?)")


def capability(arch: str) -> tuple[int, int]:
    """(9, 0) of sm_90 and of sm_90a."""
    found = _NAME.fullmatch(arch)
    if found is None:
        raise RescompileError(f"'{arch}' is no compute capability: they are spelled sm_90.")
    return int(found[1]), int(found[2])


def runs(code: Code, device: tuple[int, int]) -> bool:
    """Whether a GPU runs the code. Machine code runs within its major number, PTX on all that came later.

    Source: CUDA C++ Programming Guide, compute capabilities; the suffix a means this one only, f this family.
    """
    suffix = code.arch[-1] if code.arch[-1] in "af" else ""
    made_for = capability(code.arch)
    if suffix == "a":
        return device == made_for
    if code.form == "cubin" or suffix == "f":
        return device[0] == made_for[0] and device[1] >= made_for[1]
    return device >= made_for


def choose(codes: Sequence[Code], device: tuple[int, int], driver: tuple[int, int]) -> list[Code]:
    """The codes to run on a GPU, the dynamic one first and then by extents. RescompileError where there are none.

    Machine code goes before PTX, and the nearest architecture before earlier ones.
    """
    fitting = [code for code in codes if runs(code, device)]
    if not fitting:
        held = sorted({f"{code.arch}{'' if code.form == 'cubin' else ' and later, as ' + code.form}" for code in codes})
        raise RescompileError(
            f"The program has code for {', '.join(held)}, and this GPU is sm_{device[0]}{device[1]}: "
            f"compile the model with --target cuda:sm_{device[0]}{device[1]}."
        )
    usable = [code for code in fitting if driver >= code.driver]
    if not usable:
        needed = min(code.driver for code in fitting)
        raise RescompileError(
            f"The program needs a driver for CUDA {needed[0]}.{needed[1]} or later, and this one serves CUDA "
            f"{driver[0]}.{driver[1]}: update the driver, or compile the model with "
            f"--target cuda:sm_{device[0]}{device[1]}."
        )
    best = max(usable, key=lambda code: _preference(code))
    return sorted(
        (code for code in usable if (code.arch, code.form) == (best.arch, best.form)),
        key=lambda code: (bool(code.extents), sorted(code.extents.items())),
    )


def _preference(code: Code) -> tuple[bool, tuple[int, int], bool]:
    return code.form == "cubin", capability(code.arch), code.arch[-1] in "af"
