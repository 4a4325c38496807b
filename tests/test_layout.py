"""The rooms and their arrows, file by file: who may import whom, and that a wheel holds every room."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = {"torch", "torchvision", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "tvm", "tvm_ffi"}
TORCH = {"torch"}
ONNX = {"onnx", "onnx_ir", "onnxscript", "onnxruntime"}
ALL_SEEING = ("api", "cli")


def sources() -> list[Path]:
    """Python files of the package, each once: the links to passes and backends are not followed."""
    found = [path for path in (ROOT / "rescompile").rglob("*.py") if not _behind_link(path)]
    return sorted([*found, *(ROOT / "passes").rglob("*.py"), *(ROOT / "backends").rglob("*.py")])


def _behind_link(path: Path) -> bool:
    return path.relative_to(ROOT / "rescompile").parts[0] in ("passes", "backends")


def imported(tree: ast.AST) -> set[str]:
    """Every module that the code imports, wherever the statement stands."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported_for_types(tree: ast.AST) -> set[str]:
    """What is imported under `if TYPE_CHECKING`, and so never at run time."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found |= set().union(*(imported(statement) for statement in node.body))
    return found


def forbidden(path: Path, modules: set[str]) -> set[str]:
    """Those of `modules` that the file's room must not import."""
    room, stem = path.relative_to(ROOT).parts[0], path.stem
    allowed = set(LIBRARIES)
    closed: set[str] = set()
    if room == "rescompile":
        seeing = stem.split("_")[0] in ALL_SEEING
        closed = set() if seeing else {"rescompile.passes", "rescompile.backends", "rescompile.api", "rescompile.cli"}
        allowed = TORCH if stem.startswith("fx_") else ONNX if stem.startswith("onnx_") else set()
    elif room == "passes":
        closed = {"rescompile.backends", "rescompile.api", "rescompile.cli"}
        allowed = set()
    elif room == "backends":
        closed = {"rescompile.passes", "rescompile.api", "rescompile.cli"}
    libraries = {name for name in modules if name.split(".")[0] in LIBRARIES - allowed}
    rooms = {name for name in modules if any(name == shut or name.startswith(shut + ".") for shut in closed)}
    return libraries | rooms


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = imported(tree) - imported_for_types(tree)
    if path.name in ("__init__.py", "__main__.py") and path.parent == ROOT / "rescompile":
        modules -= {"rescompile.api", "rescompile.cli"}  # the package's own front doors
        modules = {name for name in modules if not name.startswith(("rescompile.api.", "rescompile.cli."))}
    assert forbidden(path, modules) == set()


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("rescompile/graph.py", "torch"),
        ("rescompile/fx_graph.py", "onnx_ir"),
        ("rescompile/onnx_graph.py", "torch"),
        ("rescompile/detect.py", "rescompile.passes"),
        ("passes/fuse.py", "rescompile.backends.lowering"),
        ("passes/fuse.py", "torch.fx"),
        ("backends/lowering.py", "rescompile.passes.fuse"),
    ],
)
def test_a_forbidden_import_is_noticed(path: str, module: str) -> None:
    assert forbidden(ROOT / path, {module}) == {module}


@pytest.mark.parametrize(
    ("path", "module"),
    [("rescompile/fx_graph.py", "torch.fx"), ("rescompile/api.py", "rescompile.passes"), ("backends/a.py", "tvm")],
)
def test_an_allowed_import_is_not(path: str, module: str) -> None:
    assert forbidden(ROOT / path, {module}) == set()


def test_no_file_is_named_like_a_library() -> None:
    assert {path.stem for path in sources()} & LIBRARIES == set()


def test_a_wheel_holds_every_folder_of_the_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {path.parent for path in sources() if path.name == "__init__.py"}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert listed == {name if name.startswith("rescompile") else f"rescompile.{name}" for name in names}
