"""TVM and what rescompile needs beside it, packed for a machine with Python 3.12, torch and no package index.

    python -m benchmarks.gpu_pack_compiler DIR [--mib 40]

DIR/compiler.tar.xz.00, .01, ... are parts of one archive of about 60 MiB, so that each can travel in a call of its own;
DIR/compiler.txt says how many there are. `benchmarks/gpu_device.sh --compiler PART...` puts them together.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_pack import PLATFORMS, PYTHON

PACKAGES = ("msgspec", "rustworkx", "xgboost-cpu")
# numpy, torch, cloudpickle, psutil, tornado, safetensors, ml_dtypes and onnx are there already.
_LEFT_OUT = ("/include/", "/3rdparty/", "/__pycache__/")


def main(given: Sequence[str] | None = None) -> None:
    """Download, pack, cut into parts."""
    from rescompile.backends.require import PINS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mib", type=int, default=40, help="the largest part")
    options = parser.parse_args(given)
    options.folder.mkdir(parents=True, exist_ok=True)
    pins = [f"{name}=={PINS[name]}" for name in ("apache-tvm", "apache-tvm-ffi")]
    with tempfile.TemporaryDirectory() as place:
        wheels, site = Path(place) / "wheels", Path(place) / "site"
        platforms = [part for name in PLATFORMS for part in ("--platform", f"{name}_x86_64")]
        platforms += ["--platform", "manylinux2014_x86_64"]
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", PYTHON, "--implementation", "cp", *platforms, "-d", str(wheels)]
        subprocess.run([*command, *pins, *PACKAGES], check=True)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if not any(part in f"/{name}" for part in _LEFT_OUT)]
                archive.extractall(site, names)
        packed = Path(place) / "site.tar"
        with tarfile.open(packed, "w") as archive_:
            archive_.add(site, arcname="site")
        subprocess.run(["xz", "-T1", "--x86", "--lzma2=preset=9e,dict=256MiB", str(packed)], check=True)
        print("\n".join(map(str, cut(packed.with_suffix(".tar.xz"), options.folder, options.mib << 20))))


def cut(archive: Path, folder: Path, largest: int) -> list[Path]:
    """An archive in parts of at most `largest` bytes, and how many they are."""
    data = archive.read_bytes()
    paths = []
    for number, start in enumerate(range(0, len(data), largest)):
        path = folder / f"compiler.tar.xz.{number:02d}"
        path.write_bytes(data[start : start + largest])
        paths.append(path)
    told = folder / "compiler.txt"
    told.write_text(f"parts {len(paths)}\n", encoding="utf-8")
    return [*paths, told]


if __name__ == "__main__":
    main()
