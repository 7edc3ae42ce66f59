"""The stage that runs the tests under compute-sanitizer, with a stand-in for the tool that prints real reports."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

BOUNDS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at planted_bounds(int *, int)+0x90
=========     by thread (63,0,0) in block (0,0,0)
=========     Access to 0x7f5e0a000100 is out of bounds
=========     and is 1 bytes after the nearest allocation at 0x7f5e0a000000 of size 256 bytes
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: main [0x9f3c] in planted
=========
========= ERROR SUMMARY: 1 error
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at planted_race(int *, bool)+0x60
=========     and Read access at planted_race(int *, bool)+0xd0 [256 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
SYNC = """\
========= COMPUTE-SANITIZER
========= Barrier error detected. Divergent thread(s) in block
=========     at planted_sync(int *, int)+0xa0
=========     by thread (40,0,0) in block (0,0,0)
=========
========= ERROR SUMMARY: 24 errors
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
NO_RACE = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"

TOOL = f"""#!{sys.executable}
import json, os, sys, time
arguments = sys.argv[1:]
if arguments == ["--help"]:
    print("  --kernel-name-exclude arg   key1=val1   --port arg   --target-processes arg")
    sys.exit(0)
options = dict(zip(arguments[::2], arguments[1::2]))
tool, log = options["--tool"], options["--log-file"]
reports = json.loads({json.dumps([BOUNDS, RACE, SYNC, CLEAN, NO_RACE])!r})
with open(os.environ["FAKE_CALLS"], "a") as calls:
    calls.write(json.dumps([arguments, os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING")]) + "\\n")
faults = dict(memcheck="bounds", racecheck="race", synccheck="sync")
found = dict(zip(faults, reports))
clean = reports[4] if tool == "racecheck" else reports[3]
behaviour = os.environ.get("FAKE_BEHAVIOUR", "")
if "pytest" in arguments:
    file = next(word for word in arguments if word.startswith("tests/"))
    text, out, code = clean, "....s [100%]\\n4 passed, 1 skipped in 2.00s", 0
    if behaviour == "find" and "ddpm_step" in file:
        text, out, code = found["memcheck"], "..F\\n1 failed, 2 passed in 2.00s", 86
    if behaviour == "fail" and "ddpm_step" in file:
        out, code = "..F\\n1 failed, 2 passed in 2.00s", 1
    if behaviour == "skip" and "ddpm_step" in file:
        out = "sss\\n3 skipped in 2.00s"
    if behaviour == "hang" and "ddpm_step" in file:
        print("...", flush=True)
        time.sleep(60)
else:
    fault = arguments[-1]
    seeing = fault == faults[tool] and not (behaviour == "blind" and tool == "racecheck")
    text, code = (found[tool], 86) if seeing else (clean, 0)
    out = "planted fault: " + fault
open(log, "w").write(text)
print(out)
sys.exit(code)
"""
NVCC = '#!/bin/sh\nwhile [ $# -gt 1 ]; do [ "$1" = -o ] && touch "$2"; shift; done\n'


@pytest.fixture
def sanitize(module):
    return module("gpu_check.sanitize")


@pytest.fixture
def jobs(module):
    return module("gpu_check.sanitize_jobs")


@pytest.fixture
def fake(tmp_path, monkeypatch, sanitize, jobs):
    """(behaviour, number of jobs) -> exit code, figures, calls of the tool."""
    for name, text in (("compute-sanitizer", TOOL), ("nvcc", NVCC)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("COMPUTE_SANITIZER", str(tmp_path / "compute-sanitizer"))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    monkeypatch.setenv("FAKE_CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    machine = sys.modules.get("machine") or __import__("machine")
    monkeypatch.setattr(machine, "facts", lambda device: {"device": device.type})

    def run(behaviour="", wanted=3, *more):
        monkeypatch.setenv("FAKE_BEHAVIOUR", behaviour)
        monkeypatch.setattr(sanitize, "JOBS", jobs.JOBS[:wanted] if isinstance(wanted, int) else wanted)
        out = tmp_path / "out" / "sanitize.json"
        code = sanitize.main(["--out", str(out), "--at-once", "3", *more])
        calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return code, json.loads(out.read_text()), calls

    return run


def test_reads_what_the_tools_report(sanitize):
    assert [sanitize.read_report(text).errors for text in (BOUNDS, RACE, SYNC, CLEAN, NO_RACE, "")] == [
        1, 1, 24, 0, 0, None,
    ]  # fmt: skip
    assert sanitize.read_report(BOUNDS).lines[0] == "Invalid __global__ write of size 4 bytes"
    assert sanitize.read_report(RACE).lines[1].startswith("and Read access")
    assert sanitize.read_report(CLEAN).lines == []
    warned = "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)\n"
    assert sanitize.read_report(warned).errors == 2
    assert sanitize.read_report(CLEAN + BOUNDS).errors == 1


def test_a_log_that_was_cut_off_still_counts_what_was_found(sanitize):
    assert sanitize.read_report(BOUNDS.split("========= ERROR")[0]).errors == 1
    assert sanitize.read_report("========= COMPUTE-SANITIZER\n").errors is None
    refused = "========= Device not supported. Please refer to the documentation.\n"
    assert sanitize.read_report(refused).errors == 1


def test_all_well(fake, capsys):
    code, figures, calls = fake()
    assert (code, figures["ok"], figures["failures"], figures["not_done"]) == (0, True, [], [])
    assert [row["tests"] for row in figures["jobs"]] == [4, 4, 4]
    assert len(figures["planted"]) == 8
    assert all(row["seen"] for row in figures["planted"])
    assert all(caching == "1" for _, caching in calls)
    tested = [arguments for arguments, _ in calls if "pytest" in arguments]
    assert len(tested) == 3
    assert len({arguments[arguments.index("--port") + 1] for arguments in tested}) == 3
    for arguments in tested:  # what the tool does not know it is not given
        assert {word for word in arguments if word.startswith("--")} >= {"--kernel-name-exclude", "--target-processes"}
        assert "--check-exit-code" not in arguments
    assert "memcheck-normal-native" in capsys.readouterr().out


def test_what_a_job_finds_is_a_failure_with_its_first_lines(fake):
    code, figures, _ = fake("find")
    assert (code, figures["ok"]) == (1, False)
    (failure,) = figures["failures"]
    assert failure.startswith("memcheck-ddpm-step-native: found, 1 errors: Invalid __global__ write of size 4 bytes")
    assert "is 1 bytes after the nearest allocation" in failure
    assert sorted(row["verdict"] for row in figures["jobs"]) == ["found", "ok", "ok"]


@pytest.mark.parametrize(("behaviour", "verdict"), [("fail", "tests failed"), ("skip", "nothing ran")])
def test_tests_that_fail_or_do_not_run_prove_nothing(fake, behaviour, verdict):
    code, figures, _ = fake(behaviour)
    assert code == 1
    assert figures["failures"][0].startswith(f"memcheck-ddpm-step-native: {verdict}")


def test_a_blind_tool_fails_and_its_jobs_are_not_run(fake, jobs):
    wanted = tuple(job for job in jobs.JOBS if "noise_mse" in job.file and "native" in job.name)
    assert {job.tool for job in wanted} == {"memcheck", "racecheck", "synccheck"}
    code, figures, calls = fake("blind", wanted)
    assert code == 1
    assert figures["failures"][0].startswith("racecheck is blind here: planted fault 'race', 0 errors reported")
    assert {row["tool"] for row in figures["jobs"]} == {"memcheck", "synccheck"}
    assert figures["not_done"] == ["racecheck-noise-mse-native: racecheck is blind"]
    assert not any("pytest" in arguments and "racecheck" in arguments for arguments, _ in calls)


def test_a_job_out_of_time_keeps_what_it_had(fake, sanitize, jobs, monkeypatch):
    wanted = (jobs.JOBS[0], dataclasses.replace(jobs.JOBS[2], seconds=2.0))
    began = time.monotonic()
    code, figures, _ = fake("hang", wanted)
    assert time.monotonic() - began < 30
    assert code == 0
    assert figures["not_done"] == ["memcheck-ddpm-step-native: out of time, 3 tests had passed"]
    assert {row["verdict"] for row in figures["jobs"]} == {"ok", "out of time"}


def test_no_time_left_is_said(fake):
    code, figures, _ = fake("", 2, "--minutes", "0.01")
    assert code == 1
    assert figures["failures"] == ["no test was run"]
    assert {row["verdict"] for row in figures["jobs"]} == {"not begun"}
    assert len(figures["not_done"]) == 2


@pytest.mark.parametrize("lacking", ["GPU", "compute-sanitizer", "nvcc"])
def test_says_what_is_missing(sanitize, monkeypatch, capsys, tmp_path, lacking):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: lacking != "GPU")
    monkeypatch.setattr(sanitize, "find", lambda name, variable: None if name == lacking else "/bin/true")
    assert sanitize.main(["--out", str(tmp_path / "x.json")]) == 2
    assert f"no {'NVIDIA ' if lacking == 'GPU' else ''}{lacking}" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_every_op_and_kernel_is_looked_at(jobs):
    from ddpm_fast.ops._schema import SCHEMAS

    ops = {name.removesuffix("_backward") for name in SCHEMAS} - {"random_bits"}  # beside normal
    assert set(jobs.OPS) == ops
    found = {(job.tool, job.name.rsplit("-", 1)[1], job.file) for job in jobs.JOBS}
    for backend in ("native", "triton"):
        for op in ops:
            assert ("memcheck", backend, f"tests/test_{op}.py") in found
        for op in ops - {"normal", "q_sample", "ddpm_step"}:
            assert {
                ("racecheck", backend, f"tests/test_{op}.py"),
                ("synccheck", backend, f"tests/test_{op}.py"),
            } <= found
    assert len({job.name for job in jobs.JOBS}) == len(jobs.JOBS)
    first = [job.tool for job in jobs.JOBS]
    assert first[: 2 * len(ops)] == ["memcheck"] * 2 * len(ops)


def test_our_kernels_are_not_left_out(sanitize):
    """Kernels are left out by parts of their names, which none of ours may have."""
    names = set()
    for path in (ROOT / "ddpm_fast" / "backends" / "triton").glob("*.py"):
        names |= set(re.findall(r"def (_\w+_kernel)\(", path.read_text()))
    for path in (ROOT / "csrc" / "cuda").glob("*.cu*"):
        names |= set(re.findall(r"\b(\w+_kernel)\(", path.read_text()))
    assert len(names) > 30
    for name in [*names, "_ZN9ddpm_fast", "planted_bounds", "planted_race", "planted_sync", "planted_triton"]:
        assert not any(part in name for part in sanitize.NOT_OURS), name


def test_the_rehearsal_finds_a_job_without_tests(sanitize, jobs, tmp_path, monkeypatch):
    """And what pytest selects is what is counted."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_normal.py").write_text(
        "import pytest\n"
        "device = pytest.mark.parametrize('device', ['native', 'native-gpu', 'triton-gpu'])\n"
        + "".join(f"@device\ndef test_{name}(device): pass\n" for name in ("golden", "matches", "opcheck_matches"))
    )
    monkeypatch.setattr(sanitize, "ROOT", tmp_path)
    monkeypatch.setattr(sanitize, "find", lambda name, variable: None)
    op, missing = jobs.of_op("racecheck", "normal", "native", jobs.CORE), jobs.of_op("memcheck", "normal", "metal")
    monkeypatch.setattr(sanitize, "JOBS", (op, missing))
    out = tmp_path / "sanitize.json"
    assert sanitize.main(["--out", str(out), "--rehearse"]) == 1
    figures = json.loads(out.read_text())
    assert figures["failures"] == [
        "memcheck-normal-metal: no test of tests/test_normal.py is selected by 'metal-gpu and not opcheck'"
    ]
    assert "the planted faults were not compiled: there is no nvcc" in figures["not_done"]
    assert figures["jobs"][0]["tests"] == 1
    assert sanitize.collect(op.arguments()) == ["tests/test_normal.py::test_matches[native-gpu]"]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc: install the CUDA toolkit and put it on PATH")
def test_the_planted_faults_compile(sanitize, tmp_path):
    assert sanitize.compile_planted(str(shutil.which("nvcc")), tmp_path / "planted", "sm_90") is None
    assert os.access(tmp_path / "planted", os.X_OK)
