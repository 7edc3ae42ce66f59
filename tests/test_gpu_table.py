"""README's GPU figures are what gpu_table.py makes of the result files: none without one, none that is stale."""

from __future__ import annotations

import json

import pytest
from gpu_results import case, op, result

TUTORIAL = "tutorial 3x32x32"


@pytest.fixture
def table(module):
    return module("gpu_table")


def test_the_readme_has_what_the_results_say(table):
    """Run `python benchmarks/gpu_table.py` where this fails."""
    assert table.main(["--check"]) == 0


@pytest.fixture
def place(table, tmp_path):
    """(README, folder of results) with the marks and nothing else."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nstale 9.99 s\n{table.END}\nafter\n")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "list.json").write_text("[1, 2]")
    (folder / "cpu.json").write_text(json.dumps({"machine": {"device": "cpu"}}))
    (folder / "nvidia-h100-80gb-hbm3-baselines.json").write_text(json.dumps({"outcomes": []}))
    return readme, folder


def test_without_a_result_there_is_no_figure(table, place, capsys):
    readme, folder = place
    arguments = ["--readme", str(readme), "--results", str(folder)]
    assert table.main([*arguments, "--check"]) == 1
    assert "run benchmarks/gpu_table.py" in capsys.readouterr().err
    assert table.main(arguments) == 0
    text = readme.read_text()
    assert "No GPU figure stands here yet, because none has been measured." in text
    assert "9.99" not in text
    assert text.startswith(f"before\n{table.BEGIN}\n")
    assert text.endswith(f"{table.END}\nafter\n")
    assert table.main([*arguments, "--check"]) == 0


def test_every_figure_stands_beside_its_baseline(module, table, place):
    readme, folder = place
    ops = {"dtype": "float32", "elements": 2**26, "copy_bytes_per_second": 3e12, "failed": {},
           "cases": [op("q_sample", 8, 2e-4, 8e-4, 3e-4)]}  # fmt: skip
    steps = [case(TUTORIAL, 64, F16=0.2, E16=0.6, C16=0.25), case(TUTORIAL, 1, F16=0.09, S16=0.3, C16=0.2)]
    module("results").save(result(ops=[ops], cases=steps), folder / "nvidia-h100-80gb-hbm3.json")
    assert table.main(["--readme", str(readme), "--results", str(folder)]) == 0
    text = readme.read_text()
    assert "No GPU figure" not in text
    for fact in ("2031-01-02", "commit abc123", "NVIDIA H100 80GB HBM3", "torch 2.11.0", "CUDA 13.0", "driver 580.65"):
        assert fact in text
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[0] == ["images at a time", "1: s", "64: s", "1: against ours", "64: against ours"]
    found = {line[0]: line[1:] for line in lines}
    assert found["**`Sampler(fused=True, dtype=torch.bfloat16)`**"] == ["**0.092**", "**0.202**", "", ""]
    assert found["`Sampler` of the network as it is, bfloat16"] == ["0.300", "", "", ""]
    assert found["`torch.compile` of the whole step, max-autotune, bfloat16"] == ["0.200", "0.250", "2.22x", "1.25x"]
    assert found["eager PyTorch, bfloat16, channels_last"] == ["", "0.600", "", "3.00x"]
    assert found["`q_sample`"] == ["0.200", "89%", "0.800", "4.00x", "0.300", "1.50x"]
    assert "a copy moves 3000 GB/s" in text
    assert (
        "7 of 8 goals reached. Missed:\n\n- tutorial 3x32x32, n = 64, against C16: 1.25x (1.25-1.25), wanted 1.4x"
        in text
    )
    # A goal is for an H100: elsewhere the figures stand without a verdict.
    other = result("NVIDIA L4", cases=steps)
    assert "goals reached" not in table.section([("nvidia-l4", other)])
    assert "no verdict here" in table.section([("nvidia-l4", other)])


def test_a_bad_result_or_readme_is_an_error(table, place, capsys):
    readme, folder = place
    (folder / "gpu.json").write_text(json.dumps({**result(), "schema": 0}))
    assert table.main(["--readme", str(readme), "--results", str(folder)]) == 2
    assert "gpu.json: result.schema must be 1" in capsys.readouterr().err
    (folder / "gpu.json").unlink()
    readme.write_text("no marks")
    assert table.main(["--readme", str(readme), "--results", str(folder)]) == 2
    assert "README must have the line" in capsys.readouterr().err
    assert readme.read_text() == "no marks"
