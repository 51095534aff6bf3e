"""Write docs/reference.md: every key of a mixture and of a recipe, taken from the classes that
check them.

A key's sentence is the docstring under its field. Its range is not written down anywhere: it is
found by asking the class which values it refuses, so the page cannot disagree with the code.

    python docs/generate_reference.py
"""

import ast
import dataclasses
import inspect
import math
import struct
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import prep.config
import train.config
from shared import config
from shared.errors import ConfigError

PAGE = Path(__file__).with_name("reference.md")

_INTRODUCTION = """# Every key of a mixture and of a recipe

After reading this page you can set any key: it lists them all, with type, default, range and one
line each. `docs/generate_reference.py` writes it from the classes that check the files, and a test
keeps it in step.

Set a key in the file, or on the command line of either program, which wins over the file:

```sh
sft-prep explain --mixture demo --set max_seq_len=256 --set mask.boundary=inside
```

An unknown key is an error that names the nearest known one, and so is a value of another type or
outside the range. A whole number has at most 64 bits. *Required* keys have no default.
"""
_CHAPTERS = (
    (
        "Mixture",
        "The file that `sft-prep build --mixture FILE.toml` reads. Paths in it are relative to it.",
        prep.config.MixtureConfig,
    ),
    (
        "Recipe",
        "The file that `sft-train --recipe FILE.toml` reads. `batch` needs one of its first three"
        " keys.",
        train.config.TrainConfig,
    ),
)

# What must be set beside a key before its class looks at the key alone.
_BESIDE: dict[str, dict[str, Any]] = {
    "mixing.max_epochs": {"temperature": 1.0},
    "sources.group_epochs": {"split_by": "column"},
    "batch.tokens_per_step": {"packs_per_step": None},
    "batch.conversations_per_step": {"packs_per_step": None},
    "loss.divisor": {"norm": "sum"},
    "lora.dropout": {"rank": 1},
}
# Values of the keys that a class cannot be made without.
_NEEDED: dict[type, dict[str, Any]] = {
    prep.config.TokenizerConfig: {"name": "x"},
    prep.config.TemplateConfig: {"name": "x"},
    prep.config.SourceConfig: {"path": "x"},
    prep.config.MixtureConfig: {
        "name": "x",
        "max_seq_len": 64,
        "tokenizer": prep.config.TokenizerConfig(name="x"),
        "template": prep.config.TemplateConfig(name="x"),
        "sources": (prep.config.SourceConfig(path="x"),),
    },
    train.config.OptimConfig: {"learning_rate": 1e-5},
    train.config.BatchConfig: {"packs_per_step": 1},
    train.config.TrainConfig: {
        "name": "x",
        "optim": train.config.OptimConfig(learning_rate=1e-5),
        "batch": train.config.BatchConfig(packs_per_step=1),
    },
}
_INSIDE = (1, 2, 0.5, 0)  # one of them is in the range of any key
_LARGEST = {int: 2**63 - 1, float: sys.float_info.max}


@dataclass(frozen=True, slots=True)
class Key:
    """A key of the page."""

    name: str  # within its table
    type: str
    default: str
    range: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a TOML file, and of the page."""

    name: str  # "" for the keys at the top of a file
    is_list: bool
    sentence: str
    keys: tuple[Key, ...]
    renamed: dict[str, str]


def tables_of(cls: type) -> Iterator[Table]:
    """Yield the tables of a file in the order of its class, the keys at the top first."""
    hints = typing.get_type_hints(cls)
    inner = {name: _inner_class(hint) for name, hint in hints.items()}
    yield _table("", cls, [name for name, found in inner.items() if found is None])
    for name, found in inner.items():
        if found is not None:
            yield _table(
                name, found, list(typing.get_type_hints(found)), is_list=_is_list(hints[name])
            )


def page() -> str:
    """Return the text of docs/reference.md."""
    parts = [_INTRODUCTION]
    for title, sentence, cls in _CHAPTERS:
        parts.append(f"\n## {title}\n\n{sentence}\n")
        parts += [_as_markdown(title, table) for table in tables_of(cls)]
    return "".join(parts)


def _as_markdown(title: str, table: Table) -> str:
    brackets = f"[[{table.name}]]" if table.is_list else f"[{table.name}]"
    # the same name in both files would give two headings one anchor
    heading = f"`{brackets}` of a {title.lower()}" if table.name else f"Top of a {title.lower()}"
    lines = [f"\n### {heading}\n"]
    if table.sentence:
        lines.append(f"{table.sentence}\n")
    lines += ["| key | type | default | range | |", "|---|---|---|---|---|"]
    lines += [
        f"| `{key.name}` | {key.type} | {key.default} | {key.range} | {key.sentence} |"
        for key in table.keys
    ]
    if table.renamed:
        old = ", ".join(f"`{old}` is now `{new}`" for old, new in sorted(table.renamed.items()))
        lines.append(f"\nRenamed: {old}.")
    return "\n".join(lines) + "\n"


def _table(name: str, cls: type, keys: list[str], *, is_list: bool = False) -> Table:
    hints = typing.get_type_hints(cls)
    sentences = _field_sentences(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    missing = [key for key in keys if key in fields and key not in sentences]
    if missing:
        raise SystemExit(f"{cls.__name__}: no docstring under {', '.join(missing)}; write one")
    dotted = f"{name}." if name else ""
    return Table(
        name=name,
        is_list=is_list,
        sentence=_cell(_class_sentence(cls)) if name else "",
        keys=tuple(
            Key(
                name=key,
                type=_type(hints[key]),
                default=_default(fields[key]),
                range=_range(cls, key, hints[key], _BESIDE.get(dotted + key, {})),
                sentence=_cell(sentences[key]),
            )
            for key in keys
            if key in fields
        ),
        renamed=getattr(cls, "RENAMED", {}),
    )


def _field_sentences(cls: type) -> dict[str, str]:
    """Return what the docstrings under the fields of `cls` say."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)):
            continue
        match below:
            case ast.Expr(value=ast.Constant(value=str(text))):
                found[field.target.id] = " ".join(text.split())
    return found


def _class_sentence(cls: type) -> str:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    return " ".join((ast.get_docstring(body) or "").split())  # dataclasses make one up themselves


def _cell(text: str) -> str:
    """Return `text` so that Markdown shows it as it is, inside a table too."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):  # outside code
        parts[index] = parts[index].replace("<", "&lt;").replace("*", "\\*")
    return "`".join(parts).replace("|", "\\|")


def _inner_class(hint: Any) -> type | None:
    found = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return found if dataclasses.is_dataclass(found) and isinstance(found, type) else None


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is tuple


def _type(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _type(next(arg for arg in args if arg is not type(None)))
    if origin is Literal:
        return "one of"
    if origin is tuple and args[-1] is Ellipsis:
        return f"list of {_plural(args[0])}"
    if origin is tuple:
        return f"list of {len(args)} {_plural(args[0])}"
    if origin is dict:
        return "table" if args[1] is Any else f"table of {_plural(args[1])}"
    names = {bool: "`true` or `false`", int: "whole number", float: "number", str: "text"}
    return names[hint]


def _plural(hint: Any) -> str:
    return {float: "numbers", str: "text"}.get(hint, "words")


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{_toml(config.to_plain(field.default_factory()))}`"
    if field.default is dataclasses.MISSING:
        return "*required*"
    return "not set" if field.default is None else f"`{_toml(config.to_plain(field.default))}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return "{}" if value == {} else repr(value)


def _range(cls: type, key: str, hint: Any, beside: dict[str, Any]) -> str:
    """Return the choices of a word, the range of a number, or nothing."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _range(cls, key, next(arg for arg in args if arg is not type(None)), beside)
    if origin is Literal:
        return ", ".join(f"`{_toml(choice)}`" for choice in args)
    if origin is tuple and get_origin(args[0]) is Literal:
        return ", ".join(f"`{_toml(choice)}`" for choice in get_args(args[0]))
    number = args[0] if origin is tuple else args[1] if origin is dict else hint
    if number not in (int, float):
        return ""

    def accepts(value: float) -> bool:
        given: Any = value
        if origin in (tuple, dict):
            given = (value,) * len(args) if origin is tuple else {"x": value}
        needed = {name: other for name, other in _NEEDED.get(cls, {}).items() if name != key}
        try:
            cls(**{**needed, **beside, key: given})
        except ConfigError:
            return False
        return True

    return _as_range(accepts, number)


def _as_range(accepts: Callable[[float], bool], number: type) -> str:
    inside = number(next(value for value in _INSIDE if accepts(number(value))))
    low, low_is_in = _bound(accepts, inside, -_LARGEST[number])
    high, high_is_in = _bound(accepts, inside, _LARGEST[number])
    first = "" if math.isinf(low) else f"{_short(low)}" if low_is_in else f"above {_short(low)}"
    last = "" if math.isinf(high) else f"{_short(high)}" if high_is_in else f"below {_short(high)}"
    if first and last:
        return f"{first} to {last}"
    return f"{first} or more" if first and low_is_in else first or last


def _bound(accepts: Callable[[float], bool], inside: float, end: float) -> tuple[float, bool]:
    """Return where the accepted values end between `inside` and `end`, and whether that value is
    one of them; infinity where all are accepted."""
    if accepts(end):
        return math.copysign(math.inf, end), False
    good, bad = _place(inside), _place(end)
    kind = type(inside)
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if accepts(_at(middle, kind)) else (good, middle)
    # of two neighbours the bound is the one that a person would write down
    last, beyond = _at(good, kind), _at(bad, kind)
    return (last, True) if kind is int or len(repr(last)) <= len(repr(beyond)) else (beyond, False)


def _place(value: float) -> int:
    """Return a whole number that orders values as they are ordered, without gaps."""
    if isinstance(value, int):
        return value
    bits: int = struct.unpack("<q", struct.pack("<d", abs(value)))[0]
    return bits if value >= 0 else -bits


def _at(place: int, kind: type) -> float:
    if kind is int:
        return place
    value: float = struct.unpack("<d", struct.pack("<q", abs(place)))[0]
    return value if place >= 0 else -value


def _short(value: float) -> str:
    if value == 2**31 - 1:
        return "2<sup>31</sup> - 1"
    if value in (2**63 - 1, -(2**63)):
        return f"{'-' if value < 0 else ''}2<sup>63</sup>{' - 1' if value > 0 else ''}"
    return f"{value:g}" if value >= 1e9 else f"{value:,.10g}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
