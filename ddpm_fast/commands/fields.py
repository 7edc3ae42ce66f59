"""The fields of a configuration, with what flags and TOML files need to know of each."""

from __future__ import annotations

import dataclasses
import os
import typing
from typing import Any

from .config import SOURCES, Config


@dataclasses.dataclass(frozen=True)
class Field:
    """One field of one section, with the type that its values have."""

    section: str
    name: str
    kind: Any
    default: Any
    text: str
    flag: str
    choices: tuple[str, ...] | None
    least: float | None
    most: float | None
    may_change: bool
    path: bool

    @property
    def optional(self) -> bool:
        """Whether None is a value."""
        return type(None) in typing.get_args(self.kind)

    def in_bounds(self, value: Any) -> bool:
        """Whether a number is between the field's bounds; anything else is."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    def normal(self, value: Any) -> Any:
        """A path that exists as an absolute one, so that a run can be gone on with from any working folder."""
        if self.path and isinstance(value, str) and value not in SOURCES and os.path.exists(value):
            return os.path.abspath(value)
        return value


def _fields() -> dict[str, dict[str, Field]]:
    found: dict[str, dict[str, Field]] = {}
    for section in dataclasses.fields(Config):
        cls = section.default_factory
        assert isinstance(cls, type)
        hints = typing.get_type_hints(cls)
        found[section.name] = {
            field.name: Field(
                section.name,
                field.name,
                dict if typing.get_origin(hints[field.name]) is dict else hints[field.name],
                {} if field.default is dataclasses.MISSING else field.default,
                **{**field.metadata, "flag": field.metadata["flag"] or field.name.replace("_", "-")},
            )
            for field in dataclasses.fields(cls)
        }
    return found


FIELDS = _fields()
"""{section: {name: Field}}."""
