"""The driver of benchmarks/gpu_check.sh: stages, time limits, what is kept, exit codes; no part is forgotten."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_check.sh"
GPU = '{"cuda": "13.0", "gpu": "NVIDIA H100 80GB HBM3", "why": ""}'
NO_GPU = '{"cuda": null, "gpu": null, "why": "torch 9.9 is built without CUDA"}'


@pytest.fixture
def driver(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The driver on a machine that seems to have a GPU and nvcc."""
    preflight = module("gpu_check.preflight")
    monkeypatch.setattr(preflight, "ASK", f"print('''{GPU}''')")
    monkeypatch.setattr(preflight, "nvcc_version", lambda: "13.0")
    return module("gpu_check.__main__")


@pytest.fixture
def stages(module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(name=code or [codes], ...) puts stages in the place of the real ones that run these lines of Python."""
    table = module("gpu_check.stages")

    def put(limit: int = 20, strict: bool = False, kind: str = "STAGES", **codes: str | list[str]) -> None:
        made = []
        for name, code in codes.items():
            lines = [code] if isinstance(code, str) else code
            commands = tuple(("{python}", "-c", line) for line in lines)
            made.append(table.Stage(name, f"runs {name}", limit, commands, strict))
        monkeypatch.setattr(table, kind, tuple(made))

    return put


def kept(out: Path) -> dict[str, Any]:
    return json.loads((out / "stages.json").read_text())


def test_stages_fit_their_limits_and_proofs_come_first(module: Any) -> None:
    table = module("gpu_check.stages")
    assert all(stage.limit <= 600 for stage in (*table.STAGES, *table.DRY_STAGES))
    assert table.STAGES[0].name == "build"
    assert table.STAGES[0].limit <= 180
    names = [stage.name for stage in table.STAGES]
    proofs, figures = ("build", "suite-gpu", "sanitize"), ("limits", "search", "ops", "sampler", "paper", "tune")
    assert max(map(names.index, proofs)) < min(map(names.index, figures))
    required = [stage for stage in table.STAGES if "pytest" in str(stage.commands)]
    assert len(required) == 2
    assert all(dict(stage.environment) == {"DDPM_FAST_REQUIRE_GPU": "1"} for stage in required)


def test_every_module_is_run_by_a_stage_and_every_stage_finds_its_module(module: Any) -> None:
    table, folder = module("gpu_check.stages"), ROOT / "benchmarks" / "gpu_check"
    words = [word for stage in (*table.STAGES, *table.DRY_STAGES) for line in stage.commands for word in line]
    run = {word.removeprefix("gpu_check.") for word in words if word.startswith("gpu_check.")}
    programs = {path.stem for path in folder.glob("*.py") if 'if __name__ == "__main__"' in path.read_text()}
    others = programs - run - {"__main__"}
    assert run <= programs
    for name in others:  # those that a module starts
        assert any(f"gpu_check.{name}" in path.read_text() for path in folder.glob("*.py") if path.stem != name), name
    for word in words:
        if word.startswith("{root}"):
            assert Path(word.format(root=ROOT)).exists()


def test_everything_that_needs_a_gpu_is_rehearsed_without_one(module: Any) -> None:
    table = module("gpu_check.stages")
    run = {word for stage in table.STAGES for line in stage.commands for word in line if word.startswith("gpu_check.")}
    assert {f"gpu_check.{name}" for name in table.REHEARSED} == run - {"gpu_check.build", "gpu_check.report"}


def test_a_run_writes_logs_records_and_a_summary(driver: Any, stages: Any, tmp_path: Path, capfd: Any) -> None:
    stages(
        first="print('12 cases are equal')",
        second=["print('one')", "import sys; print('why', file=sys.stderr); sys.exit(3)"],
    )
    assert driver.main([str(tmp_path / "out")]) == 1
    out = tmp_path / "out"
    records = {record["name"]: record for record in kept(out)["stages"]}
    assert (records["first"]["ok"], records["first"]["verdict"]) == (True, "ok")
    assert (records["second"]["ok"], records["second"]["verdict"]) == (False, "exit code 3")
    assert [command["verdict"] for command in records["second"]["commands"]] == ["ok", "exit code 3"]
    assert "why" in (out / "second.log").read_text()
    text = (out / "summary.md").read_text()
    assert "NVIDIA H100 80GB HBM3" in text
    assert "12 cases are equal" in text
    assert "why" in text
    assert "DRY RUN" not in text
    shown = capfd.readouterr().out
    assert "12 cases are equal" in shown
    assert f"second: exit code 3; see {out}/second.log" in shown


def test_a_later_call_replaces_its_stages_and_keeps_the_others(driver: Any, stages: Any, tmp_path: Path) -> None:
    stages(first="raise SystemExit(1)", second="pass")
    assert driver.main([str(tmp_path)]) == 1
    stages(first="pass", second="raise SystemExit(1)")
    assert driver.main([str(tmp_path), "first"]) == 0
    assert [(record["name"], record["ok"]) for record in kept(tmp_path)["stages"]] == [
        ("first", True),
        ("second", True),
    ]


def test_out_of_time_ends_a_stage_with_all_that_it_started(driver: Any, stages: Any, tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(child)!r}, 'w').write(str(p.pid)); print('begun', flush=True); time.sleep(60)"
    )
    stages(limit=2, slow=code, after="print('went on')")
    began = time.monotonic()
    assert driver.main([str(tmp_path / "out")]) == 1
    assert time.monotonic() - began < 30
    slow, after = kept(tmp_path / "out")["stages"]
    assert slow["verdict"].startswith("out of time after")
    assert slow["commands"][0]["lines"] == ["begun"]
    assert after["ok"]
    status = Path(f"/proc/{child.read_text()}/status")  # a dead one stays in the list until somebody waits for it
    assert not status.exists() or "zombie" in status.read_text()


def test_without_a_build_nothing_else_runs(driver: Any, stages: Any, tmp_path: Path) -> None:
    stages(strict=True, build=["raise SystemExit(1)", "print('exactness')"], ops="print('ran')")
    assert driver.main([str(tmp_path)]) == 1
    build, ops = kept(tmp_path)["stages"]
    assert [command["verdict"] for command in build["commands"]] == ["exit code 1", "not run"]
    assert ops["verdict"] == "not run: the build failed"
    # What differs from the reference is a failure, but the rest can run and may tell more.
    stages(strict=True, build=["pass", "raise SystemExit(1)"], ops="print('ran')")
    assert driver.main([str(tmp_path)]) == 1
    assert [record["ok"] for record in kept(tmp_path)["stages"]] == [False, True]


def test_minutes_bound_the_whole_call(driver: Any, stages: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(driver, "MARGIN", 0.5)
    stages(limit=600, first="import time; time.sleep(60)", second="print('ran')")
    assert driver.main([str(tmp_path), "--minutes", "0.02"]) == 1
    first, second = kept(tmp_path)["stages"]
    assert first["verdict"].startswith("out of time after 1")
    assert second["verdict"] == "not run: no time left"


def test_the_places_of_a_command_are_filled_in(driver: Any, module: Any, tmp_path: Path) -> None:
    table = module("gpu_check.stages")
    words = [
        word
        for stage in (*table.STAGES, *table.DRY_STAGES)
        for command in stage.commands
        for word in driver.filled(command, tmp_path, 600)
    ]
    assert not [word for word in words if "{" in word or "}" in word]
    assert words.count(sys.executable) == sum(len(stage.commands) for stage in (*table.STAGES, *table.DRY_STAGES))
    assert "9.75" in words  # a quarter of a minute before the limit


def test_results_of_different_kinds_do_not_mix(
    driver: Any, module: Any, stages: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    stages(first="pass")
    stages(kind="DRY_STAGES", first="pass")
    real, dry = str(tmp_path / "real"), str(tmp_path / "dry")
    assert driver.main([real]) == driver.main([dry, "--dry-run"]) == 0
    assert "DRY RUN: nothing here was measured on a GPU" in (tmp_path / "dry" / "summary.md").read_text()
    assert driver.main([real, "--dry-run"]) == 2
    assert "has the results of a run on a GPU, and this is a dry run; name another folder" in capsys.readouterr().err
    assert driver.main([dry]) == 2
    monkeypatch.setattr(module("gpu_check.preflight"), "ASK", f"print('''{GPU.replace('H100', 'H200')}''')")
    assert driver.main([real]) == 2
    assert "has results of NVIDIA H100 80GB HBM3, and this machine has NVIDIA H200" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a folder for the results"),
        (["OUT", "nope"], "there is no stage 'nope'; there are build, suite-gpu"),
        (["OUT", "ops", "--dry-run"], "there is no stage of a dry run 'ops'; there are build, static"),
        (["OUT", "--minutes", "0"], "--minutes must be above 0, got 0"),
    ],
)
def test_bad_arguments_are_one_line(
    driver: Any, tmp_path: Path, capsys: Any, arguments: list[str], message: str
) -> None:
    given = [str(tmp_path / "out") if word == "OUT" else word for word in arguments]
    assert driver.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpu_check.sh: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said(driver: Any, module: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    preflight = module("gpu_check.preflight")
    monkeypatch.setattr(preflight, "nvcc_version", lambda: None)
    assert driver.main([str(tmp_path)]) == 2
    assert "no nvcc on the PATH or in $CUDACXX: install the CUDA toolkit" in capsys.readouterr().err
    monkeypatch.setattr(preflight, "ASK", f"print('''{NO_GPU}''')")
    assert driver.main([str(tmp_path)]) == 2
    assert "torch 9.9 is built without CUDA; --dry-run shows what can be" in capsys.readouterr().err
    monkeypatch.setattr(preflight, "ASK", "raise ImportError('libcudart is not there')")
    assert driver.main([str(tmp_path)]) == 2
    assert "cannot import torch: ImportError: libcudart is not there" in capsys.readouterr().err
    monkeypatch.setattr(preflight, "NEEDED", {"not_there": "some-package"})
    assert driver.main([str(tmp_path)]) == 2
    assert "has no some-package; run `make test` once" in capsys.readouterr().err


def test_the_script_itself(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([SCRIPT, "--list"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert re.search(r"^  build +at most +3 min", done.stdout, flags=re.MULTILINE)
    assert "with --dry-run:" in done.stdout
    # A relative folder is the caller's.
    command = [SCRIPT, "results", "--dry-run", "build"]
    if "80-real 90" not in subprocess.run([sys.executable, "-m", "ddpm_fast"], capture_output=True, text=True).stdout:
        pytest.skip("the extension has no CUDA half here, and to build it takes minutes")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN" in done.stdout
    assert json.loads((tmp_path / "results" / "build.json").read_text())["ok"]
    assert kept(tmp_path / "results")["stages"][0]["name"] == "build"


def test_build_says_what_failed(module: Any, monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    build = module("gpu_check.build")
    monkeypatch.setattr(build, "install", lambda: [sys.executable, "-c", "raise SystemExit(5)"])
    out = tmp_path / "build.json"
    assert build.main(["--out", str(out), "--again"]) == 1
    assert "the build ended with exit code 5" in capsys.readouterr().err
    assert json.loads(out.read_text())["ok"] is False
    monkeypatch.setattr(build, "install", lambda: [sys.executable, "-c", ""])
    monkeypatch.setattr(build, "extension", lambda: {"file": "", "architectures": "80-real"})
    assert build.main(["--out", str(out), "--again"]) == 1
    assert "the extension has kernels for 80-real, not for 80-real 90" in capsys.readouterr().err


def test_a_stale_extension_is_built_again(module: Any, tmp_path: Path) -> None:
    build = module("gpu_check.build")
    assert not build.up_to_date({"file": "", "architectures": ""})
    assert not build.up_to_date({"file": str(tmp_path / "_C.so"), "architectures": "80-real 90"})
    old = ROOT / "csrc" / "kernels.h"  # no newer than all sources
    assert not build.up_to_date({"file": str(old), "architectures": "80-real 90"})
