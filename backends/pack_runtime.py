"""python -m rescompile.backends.pack_runtime DIR: what runs compiled programs, for a machine without a package index.

DIR/site holds TVM's two runtime libraries, the package tvm_ffi for the Python that is asked for, and the modules of
rescompile that load programs: about 7 MB. There, with numpy (and torch, where its tensors are given):

    export PYTHONPATH=DIR/site
    python -c 'from rescompile.backends.program import load; print(load("model.rcp")(x))'

The libraries are those of the installed apache-tvm. tvm_ffi is the installed one where that is for the same Python, and
comes from the package index otherwise.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from rescompile.backends import tvm_runtime
from rescompile.backends.require import PINS, require_tvm
from rescompile.errors import RescompileError

PYTHON = "3.12"
# What a program's process imports of this package, and no more: the core, torch's graphs and the compiler stay behind.
MODULES = (
    "__init__", "errors", "backends/__init__", "backends/artifact", "backends/program", "backends/quiet",
    "backends/threads", "backends/tvm_runtime", "backends/cuda/__init__", "backends/cuda/codes", "backends/cuda/cubin",
    "backends/cuda/cudart", "backends/cuda/gpu_program", "backends/cuda/libraries", "backends/cuda/machine",
    "backends/cuda/memory", "backends/cuda/nvrtc", "backends/cuda/runner",
)  # fmt: skip
# Of tvm_ffi: headers, sources and what is for building extensions.
_LEFT_OUT = ("include", "3rdparty", "src", "cython", "share", "stub", "__pycache__", "CMakeLists.txt")
_PLATFORMS = ("2_34", "2_31", "2_28", "2_27", "2_24", "2_17")


def pack(folder: Path, python: str = PYTHON) -> Path:
    """Write DIR/site for a Python of that version, on x86-64 Linux. RescompileError where a part cannot be had."""
    require_tvm()
    site = folder / "site"
    if site.exists():
        raise RescompileError(f"'{site}' is there already: name a folder without one.")
    libraries = site / "tvm" / "lib"
    libraries.mkdir(parents=True)
    for name in (tvm_runtime.RUNTIME, tvm_runtime.CUDA_RUNTIME):
        shutil.copy2(tvm_runtime.folder() / name, libraries / name)
    _copy_facts("apache-tvm", site)
    _add_ffi(site, python)
    root = Path(__file__).resolve().parent.parent
    source = {"backends": Path(__file__).resolve().parent}
    for module in MODULES:
        first, _, rest = module.partition("/")
        path = source[first] / f"{rest}.py" if first in source else root / "rescompile" / f"{module}.py"
        target = site / "rescompile" / f"{module}.py"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return site


def size(site: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in site.rglob("*") if path.is_file())


def _add_ffi(site: Path, python: str) -> None:
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        for package, target in (("apache-tvm-ffi", "tvm_ffi"), ("typing_extensions", "typing_extensions.py")):
            installed = Path(str(metadata.distribution(package).locate_file(target)))
            if installed.is_dir():
                shutil.copytree(installed, site / target, ignore=shutil.ignore_patterns(*_LEFT_OUT))
            else:
                shutil.copy2(installed, site / target)
            _copy_facts(package, site)
    else:
        with tempfile.TemporaryDirectory() as wheels:
            _download(Path(wheels), python)
            for wheel in Path(wheels).glob("*.whl"):
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)
        for name in _LEFT_OUT:
            for path in (site / "tvm_ffi").rglob(name):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _download(folder: Path, python: str) -> None:
    wanted = [f"apache-tvm-ffi=={PINS['apache-tvm-ffi']}", "typing_extensions"]
    platforms = [part for name in _PLATFORMS for part in ("--platform", f"manylinux_{name}_x86_64")]
    command = [
        sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--implementation", "cp",
        "--python-version", python, *platforms, "-d", str(folder), *wanted,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RescompileError(
            f"tvm_ffi for Python {python} cannot be downloaded ({said[-1].strip() if said else 'pip failed'}): "
            f"run this with a package index, or with Python {python} itself."
        )


def _copy_facts(package: str, site: Path) -> None:
    """Name, version and licences of a package: `importlib.metadata` finds it by them."""
    found = metadata.distribution(package)
    target = site / f"{package.replace('-', '_')}-{found.version}.dist-info"
    target.mkdir(exist_ok=True)
    (target / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {found.version}\n")
    for file in found.files or ():
        if "license" in file.name.lower() or "notice" in file.name.lower():
            shutil.copy2(Path(str(found.locate_file(file))), target / file.name)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rescompile.backends.pack_runtime", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--python", default=PYTHON, metavar="VERSION", help=f"of the machine it is for; {PYTHON}")
    given = parser.parse_args(arguments)
    try:
        site = pack(given.folder, given.python)
    except RescompileError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{site}: {size(site) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
