"""What gpu_check leaves: whole files, and JSON that any program reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def test_what_is_no_number_is_null(module: Any, tmp_path: Path) -> None:
    """A NaN is what a wrong kernel gives: it must not be what makes the file of its failure unreadable."""
    file = tmp_path / "new" / "found.json"
    module("gpu_check.files").save(file, {"error": float("nan"), "rows": [{"ulp": float("inf")}, (1.5, "a", None)]})

    def refuse(word: str) -> None:
        pytest.fail(f"{word} is no JSON")

    found = json.loads(file.read_text(), parse_constant=refuse)
    assert found == {"error": None, "rows": [{"ulp": None}, [1.5, "a", None]]}


def test_a_file_that_cannot_be_written_leaves_the_one_before(module: Any, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    module("gpu_check.files").save(file, {"cases": 3})
    with pytest.raises(TypeError):
        module("gpu_check.files").save(file, {"cases": object()})
    assert json.loads(file.read_text()) == {"cases": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
