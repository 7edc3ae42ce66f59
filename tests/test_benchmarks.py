"""The op benchmark: its checks pass, it prints what it promises, and no speed where a check fails."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from ddpm_fast.ops._schema import SCHEMAS

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("benchmark_cases", FOLDER / "cases.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_cases", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_op_has_a_case(cases):
    names = " ".join(case.name for case in cases.CASES)
    for op in SCHEMAS:
        assert op.removesuffix("_backward") in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_case_passes_its_check(cases, dtype):
    for case in cases.CASES:
        assert cases.verify(case, dtype, torch.device("cpu")) is None, case.name


def test_baselines_compute_the_same_thing(cases):
    """Where nothing is random, eager equals the op: the comparison is of like with like."""
    norms = {"group_norm_silu", "rms_norm_silu", "batch_norm_silu"}
    compared = norms | {"q_sample, noise given", "add_bias_temb", "noise_mse, noise given"}
    for case in cases.CASES:
        if case.name in compared:
            inputs = cases.Inputs.make(2, torch.float32, torch.device("cpu"))
            torch.testing.assert_close(cases._first(case.fast(inputs)), cases._first(case.eager(inputs)))


@pytest.mark.no_poison
def test_prints_and_writes_the_figures(cases, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert cases.main(["--elements", "65536", "--seconds", "0.05", "--only", "ddpm_step", "--json", str(out)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("ddpm_step")
    assert line.count("x") == 2
    figures = json.loads(out.read_text())
    assert set(figures["cases"][0]["seconds"]) == {"ddpm_fast", "eager", "torch.compile"}
    assert figures["copy_bytes_per_second"] > 0


def test_no_speed_where_the_check_fails(cases, monkeypatch, capsys):
    monkeypatch.setattr(cases, "verify", lambda *_: "differs from the reference")
    monkeypatch.setattr(cases, "measure", lambda *_: pytest.fail("measured although the check failed"))
    assert cases.main(["--elements", "16384", "--only", "normal"]) == 1
    assert "check failed: differs from the reference" in capsys.readouterr().out
