"""The check of every op on a GPU, on the CPU: it covers all ops, finds what is planted, and survives what it runs."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from ddpm_fast import backends
from ddpm_fast.backends import native
from ddpm_fast.ops._schema import SCHEMAS

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


@pytest.fixture
def checks(module):
    return module("gpu_check.op_checks")


@pytest.fixture
def exactness(module):
    return module("gpu_check.exactness")


def check(checks, op, dtype=torch.float32, backend="native", **options):
    return checks.check_op(op, backend, dtype, CPU, seed=3, seconds=60, small=True, **options)


def test_every_op_is_checked_on_both_backends_in_every_dtype(exactness, module):
    cases = module("gpu_check.op_cases")
    assert set(cases.RULES) == set(SCHEMAS) == set(cases.VARIANTS)
    for rehearse in (False, True):
        found = {(t["name"], t["backend"], t["dtype"]) for t in exactness.tasks(rehearse) if t["kind"] == "op"}
        assert found == {
            (op, backend, dtype)
            for op in SCHEMAS
            for backend in ("native", "triton")
            for dtype in ("float32", "bfloat16", "float16")
        }
    for op, schema in SCHEMAS.items():  # a rule for each result
        results = schema.split("->")[1].count("Tensor") + len(re.findall(r"\w!\)", schema))
        assert len(cases.RULES[op]) == results, op


@pytest.mark.parametrize("op", SCHEMAS)
def test_the_cpp_half_passes(checks, op):
    """All that is run on a GPU, with the C++ kernels."""
    result = checks.check_op(op, "native", torch.float32, CPU, seed=int(time.time()), seconds=60)
    assert result.failures == result.not_done == []
    assert result.cases >= 20
    small = check(checks, op, torch.bfloat16)
    assert small.failures == []
    assert (small.cases > 0) == (op != "random_bits")


@pytest.mark.parametrize("op", ["normal", "ddpm_step", "group_norm_silu"])
def test_triton_passes_in_the_interpreter(checks, op):
    pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")
    from ddpm_fast.backends.triton import launch

    if not launch.INTERPRETED:
        pytest.skip("kernels are compiled here: there is a GPU")
    result = check(checks, op, torch.bfloat16, "triton")
    assert result.failures == []
    assert result.cases > 0


def test_cases_are_fresh_for_each_seed_and_the_same_for_one(module):
    cases = module("gpu_check.op_cases")
    one, same, other = (cases.build("normal", (2, 3), torch.float32, "contiguous", 0, seed) for seed in (1, 1, 2))
    assert one.arguments[2] == same.arguments[2] != other.arguments[2]
    assert torch.equal(one.arguments[1], same.arguments[1])


def planted(monkeypatch, op, change):
    """The native kernel of `op`, followed by `change` of what it wrote or returned."""
    original = getattr(native, op)

    def wrong(*arguments):
        result = original(*arguments)
        change(arguments, result)
        return result

    monkeypatch.setattr(native, op, wrong)
    backends._chosen.clear()  # the resolver keeps functions


def test_one_ulp_in_one_element_is_found_and_named(checks, monkeypatch):
    def change(arguments, result):
        y = result.view(-1)
        y[7] = torch.nextafter(y[7], torch.tensor(float("inf")))

    planted(monkeypatch, "add_bias_temb", change)
    result = check(checks, "add_bias_temb")
    assert len(result.failures) == checks.REPORTED
    first = result.failures[0]
    assert first.startswith("add_bias_temb float32 contiguous (2, 6, 5, 7) variant 0: 1 of 420 elements of result 0")
    assert "first at (0, 0, 1, 0): got" in first
    assert re.search(r"inputs there: h=-?\d.*, bias\[0\]=", first)


def test_an_error_beyond_the_tolerance_is_found_where_bits_are_not_promised(checks, monkeypatch):
    planted(monkeypatch, "rms_norm_silu", lambda arguments, y: y.view(-1)[3].mul_(1 + 1e-4))
    failures = check(checks, "rms_norm_silu").failures
    assert failures
    assert "1 of 420 elements of result 0 differ, first at (0, 0, 0, 3)" in failures[0]


def test_an_output_not_written_is_found(checks, monkeypatch):
    before, start, end = {}, native.Staged.__init__, native.Staged.commit

    def init(self, tensor, layout, *, read=False):
        start(self, tensor, layout, read=read)
        before[id(tensor)] = tensor.reshape(-1)[-1].clone()

    def commit(self):
        self.tensor.view(-1)[-1] = before[id(self.tensor)]  # as if the kernel had left it alone
        return end(self)

    monkeypatch.setattr(native.Staged, "__init__", init)
    monkeypatch.setattr(native.Staged, "commit", commit)
    failures = check(checks, "q_sample").failures
    assert failures
    assert re.search(r"1 of 420 elements of result \d differ, first at \(1, 5, 4, 6\): got nan", failures[0])


def test_writing_beside_an_output_is_found(checks, monkeypatch):
    def beside(arguments, result):
        out = arguments[0]
        torch.as_strided(out, (1,), (1,), out.storage_offset() + out.numel()).fill_(0)

    planted(monkeypatch, "normal", beside)
    assert "normal float32 contiguous (2, 6, 5, 7) variant 0: wrote beside out" in check(checks, "normal").failures

    def beside_result(arguments, result):
        torch.as_strided(result, (1,), (1,), result.storage_offset() - 1).fill_(0)

    planted(monkeypatch, "noise_mse", beside_result)
    assert any("wrote beside what backends.native" in failure for failure in check(checks, "noise_mse").failures)


def test_a_changed_input_is_found(checks, monkeypatch):
    planted(monkeypatch, "noise_mse_backward", lambda arguments, result: arguments[0].zero_())
    assert any("changed its input g" in failure for failure in check(checks, "noise_mse_backward").failures)


def test_an_exception_is_a_failure_and_the_other_cases_run(checks, monkeypatch):
    calls = []
    original = native.normal

    def fails_once(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("no such kernel\nmore")
        original(*arguments)

    monkeypatch.setattr(native, "normal", fails_once)
    result = check(checks, "normal")
    assert result.failures == ["normal float32 contiguous (2, 6, 5, 7) variant 0: RuntimeError: no such kernel"]
    assert result.cases == 1
    assert not result.dead


def test_golden_noise(checks, exactness, monkeypatch):
    golden = json.loads(exactness.GOLDEN.read_text())
    assert checks.check_golden("native", CPU, golden).equal == len(golden)
    planted(monkeypatch, "normal", lambda arguments, result: arguments[0].neg_())
    assert len(checks.check_golden("native", CPU, golden[:2]).failures) == 2


def test_out_of_time_is_said(checks):
    result = checks.check_op("normal", "native", torch.float32, CPU, seed=3, seconds=-1.0, small=True)
    assert result.cases == 0
    assert result.not_done == ["normal native torch.float32: 2 of 2 cases: out of time"]


def test_many_samples(checks, monkeypatch):
    """What runs over 2^31 elements, over few; a sample past the middle that is wrong, and one that nobody compares."""
    every = checks.check_all_large("native", CPU, seed=4, seconds=60, n=33)
    assert every.failures == []
    assert every.cases == len(checks.SLICEABLE) >= 13
    planted(monkeypatch, "add_bias_temb", lambda arguments, y: y[31:] if len(y) < 33 else y[31:].mul_(2))
    wrong = checks.check_all_large("native", CPU, seed=4, seconds=60, n=33, ops=["add_bias_temb"])
    assert len(wrong.failures) == 1
    assert "samples 31 ..." in wrong.failures[0]
    planted(monkeypatch, "add_bias_temb", lambda arguments, y: y[9, 0, 0, 0].fill_(float("nan")) if len(y) > 9 else y)
    wrong = checks.check_all_large("native", CPU, seed=4, seconds=60, n=33, ops=["add_bias_temb"])
    assert any("1 elements of result 0 are not finite or were not written" in text for text in wrong.failures)


def test_children_that_crash_or_hang_are_named_and_the_rest_goes_on(module, monkeypatch):
    workers = module("gpu_check.workers")
    code = (
        "import os, sys, time; from gpu_check import workers\n"
        "def do(task):\n"
        "    name = task['name']\n"
        "    if name == 'crash': os._exit(3)\n"
        "    if name == 'hang': time.sleep(60)\n"
        "    return {'did': name, 'dead': name == 'dead'}\n"
        "workers.serve(do)\n"
    )
    monkeypatch.setattr(workers, "GRACE", 1.0)
    answers = {}
    names = ["crash", "a", "dead", "b", "hang", "late"]
    tasks = [{"name": name} for name in names[:-1]] + [{"name": "late", "needs": 100}]
    folder = str(Path(workers.__file__).parents[1])
    left = workers.spread(
        tasks, 1, [sys.executable, "-c", code], {"PYTHONPATH": folder},
        until=time.monotonic() + 2, done=lambda task, answer: answers.update({task["name"]: answer}),
    )  # fmt: skip
    assert answers["crash"] == "the process ended with exit code 3"
    assert answers["hang"].startswith("no answer after")
    assert answers["a"]["did"] == "a"
    assert answers["b"]["did"] == "b"
    assert [task["name"] for task in left] == ["late"]


def test_the_rehearsal_writes_its_results(tmp_path, exactness, capsys, monkeypatch):
    out = tmp_path / "exactness.json"
    monkeypatch.chdir(tmp_path)
    code = exactness.main(["--out", str(out), "--rehearse", "--only", "random_bits", "--seed", "5", "--workers", "1"])
    figures = json.loads(out.read_text())
    assert (code, figures["ok"], figures["rehearsal"], figures["failures"]) == (0, True, True, [])
    assert figures["stage"] == "exactness"
    assert figures["seed"] == 5
    assert {row["backend"] for row in figures["results"]} == {"native", "triton"}
    assert any("rehearsal" in line for line in figures["not_done"])
    table = capsys.readouterr().out
    assert re.search(r"random_bits +triton +bits +2 +2/2", table)


def test_what_did_not_run_is_a_failure(tmp_path, exactness, monkeypatch):
    """Also where a child answers nothing."""
    monkeypatch.setattr(exactness, "spread", lambda tasks, *rest, **options: list(tasks))
    out = tmp_path / "exactness.json"
    assert exactness.main(["--out", str(out), "--rehearse", "--only", "normal"]) == 1
    figures = json.loads(out.read_text())
    assert figures["failures"] == ["normal native: no case was run", "normal triton: no case was run"]
    assert "normal triton float16: out of time" in figures["not_done"]


def test_a_child_that_does_not_answer_is_a_failure_but_for_a_network_out_of_time(tmp_path, exactness, monkeypatch):
    def spread(tasks, *rest, done, **options):
        for task in tasks:
            late = task["kind"] == "network" or task["name"] == "ddpm_step"
            done(task, "no answer after 5 s, so it was ended" if late else "the process ended with exit code -11")
        return []

    monkeypatch.setattr(exactness, "spread", spread)
    out = tmp_path / "exactness.json"
    assert exactness.main(["--out", str(out), "--rehearse"]) == 1
    figures = json.loads(out.read_text())
    assert "ddpm_step triton float16: no answer after 5 s, so it was ended" in figures["failures"]
    assert "normal native float32: the process ended with exit code -11" in figures["failures"]
    assert "UNet, network triton bfloat16: no answer after 5 s, so it was ended" in figures["not_done"]


def test_a_task_that_raises_is_answered(exactness, monkeypatch):
    monkeypatch.setattr(exactness.op_checks, "check_op", lambda *a, **k: 1 / 0)
    task = {"kind": "op", "name": "normal", "backend": "native", "dtype": "float32", "device": "cpu", "seed": 1}
    answer = exactness.do({**task, "seconds": 5, "rehearse": True})
    assert answer["failures"] == ["normal native: ZeroDivisionError: division by zero"]
    assert set(answer) == {field.name for field in dataclasses.fields(exactness.op_checks.Result)}


def test_without_a_gpu_it_says_what_to_do(tmp_path, exactness, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert exactness.main(["--out", str(tmp_path / "x.json")]) == 2
    assert "no NVIDIA GPU here; run it on a machine with one, or with --rehearse" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()
    with pytest.raises(SystemExit):
        exactness.main(["--out", str(tmp_path / "x.json"), "--only", "norml"])
