"""gpu_check.report: one result of all sections, a verdict for every mark; a missed one is an exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_results import case, op, result

TUTORIAL = "tutorial 3x32x32"
OPS = {
    "dtype": "float32",
    "elements": 2**26,
    "copy_bytes_per_second": 3e12,
    "failed": {},
    "cases": [op("q_sample", 8, 2e-4, 8e-4, 3e-4)],
}
GOOD, BAD = {"F16": 0.2, "E16": 0.6, "C16": 0.3}, {"F16": 0.2, "E16": 0.6, "C16": 0.25}  # ms; 1.4x C16 is wanted


@pytest.fixture
def report(module: Any, tmp_path: Path) -> Any:
    """(milliseconds, GPU, options) -> exit code, what was found, of a folder with two of the three sections."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")

    def run(times: dict[str, float], gpu: str = "NVIDIA H100 80GB HBM3", *options: str) -> tuple[int, dict[str, Any]]:
        module("results").save(result(gpu, ops=[OPS]), tmp_path / "ops.json")
        module("results").save(result(gpu, cases=[case(TUTORIAL, 64, **times)]), tmp_path / "sampler.json")
        code = module("gpu_check.report").main(["--out", str(tmp_path / "report.json"), *options])
        return code, json.loads((tmp_path / "report.json").read_text())

    return run


def test_sections_become_one_result_with_its_report_and_plot(
    module: Any, report: Any, tmp_path: Path, capsys: Any
) -> None:
    code, found = report(GOOD)
    assert (code, found["ok"], found["failures"]) == (0, True, [])
    assert found["not_done"] == ["paper was not measured"]
    merged = module("results").load(tmp_path / "nvidia-h100-80gb-hbm3.json")
    assert [one["n"] for one in merged["cases"]] == [64]
    assert len(merged["ops"]) == 1
    assert "## Targets" in (tmp_path / "nvidia-h100-80gb-hbm3.md").read_text()
    assert len(list(tmp_path.glob("*.png"))) == 1
    said = capsys.readouterr().out
    assert all(line in said for line in found["targets"])
    assert "0 of 6 marks missed" in said


def test_a_missed_mark_is_a_failure_on_the_gpu_that_it_is_for(report: Any, capsys: Any) -> None:
    code, found = report(BAD)
    assert code == 1
    assert found["failures"] == [
        "missed: tutorial 3x32x32, n = 64, against C16: 1.25x (1.25-1.25), wanted 1.4x",
    ]
    assert "missed: tutorial" in capsys.readouterr().out
    assert report(BAD, "NVIDIA L4")[0] == 0  # no marks are known for it
    assert report(BAD, "NVIDIA H100 80GB HBM3", "--rehearse")[0] == 0


def test_nothing_to_report_is_one_line(module: Any, tmp_path: Path, capsys: Any) -> None:
    assert module("gpu_check.report").main(["--out", str(tmp_path / "report.json")]) == 2
    assert "has none of ops, sampler, paper; run those stages" in capsys.readouterr().err
    (tmp_path / "ops.json").write_text("{}")
    assert module("gpu_check.report").main(["--out", str(tmp_path / "report.json")]) == 2
    assert "ops.json: result.schema must be a int" in capsys.readouterr().err
