"""run.py and the schedulers' host time: what is printed and written, exit codes, no speed for what is wrong."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch


@pytest.fixture
def quick_host(module, monkeypatch):
    """host.py with runs of 20 steps."""
    host = module("host")
    short = {name: (20, options) for name, (_, options) in host.SCHEDULERS.items()}
    monkeypatch.setattr(host, "SCHEDULERS", short)
    return host


@pytest.mark.no_poison
def test_schedulers_are_timed_beside_diffusers_own(module, quick_host):
    pytest.importorskip("diffusers")
    rows = quick_host.run_host(0.02)
    assert [row["scheduler"] for row in rows] == ["DDPMScheduler", "DDIMScheduler"]
    for row in rows:
        assert row["status"] == "ok"
        assert 0 < row["difference"] < 2e-4  # the tables of diffusers are float32
        assert len(row["rounds_s"]["ours"]) == len(row["rounds_s"]["diffusers"]) >= 5
        assert all(0 < seconds < 1 for times in row["rounds_s"].values() for seconds in times)
    text = quick_host.lines(rows)
    assert len(text) == 3
    assert "us: " in text[1]
    assert "wanted 5.0x" in text[1]


def test_a_scheduler_that_is_wrong_gets_no_speed(module, quick_host, monkeypatch):
    diffusers = pytest.importorskip("diffusers")

    class Spoilt(diffusers.DDPMScheduler):
        def step(self, m, t, x, generator=None):
            result = super().step(m, t, x, generator=generator)
            result.prev_sample = result.prev_sample + 1e-2
            return result

    stand_in = types.SimpleNamespace(DDPMScheduler=Spoilt, DDIMScheduler=diffusers.DDIMScheduler)
    monkeypatch.setitem(sys.modules, "ddpm_fast.interop.diffusers", stand_in)
    wrong, right = quick_host.run_host(0.02)
    assert (wrong["status"], wrong["rounds_s"]) == ("wrong", {})
    assert "DDPMScheduler  wrong: images differ by" in quick_host.lines([wrong])[1]
    assert right["status"] == "ok"
    assert right["difference"] == 0
    result = {"ops": [], "cases": [], "host": [wrong, right]}
    assert module("run").failed(result) == [f"DDPMScheduler: {wrong['reason']}"]


def test_without_diffusers_no_scheduler_is_timed(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "ddpm_fast.interop.diffusers", None)
    rows = module("host").run_host()
    assert [row["status"] for row in rows] == ["missing", "missing"]
    assert "not installed; pip install" in rows[0]["reason"]


@pytest.fixture
def quick_run(module, tiny, tiny_paper, monkeypatch):
    """run.py with tiny networks in the places of the real ones, and without measuring the machine."""
    case, paper = tiny().case, tiny_paper().case
    monkeypatch.setattr(module("sampler"), "tutorial", lambda n: case)
    monkeypatch.setattr(module("sampler"), "paper", lambda n: dataclasses.replace(paper, name="ddpm-cifar10-32", n=n))
    rates = {"bfloat16": 2e11, "float32": 1e11, "read": 1e10}
    monkeypatch.setattr(module("machine"), "peaks", lambda device, budget: rates)
    return module("run")


def test_run_prints_a_table_and_writes_the_result(module, quick_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    out = tmp_path / "deep" / "result.json"
    arguments = ["--only", "sampler", "--n", "2", "--candidates", "F32,S32,E32", "--without-fused", "--seconds", "0.02"]
    assert quick_run.main([*arguments, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "WARNING: OMP_WAIT_POLICY=PASSIVE" in text
    assert "S32 against the best baseline, E32" in text
    assert "F32" not in text
    result = module("results").load(out)
    assert [record["id"] for record in result["cases"][0]["candidates"]] == ["S32", "E32"]
    assert result["machine"]["threads"] == torch.get_num_threads()
    assert result["machine"]["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert result["settings"]["sections"] == ["sampler"]


def test_run_measures_the_paper(module, quick_run, tmp_path, capsys):
    pytest.importorskip("diffusers")
    out = tmp_path / "result.json"
    arguments = ["--only", "paper", "--n", "2", "--candidates", "F16,D32,D16", "--seconds", "0.02"]
    assert quick_run.main([*arguments, "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "ddpm-cifar10-32, n = 2; a step" in text
    assert "F16 against the best baseline" in text
    result = module("results").load(out)
    assert [(case["network"], case["n"]) for case in result["cases"]] == [("ddpm-cifar10-32", 2)]
    assert result["cases"][0]["options"]["block_out_channels"] == [16, 32]
    found = [(row.case, row.baseline, row.n, row.least) for row in module("targets").targets(result)]
    assert found == [("ddpm-cifar10-32", baseline, 2, 1.0) for baseline in ("D32", "D16")]
    lines = [line for line in text.splitlines() if ", wanted 1.0x: " in line]
    assert len(lines) == 2
    assert lines[0].split()[:6] == ["ddpm-cifar10-32,", "n", "=", "2", "against", "D32"]


def test_without_diffusers_the_paper_is_rows_that_say_so(module, tiny_paper, monkeypatch):
    """Without the peer there is nothing to check against, so nothing gets a speed."""
    sampler, case = module("sampler"), tiny_paper().case
    monkeypatch.setitem(sys.modules, "diffusers", None)
    found = sampler.run_case(case, torch.device("cpu"), ["F32", "E32", "D32"], budget=0.02, turn=0.005)
    for record in found["candidates"]:
        assert (record["status"], record["rounds_s"]) == ("missing", [])
        assert "pip install diffusers" in record["reason"]


def test_a_wrong_result_of_ours_is_an_exit_code(module, quick_run, tmp_path, capsys, monkeypatch):
    ours = module("ours")
    right = ours.Ours.predict
    monkeypatch.setattr(ours.Ours, "predict", lambda self, t, x=None: 1.3 * right(self, t, x))
    arguments = ["--only", "sampler", "--n", "2", "--candidates", "S32,E32", "--seconds", "0.02"]
    assert quick_run.main([*arguments, "--out", str(tmp_path / "r.json")]) == 1
    assert "check failed: S32 at tiny, n = 2: wrong" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "1,x"], "numbers with commas"),
        (["--n", "0"], "at least 1"),
        (["--candidates", "E32,E99"], "no candidate 'E99'; there are F16"),
        (["--only", "everything"], "invalid choice"),
    ],
)
def test_run_refuses_bad_arguments(module, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        module("run").main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_run_without_the_gpu_asked_for(module, capsys):
    assert module("run").main(["--device", "cuda"]) == 2
    assert "no usable NVIDIA GPU" in capsys.readouterr().err
