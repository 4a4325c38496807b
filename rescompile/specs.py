"""The small grammars of the command line: a pass with its options, the shape of an input.

```
pass    name | name{option=value,option=value}          insert-shortcuts{every=2,kind=add}   (lists: option repeats)
value   word | "quoted, with JSON's escapes" | [value,value]
input   EXTENTxEXTENTx...[:DTYPE]                        1x3x224x224   2x16:int64   Nx3x224x224
```

A pass is a frozen dataclass, and its options are the dataclass's fields: what `format_pass` prints, `parse_pass` reads.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from rescompile.errors import EXIT_USAGE, RescompileError, nearest
from rescompile.graph import Dim, Shape


class SpecError(RescompileError):
    """A text that does not follow its grammar: wrong usage."""

    exit_code = EXIT_USAGE


# ---- passes --------------------------------------------------------------------------------------------------------

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
_WORD = re.compile(r"[^\s,\[\]{}=\"]+")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class _Cursor:
    """A text and the place up to which it has been read."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def take(self, pattern: re.Pattern[str]) -> str | None:
        self._skip_space()
        match = pattern.match(self.text, self.at)
        if match is None:
            return None
        self.at = match.end()
        return match.group()

    def accept(self, symbol: str) -> bool:
        self._skip_space()
        if self.text.startswith(symbol, self.at):
            self.at += len(symbol)
            return True
        return False

    def expect(self, symbol: str) -> None:
        if not self.accept(symbol):
            raise self.error(f"expected '{symbol}'")

    def error(self, what: str) -> SpecError:
        found = self.text[self.at : self.at + 12] or "the end"
        return SpecError(
            f"Cannot read the pass '{self.text}': {what} at {found!r}; write name{{option=value,option=value}}."
        )

    def done(self) -> bool:
        self._skip_space()
        return self.at == len(self.text)

    def _skip_space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1


def parse_pass(text: str, passes: Mapping[str, type]) -> Any:
    """The pass that `text` names, with its options. SpecError names the nearest pass or option."""
    cursor = _Cursor(text)
    name = cursor.take(_NAME)
    if name is None:
        raise cursor.error("expected the name of a pass")
    if name not in passes:
        raise SpecError(f"There is no pass '{name}'{nearest(name, passes)}: `rescompile passes` lists them.")
    options: dict[str, Any] = {}
    if cursor.accept("{") and not cursor.accept("}"):
        while True:
            key, value = _parse_option(cursor, name, passes[name])
            options[key] = _repeated(options[key], value, passes[name], key) if key in options else value
            if cursor.accept("}"):
                break
            cursor.expect(",")
    if not cursor.done():
        raise cursor.error("expected nothing more")
    try:
        return passes[name](**options)
    except (TypeError, ValueError) as error:
        raise SpecError(f"The pass '{name}' does not take these options: {error}.") from error


def format_pass(instance: Any) -> str:
    """The shortest text that `parse_pass` reads as `instance`: options at their defaults are left out."""
    shown = [
        f"{field.name}={_format_value(getattr(instance, field.name))}"
        for field in pass_options(type(instance))
        if getattr(instance, field.name) != default_of(field)
    ]
    return f"{instance.name}{{{','.join(shown)}}}" if shown else str(instance.name)


def pass_options(cls: type) -> list[dataclasses.Field[Any]]:
    """The fields of a pass that are options."""
    return [field for field in dataclasses.fields(cls) if field.init]


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value of a field that is not given; `dataclasses.MISSING` where it must be."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def describe_options(cls: type) -> list[tuple[str, str, str]]:
    """Name, type and default of each option of a pass, as texts of the grammar."""
    hints = get_type_hints(cls)
    rows = []
    for field in pass_options(cls):
        default = default_of(field)
        shown = "" if default is dataclasses.MISSING else _format_value(default)
        rows.append((field.name, _describe_type(hints[field.name]), shown))
    return rows


def _parse_option(cursor: _Cursor, name: str, cls: type) -> tuple[str, Any]:
    key = cursor.take(_NAME)
    if key is None:
        raise cursor.error("expected an option")
    key = key.replace("-", "_")
    known = [field.name for field in pass_options(cls)]
    if key not in known:
        choices = f": it has {', '.join(known)}" if known else ": it has none"
        raise SpecError(f"The pass '{name}' has no option '{key}'{nearest(key, known)}{choices}.")
    cursor.expect("=")
    raw = _parse_value(cursor)
    hint = get_type_hints(cls)[key]
    try:
        return key, _convert(raw, hint)
    except ValueError:
        raise SpecError(
            f"The option '{key}' of the pass '{name}' takes {_describe_type(hint)}, not {_format_value(raw)}."
        ) from None


def _repeated(before: Any, value: Any, cls: Any, key: str) -> tuple[Any, ...]:
    """Both values of an option that is given again, where it takes a list."""
    hint = get_type_hints(cls)[key]
    if not any(get_origin(member) is tuple for member in (hint, *get_args(hint))):
        raise SpecError(f"The option '{key}' of the pass '{cls.name}' is given twice: keep one of them.")
    return tuple(item for each in (before, value) for item in (each if isinstance(each, tuple) else (each,)))


def _parse_value(cursor: _Cursor) -> Any:
    """A word (str), a quoted string (_Quoted) or a list of values."""
    if cursor.accept("["):
        items: list[Any] = []
        if cursor.accept("]"):
            return items
        while True:
            items.append(_parse_value(cursor))
            if cursor.accept("]"):
                return items
            cursor.expect(",")
    quoted = cursor.take(_STRING)
    if quoted is not None:
        try:
            return _Quoted(json.loads(quoted))
        except json.JSONDecodeError as error:
            raise cursor.error(f"a quoted string with a wrong escape ({error.msg})") from None
    word = cursor.take(_WORD)
    if word is None:
        raise cursor.error("expected a value")
    return word


class _Quoted(str):
    """A text that was quoted: never a number, a truth value or none."""

    __slots__ = ()


def _convert(raw: Any, hint: Any) -> Any:
    """`raw` as a value of the annotated type; ValueError when it is none."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(raw, get_args(hint))
    if origin is Literal:
        for choice in get_args(hint):
            if raw == str(choice) and isinstance(raw, str):
                return choice
        raise ValueError(raw)
    if origin is tuple and isinstance(raw, list):
        return _convert_tuple(raw, get_args(hint))
    if not isinstance(raw, str):
        raise ValueError(raw)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(raw)
    if hint is str:
        return str(raw)
    if isinstance(raw, _Quoted):
        raise ValueError(raw)
    if hint is type(None) and raw == "none":
        return None
    if hint is bool and raw in ("true", "false"):
        return raw == "true"
    if hint is int or hint is float:
        return hint(raw)
    raise ValueError(raw)


def _convert_union(raw: Any, members: tuple[Any, ...]) -> Any:
    # A bare `none` means None before it means the text "none"; numbers likewise come before texts.
    for member in sorted(members, key=lambda member: (member is not type(None), member is str)):
        try:
            return _convert(raw, member)
        except ValueError:
            continue
    raise ValueError(raw)


def _convert_tuple(raw: list[Any], members: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(members) == 2 and members[1] is Ellipsis:
        return tuple(_convert(item, members[0]) for item in raw)
    if len(members) != len(raw):
        raise ValueError(raw)
    return tuple(_convert(item, member) for item, member in zip(raw, members, strict=True))


def _format_value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Enum):
        return _format_value(value.value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(_format_value(item) for item in value) + "]"
    if isinstance(value, str):
        return value if _is_plain(value) else json.dumps(value)
    return repr(value)


def _is_plain(text: str) -> bool:
    """Whether a text can stand unquoted without being read as something else."""
    return bool(_NAME.fullmatch(text)) and text not in ("none", "true", "false", "nan", "inf", "infinity")


def _describe_type(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        written = [member for member in get_args(hint) if get_origin(member) is not Mapping]  # data from Python only
        return " or ".join(_describe_type(member) for member in written)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in get_args(hint))
    if origin is tuple:
        members = get_args(hint)
        if len(members) == 2 and members[1] is Ellipsis:
            return f"a list of {_describe_type(members[0])}"
        return "[" + ",".join(_describe_type(member) for member in members) + "]"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(str(member.value) for member in hint)
    plain = {bool: "true or false", int: "an integer", float: "a number", str: "a text", type(None): "none"}
    return plain.get(hint, str(hint))


# ---- inputs --------------------------------------------------------------------------------------------------------

DTYPES = (
    "float32", "float16", "bfloat16", "float64", "int8", "int16", "int32", "int64", "uint8", "bool",
)  # fmt: skip
_DIM = re.compile(r"[1-9][0-9]*|[A-Z][A-Za-wyz0-9_]*")


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Shape and dtype of one input; an extent that is a name is dynamic."""

    shape: Shape
    dtype: str = "float32"

    def __str__(self) -> str:
        extents = "x".join(str(extent) for extent in self.shape)
        return extents if self.dtype == "float32" else f"{extents}:{self.dtype}"

    def example(self, seed: int = 0, extent: int = 2) -> np.ndarray[Any, Any]:
        """Random contents: normal for floats, zeros and ones for integers (which may be indices of small tables).

        `extent` stands for every dynamic dimension.
        """
        shape = tuple(extent if isinstance(dim, str) else dim for dim in self.shape)
        random = np.random.default_rng(seed)
        if self.dtype == "bfloat16":
            import ml_dtypes

            return random.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)
        if self.dtype.startswith("float"):
            return random.standard_normal(shape).astype(self.dtype)
        return random.integers(0, 2, shape).astype(self.dtype)


def parse_input(text: str) -> InputSpec:
    """The input that a text like `1x3x224x224`, `2x16:int64` or `Nx3x224x224` describes."""
    extents, _, dtype = text.partition(":")
    if not extents or (":" in text and not dtype):
        raise SpecError(f"Cannot read the input '{text}': write extents, as in 1x3x224x224 or 2x16:int64.")
    dtype = dtype or "float32"
    if dtype not in DTYPES:
        raise SpecError(
            f"Cannot read the input '{text}': there is no dtype '{dtype}'{nearest(dtype, DTYPES)}, "
            f"only {', '.join(DTYPES)}."
        )
    return InputSpec(tuple(_parse_dim(part, text) for part in extents.split("x")), dtype)


def _parse_dim(part: str, text: str) -> Dim:
    if not _DIM.fullmatch(part):
        raise SpecError(
            f"Cannot read the input '{text}': '{part}' is neither a positive extent nor the name of a dynamic one "
            "(a capital letter first, no x), as in Nx3x224x224."
        )
    return int(part) if part.isdecimal() else part
