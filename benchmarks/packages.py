"""Packages that the benchmark can do without, and what a candidate says that cannot run."""

from __future__ import annotations

import importlib
from typing import Any


class Missing(Exception):
    """A candidate cannot run here; the message says why and what to install."""


def package(name: str) -> Any:
    """The package, or Missing with the line that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed; pip install {name} ({error})") from error
