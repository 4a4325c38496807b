"""The grammars of passes and inputs: what is printed is read back, and what is wrong is named."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rescompile.specs import InputSpec, SpecError, describe_options, format_pass, parse_input, parse_pass


class Match(Enum):
    PROJECTION = "projection"
    PAD = "pad"


@dataclass(frozen=True)
class Insert:
    name: ClassVar[str] = "insert-shortcuts"

    every: int = 2
    kind: Literal["add", "gated"] = "add"
    match: Match = Match.PROJECTION
    scale: float | None = None
    only: tuple[str, ...] = ()
    zero: bool = False
    label: str = ""


@dataclass(frozen=True)
class Plain:
    name: ClassVar[str] = "fuse"


PASSES: dict[str, type] = {"fuse": Plain, "insert-shortcuts": Insert}


def test_pass_without_options() -> None:
    assert parse_pass("fuse", PASSES) == Plain()
    assert parse_pass("insert-shortcuts{}", PASSES) == Insert()


def test_pass_with_options_of_every_type() -> None:
    text = 'insert-shortcuts{every=3, kind=gated,match=pad,scale=0.5,only=[layer1,"layer 2"],zero=true,label="x,y"}'
    expected = Insert(3, "gated", Match.PAD, 0.5, ("layer1", "layer 2"), True, "x,y")
    assert parse_pass(text, PASSES) == expected


def test_defaults_are_left_out_when_printed() -> None:
    assert format_pass(Insert()) == "insert-shortcuts"
    assert format_pass(Insert(every=4, zero=True)) == "insert-shortcuts{every=4,zero=true}"


@given(
    st.builds(
        Insert,
        every=st.integers(),
        kind=st.sampled_from(["add", "gated"]),
        match=st.sampled_from(Match),
        scale=st.none() | st.floats(allow_nan=False),
        only=st.lists(st.text()).map(tuple),
        zero=st.booleans(),
        label=st.text(),
    )
)
def test_what_is_printed_is_read_back(instance: Insert) -> None:
    assert parse_pass(format_pass(instance), PASSES) == instance


def test_none_and_the_text_none_are_different_things() -> None:
    assert parse_pass("insert-shortcuts{scale=none}", PASSES).scale is None
    assert parse_pass('insert-shortcuts{label="none"}', PASSES).label == "none"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fuze", "no pass 'fuze' (did you mean 'fuse'?)"),
        ("insert-shortcuts{evry=2}", "no option 'evry' (did you mean 'every'?)"),
        ("fuse{every=2}", "no option 'every': it has none"),
        ("insert-shortcuts{every=two}", "takes an integer, not two"),
        ("insert-shortcuts{kind=dense}", "takes one of add, gated, not dense"),
        ("insert-shortcuts{zero=1}", "takes true or false"),
        ("insert-shortcuts{every=2,every=3}", "given twice"),
        ("insert-shortcuts{every=2", "expected ','"),
        ("insert-shortcuts{every}", "expected '='"),
        ("insert-shortcuts{every=2} x", "expected nothing more"),
        ("{}", "expected the name of a pass"),
        ("", "expected the name of a pass"),
    ],
)
def test_wrong_pass_is_refused_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_pass(text, PASSES)
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_options_are_described_by_the_same_grammar() -> None:
    rows = {name: (type_, default) for name, type_, default in describe_options(Insert)}
    assert rows["every"] == ("an integer", "2")
    assert rows["match"] == ("one of projection, pad", "projection")
    assert rows["scale"] == ("a number or none", "none")
    assert rows["only"] == ("a list of a text", "[]")
    assert describe_options(Plain) == []


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("1x3x224x224", InputSpec((1, 3, 224, 224))),
        ("2x16:int64", InputSpec((2, 16), "int64")),
        ("Nx3x224x224", InputSpec(("N", 3, 224, 224))),
        ("7", InputSpec((7,))),
    ],
)
def test_input_is_read_and_printed(text: str, spec: InputSpec) -> None:
    assert parse_input(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1x3xx4", "'' is neither"),
        ("0x3", "'0' is neither"),
        ("-1x3", "'-1' is neither"),
        ("nx3", "'n' is neither"),
        ("2x16:int46", "did you mean 'int64'?"),
        ("2x16:", "write extents"),
        (":int64", "write extents"),
        ("", "write extents"),
    ],
)
def test_wrong_input_is_refused_in_one_sentence(text: str, said: str) -> None:
    with pytest.raises(SpecError, match="Cannot read the input") as caught:
        parse_input(text)
    assert said in str(caught.value)


def test_example_has_the_shape_and_dtype_of_the_spec() -> None:
    tokens = parse_input("Nx16:int64").example(extent=3)
    assert tokens.shape == (3, 16)
    assert tokens.dtype == np.int64
    assert set(np.unique(tokens)) <= {0, 1}
    assert parse_input("2x8:bfloat16").example().dtype.name == "bfloat16"


def test_example_is_the_same_for_the_same_seed_only() -> None:
    spec = parse_input("2x3")
    np.testing.assert_array_equal(spec.example(1), spec.example(1))
    assert not np.array_equal(spec.example(1), spec.example(2))
