"""What machine code for an NVIDIA GPU does: per kernel its registers, its accesses by width, its tensor-core work.

Read from a cubin by NVIDIA's disassembler (package nvidia-cuda-nvdisasm, or a CUDA toolkit); no GPU is needed.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from rescompile.backends.cuda.cubin import Cubin
from rescompile.backends.cuda.targets import REGISTERS, WARP, Architecture
from rescompile.errors import RescompileError

_SECTION = re.compile(r"\s*\.section\s+\.text\.(\w+)")
_INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")
_BITS = re.compile(r"\.(128|64|S16|U16|S8|U8)\b")
_NARROW = {"S16": 16, "U16": 16, "S8": 8, "U8": 8}
# What reads or writes memory, by the first word of the instruction.
_ACCESSES = {
    "LDG": "global_loads",
    "LD": "global_loads",
    "STG": "global_stores",
    "ST": "global_stores",
    "LDS": "shared_loads",
    "STS": "shared_stores",
    "LDGSTS": "async_copies",
}
_TENSOR = ("HMMA", "IMMA", "DMMA", "HGMMA", "IGMMA", "QGMMA", "QMMA", "UTCHMMA", "UTCQMMA")
_COUNTED = {
    "SHFL": "shuffles",
    "LDSM": "matrix_loads",
    "STSM": "matrix_stores",
    "BAR": "barriers",
    "UTMALDG": "tensor_copies",
    "UTMASTG": "tensor_copies",
    "SYNCS": "async_barriers",
    "RED": "atomics",
    "ATOMG": "atomics",
    "MUFU": "special",
    "FFMA": "fused_multiply_adds",
}


@dataclass(frozen=True)
class KernelCode:
    """One kernel's machine code, counted as it is written: a loop's body counts once.

    Attributes:
        registers: of a thread; shared: static bytes of a block.
        spills: bytes that a thread moves for lack of registers; stack: bytes of local memory of a thread.
        accesses: instructions by what they access (global_loads, global_stores, shared_loads, shared_stores,
            async_copies) and how many bits at once.
        tensor: tensor-core instructions by their name and shape, such as HMMA.16816.F32.
        counts: shuffles, matrix_loads (ldmatrix), barriers, tensor_copies (TMA), fused_multiply_adds, ...
    """

    kernel: str
    registers: int
    shared: int
    spills: int
    stack: int
    instructions: int
    accesses: dict[str, dict[int, int]] = field(default_factory=dict)
    tensor: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def widths(self, what: str) -> list[int]:
        """Bits of the accesses of a kind, the widest first; `global` for loads and stores."""
        kinds = ["global_loads", "global_stores"] if what == "global" else [what]
        return sorted({width for kind in kinds for width in self.accesses.get(kind, {})}, reverse=True)


def disassembler() -> Path | None:
    """Where nvdisasm is: of a toolkit on the path, or as pip puts it; None where it is not."""
    found = shutil.which("nvdisasm")
    if found:
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(root).glob("c*/bin/nvdisasm"), reverse=True):
            return path
    return None


def disassemble(cubin: bytes) -> str:
    """The machine code as text. RescompileError where nvdisasm is missing or turns the code down."""
    program = disassembler()
    if program is None:
        raise RescompileError("Machine code is read by nvdisasm, which is not here: pip install nvidia-cuda-nvdisasm.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.cubin"
        path.write_bytes(cubin)
        # Labels of branches, for which it would follow the code, are not asked for.
        done = subprocess.run([program, "-c", "-ndf", path], capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise RescompileError(f"nvdisasm cannot read the machine code: {said[0] if said else 'it said nothing'}.")
    return done.stdout


def read(cubin: Cubin) -> dict[str, KernelCode]:
    """Each kernel's code by name; `_kernel`, which TVM puts behind a function's name, is left out."""
    mnemonics = listed(disassemble(cubin.data))
    found = {}
    for used in cubin.usage:
        name = used.kernel.removesuffix("_kernel")
        found[name] = counted(
            name, mnemonics.get(used.kernel, []), used.registers, used.shared, used.spills, used.stack
        )
    return found


def listed(text: str) -> dict[str, list[str]]:
    """Instructions, without operands, of each kernel in nvdisasm's text."""
    found: dict[str, list[str]] = {}
    here: list[str] = []
    for line in text.splitlines():
        section = _SECTION.match(line)
        if section:
            here = found.setdefault(section[1], [])
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction:
            here.append(instruction[1])
    return found


def counted(name: str, mnemonics: list[str], registers: int, shared: int, spills: int, stack: int) -> KernelCode:
    """Facts of a kernel's instructions, and of what the assembler says that it takes."""
    accesses: dict[str, Counter[int]] = {}
    tensor: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for mnemonic, times in Counter(mnemonics).items():
        word = mnemonic.split(".")[0]
        if word in _ACCESSES:
            accesses.setdefault(_ACCESSES[word], Counter())[_width(mnemonic)] += times
        if word in _TENSOR:
            tensor[mnemonic] += times
        if word in _COUNTED:
            counts[_COUNTED[word]] += times
    ordered = {kind: dict(sorted(accesses[kind].items(), reverse=True)) for kind in sorted(accesses)}
    # What follows the last EXIT is padding up to the end of the section.
    last = max((place for place, mnemonic in enumerate(mnemonics) if mnemonic == "EXIT"), default=len(mnemonics) - 1)
    return KernelCode(
        name,
        registers,
        shared,
        spills,
        stack,
        last + 1,
        ordered,
        dict(sorted(tensor.items())),
        dict(sorted(counts.items())),
    )


def _width(mnemonic: str) -> int:
    found = _BITS.search(mnemonic)
    return 32 if found is None else _NARROW.get(found[1]) or int(found[1])


# ---- occupancy -------------------------------------------------------------------------------------------------------

_WARPS = {80: 64, 86: 48, 87: 48, 89: 48, 90: 64, 100: 64, 103: 64, 120: 48}  # that a multiprocessor holds
_BLOCKS = {80: 32, 86: 16, 87: 16, 89: 24, 90: 32, 100: 32, 103: 32, 120: 24}
_GRANULE = 256  # registers: what a warp is given is a multiple of it
_RESERVED = 1024  # bytes of shared memory that each block takes besides its own


def occupancy(limits: Architecture, threads: int, registers: int, shared: int) -> int:
    """Warps of a kernel that one multiprocessor holds at once (CUDA C++ Programming Guide, technical specifications).

    threads: of a block; registers: of a thread; shared: bytes of a block. 0 where not even one block fits.
    """
    warps = -(-threads // WARP)
    each = -(-registers * WARP // _GRANULE) * _GRANULE
    by_registers = REGISTERS // each // warps if each else _BLOCKS[limits.number]
    # A block can have all of a multiprocessor's shared memory but what is reserved for it.
    by_shared = (limits.shared_bytes + _RESERVED) // (shared + _RESERVED)
    return min(_WARPS[limits.number] // warps, _BLOCKS[limits.number], by_registers, by_shared) * warps


def dynamic_shared(function: Any) -> int:
    """Bytes of shared memory that a kernel's launch asks for: what its body allocates in the scope `shared.dyn`."""
    total = 0

    def visit(node: Any) -> None:
        nonlocal total
        buffer = node.buffer
        if str(buffer.scope()) == "shared.dyn":
            size = tvm.DataType(str(buffer.dtype)).itemsize
            for extent in buffer.shape:
                size *= int(extent)
            total += size

    tvm_ffi.structural_walk(function.body, [(tvm.tirx.AllocBuffer, visit)], order="post")
    return total
