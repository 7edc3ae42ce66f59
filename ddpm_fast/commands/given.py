"""What a command line or a TOML file says of a configuration: {section: {field: value}} of the fields it names."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

from . import values
from .config import AUTO, Config
from .errors import CommandError
from .fields import FIELDS, Field

Given = dict[str, dict[str, Any]]
_DEST = "{section}__{name}"

ONLY_WITH = {
    "huber_delta": ("training", "loss", "huber"),
    "min_snr_gamma": ("training", "weighting", "min-snr"),
    "p2_gamma": ("training", "weighting", "p2"),
    "p2_k": ("training", "weighting", "p2"),
}
"""Fields that mean nothing unless another one has this value."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """A flag for every field, in a group for every section; those that are not given leave no trace."""
    for section, fields in FIELDS.items():
        group = parser.add_argument_group(section)
        for field in fields.values():
            _add_flag(group, field)


def _add_flag(group: Any, field: Field) -> None:
    options: dict[str, Any] = {"dest": _DEST.format(section=field.section, name=field.name)}
    options |= {"default": argparse.SUPPRESS, "help": _help(field)}
    kinds = values.alternatives(field.kind)
    if field.kind is dict:
        group.add_argument(
            f"--{field.flag}", nargs="+", action="extend", type=_converter(field), metavar="NAME=VALUE", **options
        )
    elif bool in kinds and str not in kinds:
        group.add_argument(f"--{field.flag}", action=argparse.BooleanOptionalAction, **options)
    elif bool in kinds:  # true, false or a word: bare, it is true
        group.add_argument(
            f"--{field.flag}", nargs="?", const=True, type=_converter(field), metavar="true|false|auto", **options
        )
    else:
        group.add_argument(f"--{field.flag}", type=_converter(field), metavar=_metavar(field), **options)


def _help(field: Field) -> str:
    if field.kind is dict:
        return field.text
    default = values.NONE if field.default is None else field.default
    default = ",".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{field.text}; default: {str(default).lower() if isinstance(default, bool) else default}".replace("%", "%%")


def _metavar(field: Field) -> str:
    if field.choices is not None and field.choices != (AUTO,):
        return "|".join([*field.choices, *([values.NONE] if field.optional else [])])
    kinds = values.alternatives(field.kind)
    return "N" if int in kinds else "X" if float in kinds else "X,Y" if str not in kinds else "TEXT"


def _converter(field: Field) -> Any:
    def convert(text: str) -> Any:
        try:
            if field.kind is dict:
                return values.option_from_text(text)
            return values.from_text(text, field.kind, field.choices)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected {error}") from None

    return convert


def from_flags(arguments: argparse.Namespace) -> Given:
    """The fields whose flags were given."""
    given: Given = {}
    for section, fields in FIELDS.items():
        for field in fields.values():
            key = _DEST.format(section=section, name=field.name)
            if hasattr(arguments, key):
                value = getattr(arguments, key)
                value = dict(value) if field.kind is dict else value
                given.setdefault(section, {})[field.name] = _bounded(value, field, f"--{field.flag}")
    return given


def from_file(path: Path) -> Given:
    """The fields that a TOML file sets. CommandError for sections and keys that do not exist, and for wrong types."""
    given: Given = {}
    for section, content in values.read_toml(path).items():
        if section not in FIELDS:
            raise CommandError(f"{path}: no section [{section}]{_nearest(section, FIELDS)}")
        if not isinstance(content, dict):
            raise CommandError(f"{path}: {section} must be a section, [{section}], got {content!r}")
        for name, value in content.items():
            given.setdefault(section, {})[name] = _from_toml(value, section, name, path)
    return given


def _from_toml(value: Any, section: str, name: str, path: Path) -> Any:
    field = FIELDS[section].get(name)
    if field is None:
        elsewhere = [other for other, fields in FIELDS.items() if name in fields]
        hint = f"; it belongs to [{elsewhere[0]}]" if elsewhere else _nearest(name, FIELDS[section])
        raise CommandError(f"{path}: no key {name} in [{section}]{hint}")
    try:
        value = values.checked(value, field.kind, field.choices)
    except ValueError as error:
        raise CommandError(f"{path}: {name} in [{section}] must be {error}") from None
    return _bounded(value, field, f"{path}: {name} in [{section}]")


def _bounded(value: Any, field: Field, place: str) -> Any:
    if not field.in_bounds(value):
        low = "" if field.least is None else f" at least {field.least:g}"
        high = "" if field.most is None else f"{' and' if low else ''} at most {field.most:g}"
        raise CommandError(f"{place} must be{low}{high}, got {value}")
    return field.normal(value)


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(known)}"


def merged(first: Given, second: Given) -> Given:
    """Both, the second winning; tables of options are merged."""
    result: Given = {section: dict(fields) for section, fields in first.items()}
    for section, fields in second.items():
        for name, value in fields.items():
            before = result.setdefault(section, {}).get(name)
            result[section][name] = {**before, **value} if isinstance(before, dict) else value
    return result


def check_conflicts(given: Given, config: Config) -> None:
    """CommandError for a field that is given, differs from its default, and has no effect on `config`."""
    for name, (section, other, needed) in ONLY_WITH.items():
        value, field = given.get(section, {}).get(name), FIELDS[section][name]
        has = getattr(getattr(config, section), other)
        if value is not None and value != field.default and has != needed:
            flag = f"--{FIELDS[section][other].flag}"
            raise CommandError(
                f"--{field.flag} {value} has no effect with {flag} {has or values.NONE}; it is for {flag} {needed}"
            )


def check_unchanged(given: Given, saved: Config, place: Path) -> None:
    """CommandError naming each given field that contradicts the run's saved configuration and may not change."""
    wrong = []
    for section, fields in given.items():
        for name, value in fields.items():
            field, before = FIELDS[section][name], getattr(getattr(saved, section), name)
            if field.may_change or value == before or (value == AUTO and AUTO in (field.choices or ())):
                continue
            if isinstance(value, dict):
                differing = {
                    key: v for key, v in value.items() if key not in before or _listed(before[key]) != _listed(v)
                }
                wrong += [f"--{field.flag} {key}={v} ({before.get(key, values.NONE)})" for key, v in differing.items()]
            else:
                wrong.append(f"--{field.flag} {_shown(value)} ({_shown(before)})")
    if wrong:
        raise CommandError(
            f"{place} is of a run with other settings than asked for: {', '.join(wrong)}, the run's own in brackets; "
            "leave them out to go on with it, or choose another --out"
        )


def without_auto(given: Given) -> Given:
    """Without the fields that are left to be decided, and that a saved run has decided."""
    return {
        section: {k: v for k, v in fields.items() if v != AUTO or FIELDS[section][k].may_change}
        for section, fields in given.items()
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    return values.toml_value(value).replace('"', "")
