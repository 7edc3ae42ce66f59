"""The op benchmark: its checks pass, it prints what it promises, and no speed where a check fails."""

from __future__ import annotations

import json

import pytest
import torch

from ddpm_fast.ops._schema import SCHEMAS


@pytest.fixture
def cases(module):
    return module("cases")


@pytest.fixture
def op_speed(module):
    return module("op_speed")


def test_every_op_has_a_case(cases):
    names = " ".join(case.name for case in cases.CASES)
    for op in SCHEMAS:
        assert op.removesuffix("_backward") in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_case_passes_its_check(cases, op_speed, dtype):
    for case in cases.CASES:
        assert op_speed.verify(case, dtype, torch.device("cpu")) is None, case.name


def test_baselines_compute_the_same_thing(cases, op_speed):
    """Where nothing is random, eager equals the op: the comparison is of like with like."""
    norms = {"group_norm_silu", "rms_norm_silu", "batch_norm_silu"}
    compared = norms | {"q_sample, noise given", "add_bias_temb", "noise_mse, noise given"}
    for case in cases.CASES:
        if case.name in compared:
            inputs = cases.Inputs.make(2, torch.float32, torch.device("cpu"))
            torch.testing.assert_close(op_speed.first(case.fast(inputs)), op_speed.first(case.eager(inputs)))


@pytest.mark.no_poison
def test_prints_and_writes_the_figures(op_speed, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert op_speed.main(["--elements", "65536", "--seconds", "0.05", "--only", "ddpm_step", "--json", str(out)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("ddpm_step")
    assert line.count("x") == 2
    figures = json.loads(out.read_text())
    assert set(figures["cases"][0]["seconds"]) == {"ddpm_fast", "eager", "torch.compile"}
    assert figures["copy_bytes_per_second"] > 0


def test_no_speed_where_the_check_fails(op_speed, monkeypatch, capsys):
    monkeypatch.setattr(op_speed, "verify", lambda *_: "differs from the reference")
    monkeypatch.setattr(op_speed, "measure", lambda *_: pytest.fail("measured although the check failed"))
    assert op_speed.main(["--elements", "16384", "--only", "normal"]) == 1
    assert "check failed: differs from the reference" in capsys.readouterr().out
