"""Where a model is: the three forms of MODEL, and what is said when it is none of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from rescompile.errors import RescompileError
from rescompile.locate import load_attribute, model_form

SOURCE = """
class Net:
    def state_dict(self):
        return {}

net = Net()

def build():
    return Net()

def with_inputs():
    return Net(), (1, 2)

def broken():
    raise KeyError("width")

def nothing():
    return None

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "user_models_for_locate.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "user_models_for_locate"


@pytest.mark.parametrize(
    ("text", "form"),
    [("a/b.onnx", "onnx"), ("net.PT2", "pt2"), ("pkg.models:net", "attribute"), ("m:A.b", "attribute")],
)
def test_the_form_of_a_model(text: str, form: str) -> None:
    assert model_form(text) == form


@pytest.mark.parametrize("text", ["resnet50", "model.tflite", "pkg:", ":net", "a b:net", ""])
def test_what_is_no_model_is_told_the_three_forms(text: str) -> None:
    with pytest.raises(RescompileError, match=r"file\.onnx, file\.pt2 or package\.module:attribute"):
        model_form(text)


def test_a_file_of_weights_is_told_to_name_its_module() -> None:
    with pytest.raises(RescompileError, match="holds weights, not a graph"):
        model_form("resnet50.pth")


@pytest.mark.parametrize(
    ("attribute", "inputs"), [("net", None), ("build", None), ("Net", None), ("with_inputs", (1, 2))]
)
def test_modules_classes_and_callables_are_loaded(module: str, attribute: str, inputs: tuple[int, ...] | None) -> None:
    model, found = load_attribute(f"{module}:{attribute}")
    assert type(model).__name__ == "Net"
    assert found == inputs


@pytest.mark.parametrize(
    ("attribute", "said"),
    [
        ("buidl", "did you mean 'build'"),
        ("broken", "KeyError: 'width'"),
        ("nothing", "returned a NoneType"),
        ("number", "is a int"),
    ],
)
def test_wrong_attributes_are_named(module: str, attribute: str, said: str) -> None:
    with pytest.raises(RescompileError) as caught:
        load_attribute(f"{module}:{attribute}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(RescompileError, match="There is no Python module 'not_installed_anywhere'"):
        load_attribute("not_installed_anywhere.models:net")


def test_a_module_that_fails_to_import_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_models_broken.py").write_text("x = 1\nimport not_installed_anywhere\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RescompileError, match=r"failed: ModuleNotFoundError.*user_models_broken\.py:2"):
        load_attribute("user_models_broken:net")
