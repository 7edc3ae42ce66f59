"""Files that are whole or what they were before, for a stage may be cut off at any moment."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def save_text(path: Path, text: str) -> None:
    """Write a text file at once; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def save(path: Path, figures: Mapping[str, Any]) -> None:
    """The same of JSON, which has no NaN and no infinity: null."""
    save_text(path, json.dumps(_finite(figures), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
