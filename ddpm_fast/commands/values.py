"""Values of configuration fields: checked against their types, read from flags, read from and written as TOML."""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import CommandError

NONE = "none"
"""How None is written in TOML, which has no word for it, and on the command line."""
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    return typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)


def wanted(kind: Any, choices: tuple[str, ...] | None = None) -> str:
    """What a field takes, in words: "a number or none"."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "a table"}
    words[types.NoneType] = NONE
    found = []
    for member in alternatives(kind):
        if member is str and choices is not None:
            found += [repr(choice) for choice in choices]
        elif typing.get_origin(member) is tuple:
            found.append(f"{len(typing.get_args(member))} numbers")
        else:
            found.append(words[member])
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"


def checked(value: Any, kind: Any, choices: tuple[str, ...] | None = None) -> Any:
    """`value` as the field keeps it: an int as float where floats are kept, a list as tuple, "none" as None.

    Raises ValueError with what is wanted for a value of another type or, with choices, another word.
    """
    members = alternatives(kind)
    if types.NoneType in members and (value is None or value == NONE):
        return None
    for member in members:
        if member is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            if math.isnan(value):
                break
            return float(value)
        if member is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if member is str and isinstance(value, str) and (choices is None or value in choices):
            return value
        if member in (bool, dict) and isinstance(value, member):
            return value
        if typing.get_origin(member) is tuple and isinstance(value, (list, tuple)):
            parts = typing.get_args(member)
            if len(parts) == len(value):
                return tuple(checked(part, kind) for part, kind in zip(value, parts, strict=True))
    raise ValueError(f"{wanted(kind, choices)}, got {value!r}")


def from_text(text: str, kind: Any, choices: tuple[str, ...] | None = None) -> Any:
    """What a flag's text means for a field of this type. Raises ValueError as `checked` does."""
    for member in alternatives(kind):
        try:
            if member is bool and text.lower() in _WORDS:
                return _WORDS[text.lower()]
            if member in (int, float):
                return checked(member(text), kind)
            if typing.get_origin(member) is tuple:
                return checked([float(part) for part in text.split(",")], kind)
        except ValueError:
            continue
    return checked(text, kind, choices)


def option_from_text(text: str) -> tuple[str, Any]:
    """`name=value` with a TOML value; a bare word is a text. Raises ValueError for anything else."""
    name, sign, value = text.partition("=")
    if not sign or not name.strip() or not value.strip():
        raise ValueError(f"name=value, got {text!r}")
    try:
        return name.strip(), _toml().loads(f"value = {value}")["value"]
    except ValueError:
        return name.strip(), value.strip()


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as a dictionary; CommandError for one that is missing, unreadable or no TOML."""
    try:
        return dict(_toml().loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise CommandError(f"no file {path} to read the configuration from") from None
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # TOMLDecodeError and UnicodeDecodeError are
        raise CommandError(f"{path} is no TOML: {error}") from None


def write_toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections of values and of tables of values as TOML; reading it gives the same values, floats to the last bit."""
    blocks = []
    for name, section in sections.items():
        tables = {key: value for key, value in section.items() if isinstance(value, Mapping)}
        plain = {key: value for key, value in section.items() if key not in tables}
        blocks.append(_block(name, plain))
        blocks += [_block(f"{name}.{key}", table) for key, table in tables.items()]
    return "\n".join(blocks)


def toml_value(value: Any) -> str:
    """One value as TOML writes it; None is the text "none"."""
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)  # the shortest digits that give the same float
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(toml_value(part) for part in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    raise TypeError(f"TOML has no way to write {type(value).__name__}")


def _block(name: str, values: Mapping[str, Any]) -> str:
    return "".join([f"[{name}]\n", *(f"{key} = {toml_value(value)}\n" for key, value in values.items())])


def _toml() -> Any:
    """The reader of the standard library, or before Python 3.11 the package that it was made of."""
    try:
        import tomllib  # type: ignore[import-not-found]
    except ModuleNotFoundError:
        try:
            import tomli as tomllib  # type: ignore[import-not-found, no-redef]
        except ModuleNotFoundError:
            raise ImportError("reading TOML on Python 3.10 needs tomli; pip install ddpm_fast[train]") from None
    return tomllib
