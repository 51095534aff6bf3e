"""TOML and JSON -> frozen dataclasses, strictly: an unknown or missing key or a wrong type is an
error that names it.

Values may be: bool, int, float (finite), str, Literal, `T | None`, tuple[T, ...], dict[str, T],
nested dataclasses, and `Any`/`object` for free-form values (a model's own config). A float field
takes an int; nothing else is converted.
"""

import copy
import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from shared.errors import ConfigError, show

T = TypeVar("T")


def load_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file. Raises ConfigError if it is absent or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ConfigError(
            f"no config file {path}; give the path of a TOML file or the name of one that ships"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"cannot read the config file {path}: {exc.strerror}") from exc
    # not TOML, not UTF-8, a number of thousands of digits
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is not valid TOML: {exc}") from exc


def apply_settings(tables: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Return a copy of `tables` with each `section.key=value` applied; `sources.0.key=value`
    reaches into a list.

    A value is read as a TOML value, or as plain text where it is not one: `mask.boundary=inside`
    needs no quotes.
    """
    result = copy.deepcopy(tables)
    for setting in settings:
        dotted, separator, text = setting.partition("=")
        if not separator or not dotted.strip():
            raise ConfigError(f"--set {setting!r}: expected section.key=value")
        *path, last = dotted.strip().split(".")
        table: Any = result
        for depth, key in enumerate(path, 1):
            if isinstance(table, list):
                table = table[_list_index(table, key, setting)]
            else:
                table = table.setdefault(key, {})
            if not isinstance(table, dict | list):
                where = ".".join(path[:depth])
                raise ConfigError(f"--set {setting!r}: {where} is a value, not a table")
        slot = _list_index(table, last, setting) if isinstance(table, list) else last
        table[slot] = _parse_value(text.strip())
    return result


def build(cls: type[T], tables: Mapping[str, Any], where: str) -> T:
    """Return `cls` built from `tables`; `where` names the file for messages. Raises ConfigError.

    A class may have a table RENAMED of keys that had another name: old name -> new name.
    """
    return typing.cast(T, _build_dataclass(cls, tables, where, ""))


def shipped_files(package: str, folder: str, suffix: str) -> dict[str, Path]:
    """Return the files that ship in a folder of `package`: name without suffix -> path."""
    root = Path(str(resources.files(package))) / folder
    return {path.stem: path for path in sorted(root.glob(f"*{suffix}"))}


def shipped_or_file(name: str, files: Mapping[str, Path], kind: str) -> Path:
    """Return the path of one of the shipped `files`, or of a TOML file. Raises ConfigError."""
    if name not in files and Path(name).suffix != ".toml":
        raise ConfigError(
            f"no {kind} named {name!r}; shipped: {', '.join(files) or 'none'}. Or give the path of"
            " a .toml file"
        )
    return files.get(name, Path(name))


def first_comment(path: Path) -> str:
    """Return the comment in the first line of the TOML file at `path`: the file in one sentence."""
    with path.open(encoding="utf-8") as file:
        line = file.readline().strip()
    return line.removeprefix("#").strip() if line.startswith("#") else ""


def to_plain(value: Any) -> Any:
    """Return dataclasses as dicts and tuples as lists, ready for canonical JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted key, old, new) for every leaf that differs between two plain trees; an absent
    leaf is None.

    Leaves are compared as JSON, like their digests: 1 and 1.0 differ, and so do an absent key and a
    null.
    """
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        leaves: list[tuple[str, Any, Any]] = []
        for key in sorted({*old, *new}):
            dotted = _dotted(prefix, str(key))
            if key in old and key in new:
                leaves += differences(old[key], new[key], dotted)
            else:
                leaves.append((dotted, old.get(key), new.get(key)))
        return leaves
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [
            leaf
            for index, pair in enumerate(zip(old, new, strict=True))
            for leaf in differences(*pair, _dotted(prefix, str(index)))
        ]
    is_same = json.dumps(old, sort_keys=True) == json.dumps(new, sort_keys=True)
    return [] if is_same else [(prefix, old, new)]


def _build_dataclass(cls: Any, tables: Any, where: str, prefix: str) -> Any:
    if not isinstance(tables, Mapping):
        raise ConfigError(f"{where}: {prefix or 'the file'} is {show(tables)}; expected a table")
    # dataclasses keep annotations as they were written, strings included
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in tables:
        if key not in fields and (name := getattr(cls, "RENAMED", {}).get(key)):
            raise ConfigError(
                f"{where}: {_dotted(prefix, key)!r} is now called {_dotted(prefix, name)!r}"
            )
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key {_dotted(prefix, key)!r}{_nearest(key, list(fields))}"
            )
    values = {}
    for name, field in fields.items():
        if name in tables:
            values[name] = _convert(hints[name], tables[name], where, _dotted(prefix, name))
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{where}: missing key {_dotted(prefix, name)!r}; add it")
    # the checks of __post_init__ know their own keys, but not the table that they are in
    try:
        return cls(**values)
    except ConfigError as exc:
        raise ConfigError(f"{where}: {prefix + ': ' if prefix else ''}{exc}") from exc


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    # 1 == True == 1.0, so a choice has to agree in its type as well
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        expected = ", ".join(json.dumps(choice) for choice in args)
        raise ConfigError(
            f"{where}: {key} = {show(value)}; expected one of {expected}{_nearest(value, args)}"
        )
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(arg for arg in args if arg is not type(None)), value, where, key)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: {key} = {show(value)}; expected a list")
        hints = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(value) != len(hints):
            raise ConfigError(f"{where}: {key} has {len(value)} values; expected {len(hints)}")
        items = enumerate(zip(hints, value, strict=True))
        return tuple(_convert(*pair, where, f"{key}.{index}") for index, pair in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: {key} = {show(value)}; expected a table")
        return {
            name: _convert(args[1], item, where, _dotted(key, name)) for name, item in value.items()
        }
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, where, key)
    if hint is Any or hint is object:
        return value
    return _convert_scalar(hint, value, where, key)


def _convert_scalar(hint: type, value: Any, where: str, key: str) -> Any:
    # TOML knows 64 bits, Python any number: a JSON reader in another language could not follow
    if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
        raise ConfigError(
            f"{where}: {key} is a number of {value.bit_length()} bits; expected at most 64"
        )
    # no path can hold a NUL, and no UTF-8 a lone surrogate
    if isinstance(value, str) and any(c == "\x00" or "\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(
            f"{where}: {key} = {show(value)}; expected text without NUL and lone surrogates"
        )
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{where}: {key} = {show(value)}; expected a finite number") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {key} = {value}; expected a finite number")
    # bool is a subclass of int
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text (in quotes)",
    }
    raise ConfigError(f"{where}: {key} = {show(value)}; expected {names.get(hint, hint.__name__)}")


def _parse_value(text: str) -> Any:
    try:
        tables = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # a text with a newline could hold further keys
    return tables["value"] if len(tables) == 1 else text


def _list_index(table: list[Any], key: str, setting: str) -> int:
    if not key.isdecimal() or int(key) >= len(table):
        raise ConfigError(f"--set {setting!r}: {key!r} is not an index of a list of {len(table)}")
    return int(key)


def _dotted(prefix: str, key: str) -> str:
    return f"{prefix}.{key}" if prefix else key


def _nearest(value: Any, known: Sequence[Any]) -> str:
    names = [str(name) for name in known]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(names))}"
