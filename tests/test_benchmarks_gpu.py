"""The benchmarks as they run on a GPU, as far as that shows without one: targets, merging, timing, what is kept."""

from __future__ import annotations

import copy
import json
import types

import pytest
import torch
from gpu_results import case, op, result

CPU = torch.device("cpu")
TUTORIAL, PAPER = "tutorial 3x32x32", "ddpm-cifar10-32"


def rows(module, **told):
    """What targets.py says of a result: (case, n, kind or baseline) -> (wanted, verdict)."""
    found = module("targets").targets(result(**told))
    return {(row.case, row.n, row.baseline): (row.wanted(), row.verdict) for row in found}


def test_steps_have_the_marks_of_an_h100(module):
    cases = [
        case(TUTORIAL, 1, F16=0.097, E16=0.6, C16=0.17), case(TUTORIAL, 16, F16=0.134), case(TUTORIAL, 64, F16=0.2),
        case(TUTORIAL, 512, F16=1.5, E16=3.0, C16=1.8), case(PAPER, 1, F16=0.5, C16=0.66), case(PAPER, 64, F16=2.0),
        case("lucidrains 3x32x32", 1, F16=1.0, C16=0.5),
    ]  # fmt: skip
    assert rows(module, cases=cases) == {
        (TUTORIAL, 1, "1000 steps"): ("0.1 s", "reached"),  # 0.097 and what a call costs
        (TUTORIAL, 1, "E16"): ("6.0x", "reached"),
        (TUTORIAL, 1, "C16"): ("1.8x", "missed"),
        (TUTORIAL, 16, "1000 steps"): ("0.135 s", "missed"),
        (TUTORIAL, 64, "1000 steps"): ("0.26 s", "reached"),
        (TUTORIAL, 512, "1000 steps"): ("1.4 s", "missed"),
        (TUTORIAL, 512, "E16"): ("1.9x", "reached"),
        (TUTORIAL, 512, "C16"): ("1.25x", "missed"),
        (PAPER, 1, "1000 steps"): ("0.55 s", "reached"),
        (PAPER, 1, "C16"): ("1.3x", "reached"),
        (PAPER, 64, "1000 steps"): ("2.1 s", "reached"),
    }


@pytest.mark.parametrize(
    ("gpu", "seconds", "ratio"),
    [
        ("NVIDIA H100 80GB HBM3", "reached", "reached"),
        ("NVIDIA H200", "no verdict on this machine", "reached"),
        ("NVIDIA H100 PCIe", "no verdict on this machine", "no verdict on this machine"),
        ("NVIDIA H100 NVL", "no verdict on this machine", "no verdict on this machine"),
        ("NVIDIA GH200 480GB", "no verdict on this machine", "no verdict on this machine"),
        ("NVIDIA A100-SXM4-80GB", "no verdict on this machine", "no verdict on this machine"),
    ],
)
def test_other_gpus_get_no_verdict_that_is_not_theirs(module, gpu, seconds, ratio):
    found = rows(module, gpu=gpu, cases=[case(TUTORIAL, 64, F16=0.2, C16=0.4)])
    assert found[TUTORIAL, 64, "1000 steps"] == ("0.26 s", seconds)
    assert found[TUTORIAL, 64, "C16"] == ("1.4x", ratio)


def test_ops_have_marks_by_the_bytes_they_move(module):
    copy_rate, elements = 3e12, 2**26
    at = elements / copy_rate  # seconds of one byte an element at the rate of a copy

    def figures(dtype, *ops, elements=elements):
        return {
            "dtype": dtype,
            "elements": elements,
            "copy_bytes_per_second": copy_rate,
            "cases": list(ops),
            "failed": {},
        }

    single = figures(
        "float32",
        op("q_sample", 8, 8 * at / 0.7, 30 * at, 9 * at),
        op("q_sample, eps stored", 12, 12 * at / 0.91, 32 * at, 14 * at),
        op("ddpm_step", 12, 12 * at / 0.89, 60 * at, 12 * at),
        op("normal", 4, 4 * at, 5 * at, 5 * at),
        op("group_norm_silu", 8, 8 * at, 30 * at, 9 * at),
    )
    half = figures(
        "bfloat16", op("q_sample", 4, 5 * at, 32 * at, 6 * at), op("add_bias_temb", 4, 5 * at, 6 * at, 5 * at)
    )
    small = figures("float32", op("q_sample", 8, 80 * at, 30 * at, 9 * at, elements=2**20), elements=2**20)
    found = rows(module, ops=[single, half, small])
    rate = "rate of a copy"
    n = elements
    assert found == {
        ("q_sample, float32", n, rate): ("80%", "missed"),
        ("q_sample, float32", n, "torch.compile"): ("1.0x", "missed"),
        ("q_sample, float32", n, "eager"): ("3.2x", "missed"),
        ("q_sample, eps stored, float32", n, rate): ("90%", "reached"),
        ("q_sample, eps stored, float32", n, "torch.compile"): ("1.0x", "reached"),
        ("q_sample, eps stored, float32", n, "eager"): ("2.3x", "reached"),
        ("ddpm_step, float32", n, rate): ("90%", "missed"),
        ("ddpm_step, float32", n, "torch.compile"): ("1.0x", "missed"),
        ("ddpm_step, float32", n, "eager"): ("4.0x", "reached"),
        ("normal, float32", n, "torch.compile"): ("1.0x", "reached"),
        ("q_sample, bfloat16", n, "torch.compile"): ("1.3x", "missed"),
        ("q_sample, bfloat16", n, "eager"): ("3.2x", "reached"),
        ("add_bias_temb, bfloat16", n, "torch.compile"): ("1.0x", "reached"),
    }
    assert rows(module, gpu="NVIDIA H200", ops=[single])["q_sample, float32", n, rate] == ("65%", "reached")


def test_a_report_of_a_gpu_has_both_backends_and_the_targets(module):
    ops = {"dtype": "float32", "elements": 2**26, "copy_bytes_per_second": 3e12, "failed": {},
           "cases": [op("q_sample", 8, 2e-4, 8e-4, 3e-4)]}  # fmt: skip
    text = module("report").report(result(ops=[ops], cases=[case(TUTORIAL, 1, F16=0.09, C16=0.2)]), {})
    assert "| `q_sample` native | 0.200 | 2684.4 | 89% | 4.00x (3.60-4.40) | 1.50x (1.35-1.65) |" in text
    assert "| `q_sample` triton | 0.400 | 1342.2 | 45% | 2.00x (1.80-2.20) | 0.75x (" in text
    assert "A copy moves 3000.0 GB/s." in text
    assert "| tutorial 3x32x32 | 1 | `1000 steps` | 0.1 s | 0.092 s (0.092-0.092) | reached |" in text
    assert "NVIDIA H100 80GB HBM3; CUDA 13.0, cuDNN 91300, driver 580.65" in text


def test_runs_of_one_machine_become_one_result(module, tmp_path):
    results = module("results")
    ops = {"dtype": "float32", "elements": 2**26, "copy_bytes_per_second": 3e12, "not_done": []}
    first = result(
        ops=[{**ops, "cases": [op("q_sample", 8, 2e-4, 8e-4, 3e-4), op("normal", 4, 1e-4, 1e-4, 1e-4)],
              "failed": {"ddpm_step, triton": "differs"}}],
        cases=[case(TUTORIAL, 1, F16=0.2), case(TUTORIAL, 64, F16=0.3)],
    )  # fmt: skip
    again = result(
        ops=[{**ops, "copy_bytes_per_second": 2e12, "cases": [op("q_sample", 8, 9e-4, 8e-4, 3e-4),
              op("ddpm_step", 12, 3e-4, 9e-4, 3e-4)], "failed": {"normal, triton": "differs"}}],
        cases=[case(TUTORIAL, 64, F16=0.25, C16=0.5), case(PAPER, 1, F16=0.5)],
        peaks={"bfloat16": 9e14, "read": 1e12},
    )  # fmt: skip
    again["machine"] |= {"date": "2031-01-03", "load_average": 5.0}
    before = copy.deepcopy([first, again])
    merged = results.merge([first, again])
    assert [first, again] == before
    assert {(c["name"], c["n"]): len(c["candidates"]) for c in merged["cases"]} == {
        (TUTORIAL, 1): 1, (TUTORIAL, 64): 2, (PAPER, 1): 1,
    }  # fmt: skip
    # what was measured again has its own run's copy rate beside it
    assert [[row["op"] for row in figures["cases"]] for figures in merged["ops"]] == [["q_sample", "ddpm_step"]]
    assert [figures["failed"] for figures in merged["ops"]] == [{"normal, triton": "differs"}]
    assert merged["peaks"] == {"bfloat16": 9e14, "float32": 4e14, "read": 3e12}
    assert merged["machine"]["date"] == "2031-01-02, 2031-01-03"
    assert merged["settings"]["took_s"] == 120
    assert results.merge([merged, again])["cases"] == merged["cases"]  # and a merged one takes part in another
    for i, part in enumerate((first, again)):
        results.save(part, tmp_path / f"{i}.json")
    arguments = [
        str(tmp_path / "0.json"),
        str(tmp_path / "1.json"),
        "--merge",
        str(tmp_path / "all.json"),
        "--no-plots",
    ]
    assert module("report").main(arguments) == 0
    assert results.load(tmp_path / "all.json")["cases"] == merged["cases"]
    assert (tmp_path / "all.md").exists()


@pytest.mark.parametrize("name", ["commit", "gpu", "versions", "driver"])
def test_runs_of_different_machines_do_not(module, tmp_path, capsys, name):
    results, other = module("results"), result()
    other["machine"][name] = {"torch": "2.12"} if name == "versions" else "another"
    with pytest.raises(ValueError, match=f"different machines, versions or commits: {name} is .* and .*"):
        results.merge([result(), other])
    results.save(result(), tmp_path / "a.json")
    results.save(other, tmp_path / "b.json")
    arguments = [str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--merge", str(tmp_path / "c.json")]
    assert module("report").main(arguments) == 2
    assert not (tmp_path / "c.json").exists()
    assert name in capsys.readouterr().err


@pytest.fixture
def quick_run(module, monkeypatch):
    """(n -> exception) -> run.py whose sampling steps have made-up figures, and fail where told."""

    def make(fails=None):
        def run_case(made, *_, **__):
            if made.n in (fails or {}):
                raise fails[made.n]
            return case("tiny", made.n, S32=1.0, E32=2.0)

        monkeypatch.setattr(module("sampler"), "run_case", run_case)
        rates = {"bfloat16": 2e11, "float32": 1e11, "read": 1e10}
        monkeypatch.setattr(module("machine"), "peaks", lambda device, budget: rates)
        return module("run")

    return make


ARGUMENTS = ["--only", "sampler", "--n", "1,2,3", "--candidates", "S32,E32"]


def test_a_run_that_is_cut_off_keeps_what_it_had(module, quick_run, tmp_path):
    out = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        quick_run({2: KeyboardInterrupt()}).main([*ARGUMENTS, "--out", str(out)])
    assert [kept["n"] for kept in module("results").load(out)["cases"]] == [1]


def test_a_case_that_fails_leaves_the_others_alone(module, quick_run, tmp_path, capsys):
    out = tmp_path / "r.json"
    assert quick_run({2: RuntimeError("no luck\nat all")}).main([*ARGUMENTS, "--out", str(out)]) == 1
    kept = module("results").load(out)
    assert [case["n"] for case in kept["cases"]] == [1, 3]
    assert kept["settings"]["broken"] == ["tutorial 3x32x32, n = 2: RuntimeError: no luck"]
    assert "check failed: tutorial 3x32x32, n = 2: RuntimeError: no luck" in capsys.readouterr().err


def test_no_case_begins_when_the_time_is_over(module, quick_run, tmp_path):
    out = tmp_path / "r.json"
    assert quick_run().main([*ARGUMENTS, "--minutes", "0", "--out", str(out)]) == 0
    kept = module("results").load(out)
    assert kept["cases"] == []
    assert kept["settings"]["not_done"] == [f"tutorial 3x32x32, n = {n}" for n in (1, 2, 3)]


@pytest.mark.no_poison
def test_both_backends_are_measured_beside_the_baselines(module, monkeypatch, capsys):
    op_speed = module("op_speed")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(op_speed, "measured", lambda *_: ["native", "reference"])
    monkeypatch.setattr(op_speed, "copy_bandwidth", lambda *_: 1e10)
    kept = []
    found = op_speed.run_ops(
        torch.device("cpu"),
        torch.float32,
        elements=2**14,
        budget=0.01,
        only="q_sample",
        keep=lambda f: kept.append(len(f["cases"])),
    )
    assert kept == [1, 2, 3]
    assert [row["op"] for row in found["cases"]] == ["q_sample", "q_sample, eps stored", "q_sample, noise given"]
    for row in found["cases"]:
        assert row["backend"] == "native"
        assert set(row["seconds"]) == {"ddpm_fast", "native", "reference", "eager", "torch.compile"}
        assert row["seconds"]["ddpm_fast"] == row["seconds"]["native"]
        assert row["ratios"] == row["backends"]["native"] != row["backends"]["reference"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("q_sample ")] == ["native", "reference"]
    json.dumps(found)


@pytest.mark.no_poison
def test_a_backend_that_is_wrong_or_breaks_gets_no_speed(module, monkeypatch, capsys):
    op_speed = module("op_speed")
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(op_speed, "measured", lambda *_: ["native", "reference"])
    monkeypatch.setattr(op_speed, "copy_bandwidth", lambda *_: 1e10)
    real = op_speed.verify

    def verify(case, dtype, device, backend=None):
        if case.name == "q_sample" and backend == "reference":
            raise RuntimeError("no such kernel\nimage")
        if case.name == "q_sample, eps stored" and backend == "native":
            return "differs from the reference"
        return real(case, dtype, device, backend)

    monkeypatch.setattr(op_speed, "verify", verify)
    found = op_speed.run_ops(CPU, torch.float32, elements=2**14, budget=0.01, only="q_sample")
    assert found["failed"] == {
        "q_sample, reference": "RuntimeError: no such kernel",
        "q_sample, eps stored, native": "differs from the reference",
    }
    # the one that is taken decides whether there is a figure at all
    assert [row["op"] for row in found["cases"]] == ["q_sample", "q_sample, noise given"]
    assert found["cases"][0]["backends"] == {}
    done = op_speed.run_ops(CPU, torch.float32, elements=2**14, only="q_sample", in_time=lambda: False)
    assert done["not_done"] == ["q_sample", "q_sample, eps stored", "q_sample, noise given"]


@pytest.fixture
def fake_events(monkeypatch):
    """CUDA's events and queue as a list of what was done; between two records 2 ms pass."""
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            done.append("record")

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: done.append("sleep"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: done.append("wait"))
    return done


def test_a_gpus_clock_waits_for_no_host(module, fake_events, monkeypatch):
    timing, gpu = module("timing"), types.SimpleNamespace(type="cuda")
    clock = timing._Clock(gpu, flush=False)
    assert clock.seconds(lambda: fake_events.append("call"), 3) == pytest.approx(2e-3 / 3)
    assert fake_events == ["sleep", "record", "call", "call", "call", "record", "wait"]
    fake_events.clear()
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device: zeros(4 if size[0] else ()))
    monkeypatch.setattr(torch, "sum", lambda x, dim, out: fake_events.append("flush"))
    clock = timing._Clock(gpu, flush=True)
    assert clock.seconds(lambda: fake_events.append("call"), 2) == pytest.approx(2e-3)
    assert fake_events == ["sleep", *2 * ["flush", "record", "call", "record"], "wait"]


def test_facts_name_the_commit_where_there_is_no_git(module, monkeypatch):
    machine = module("machine")
    known = machine.facts(torch.device("cpu"))
    assert known["date"].count("-") == 2

    def no_git(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(machine.subprocess, "run", no_git)
    assert machine.facts(torch.device("cpu"))["commit"] == "unknown"
    monkeypatch.setenv("DDPM_FAST_COMMIT", "0123456789ab")
    assert machine.facts(torch.device("cpu"))["commit"] == "0123456789ab"
