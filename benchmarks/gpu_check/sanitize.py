"""The op tests, and those of the plan's Triton layers, under compute-sanitizer: memcheck, racecheck, synccheck.

    python -m gpu_check.sanitize --out FILE.json [--minutes M] [--rehearse] [--at-once N]

First planted faults must be found, by the tools and in the way in which the tests then run; a tool that finds nothing
is blind here, and its silence would prove nothing. Kernels of torch are left out. Logs are beside FILE.json, in
sanitize/.
--rehearse: no tool; the planted faults are compiled, and every job must select tests that exist.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gpu_check.children import end
from gpu_check.files import save
from gpu_check.sanitize_jobs import JOBS, Job, matching
from gpu_check.workers import deadline, with_path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
PORT = 49152
"""The tool's first port; each job has a range of its own."""

NOT_OURS = ("_ZN2at", "cutlass", "cudnn", "cublas", "xmma")
"""In the names of kernels of torch and the libraries: not checked. None of ours has one of these."""

FOUND_EXIT = 86
"""The exit code of the tool where it found something; pytest's own are below 6."""

PLANTED_SECONDS = 120.0
REPORTED_LINES = 6
"""Of what the tool says about a job, the first."""

CUT_OFF = "all that is not listed: the run did not come to its end"


def find(name: str, variable: str) -> str | None:
    """A program of the CUDA toolkit: from the environment, the PATH, or where the toolkit or a package usually is."""
    folders = [Path("/usr/local/cuda/bin"), *Path(sysconfig.get_paths()["purelib"]).glob("nvidia/*/bin")]
    named = os.environ.get(variable) or shutil.which(name)
    candidates = [Path(named)] if named else [folder / name for folder in folders]
    return next((str(path) for path in candidates if path.is_file()), None)


def compile_planted(nvcc: str, binary: Path, arch: str) -> str | None:
    """Build the planted faults; what went wrong, or None."""
    command = [nvcc, "-std=c++17", f"-arch={arch}", "-o", str(binary), str(HERE / "planted.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"nvcc could not compile planted.cu: {done.stderr.strip()[-300:]}"


def exclusions(help_text: str) -> list[str]:
    """Options that leave kernels out, as this version of the tool calls them; none if it has none."""
    for option in ("--kernel-name-exclude", "--kernel-regex-exclude"):
        if option in help_text:
            return [word for part in NOT_OURS for word in (option, f"kernel_substring={part}")]
    return []


@dataclasses.dataclass
class Report:
    """What the tool said. errors: None where it did not come to its summary."""

    errors: int | None
    lines: list[str]


def read_report(text: str) -> Report:
    """The tool's log: the number of its summary, and its first complaint."""
    errors: int | None = None
    for number in re.findall(r"ERROR SUMMARY: (\d+) error", text):
        errors = max(errors or 0, int(number))
    for hazards, wrong in re.findall(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) error", text):
        errors = max(errors or 0, int(hazards), int(wrong))
    lines = [line.removeprefix("=========").strip() for line in text.splitlines() if line.startswith("=========")]
    first = next((k for k, line in enumerate(lines) if COMPLAINT.match(line)), None)
    if first is not None and errors is None:
        errors = sum(bool(COMPLAINT.match(line)) for line in lines)  # cut off, but it had found something
    return Report(errors, [] if first is None else lines[first : first + REPORTED_LINES])


COMPLAINT = re.compile(
    r"(Invalid|Error|Warning|Misaligned|Race reported|Potential|Barrier error|Program hit|Fatal|Unsupported|"
    r"Internal|Device not supported|Target application returned|Out-of-range|Uninitialized)",
)


@dataclasses.dataclass
class Ended:
    """A command under the tool. code: None if it ran out of time."""

    code: int | None
    seconds: float
    output: str
    report: Report


class Tool:
    """compute-sanitizer, and how it is called."""

    def __init__(self, program: str, folder: Path) -> None:
        self.program, self.folder = program, folder
        asked = subprocess.run([program, "--help"], capture_output=True, text=True, check=False)
        self.help = asked.stdout + asked.stderr
        self.folder.mkdir(parents=True, exist_ok=True)

    def run(self, tool: str, name: str, command: list[str], seconds: float, port: int = PORT) -> Ended:
        """A command under one of the tools for at most so many seconds; its log and output are in the folder."""
        log, output = self.folder / f"{name}.tool.log", self.folder / f"{name}.log"
        log.unlink(missing_ok=True)
        options = ["--tool", tool, "--log-file", str(log), "--error-exitcode", str(FOUND_EXIT), *exclusions(self.help)]
        for option, value in (
            ("--target-processes", "application-only"),  # not the compilers that Triton starts
            ("--check-exit-code", "no"),
            ("--launch-timeout", "120"),
            ("--port", str(port)),
            ("--report-api-errors", "no" if tool == "memcheck" else ""),
        ):
            if value and option in self.help:  # versions differ, and an unknown option ends the tool at once
                options += [option, value]
        environment = with_path(os.environ) | {
            "DDPM_FAST_REQUIRE_GPU": "1",
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # else an overrun ends in torch's own memory, unseen
        }
        environment.pop("TRITON_INTERPRET", None)
        began = time.monotonic()
        with output.open("w", encoding="utf-8") as sink:
            child = subprocess.Popen(
                [self.program, *options, *command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
                stdout=sink, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            in_time = True
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                in_time = False
            finally:
                end(child)
        said = output.read_text(encoding="utf-8", errors="replace")
        report = read_report(log.read_text(encoding="utf-8", errors="replace") if log.exists() else said)
        return Ended(child.returncode if in_time else None, time.monotonic() - began, said, report)


def sight(tool: Tool, binary: Path) -> tuple[list[dict[str, Any]], set[str]]:
    """Which of the tools find what was planted, and nothing where nothing was: rows, and the tools that are blind."""
    triton = [sys.executable, "-m", "gpu_check.planted"]
    planted = [
        ("memcheck", "bounds", [str(binary), "bounds"], True),
        ("memcheck", "none", [str(binary), "none"], False),
        ("memcheck", "bounds in Triton", [*triton, "bounds"], True),
        ("memcheck", "none in Triton", [*triton, "none"], False),
        ("racecheck", "race", [str(binary), "race"], True),
        ("racecheck", "none", [str(binary), "none"], False),
        ("synccheck", "sync", [str(binary), "sync"], True),
        ("synccheck", "none", [str(binary), "none"], False),
    ]

    def one(place: int) -> dict[str, Any]:
        kind, fault, command, wanted = planted[place]
        name = f"planted-{kind}-{fault.replace(' ', '-')}"
        ended = tool.run(kind, name, command, PLANTED_SECONDS, PORT + 20 * place)
        # Its program has to have run, so that no other trouble is taken for the fault.
        found = "planted fault" in ended.output and ended.report.errors is not None
        seen = found and (ended.report.errors != 0) == wanted
        row = {"tool": kind, "fault": fault, "errors": ended.report.errors, "seconds": round(ended.seconds, 1)}
        return row | {"seen": seen, "lines": ended.report.lines, "output": ended.output.strip()[-300:]}

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        rows = list(pool.map(one, range(len(planted))))
    return rows, {row["tool"] for row in rows if not row["seen"]}


def run_job(tool: Tool, job: Job, seconds: float, place: int) -> dict[str, Any]:
    """One job; its row. verdict: ok, found, tests failed, nothing ran, no summary, out of time."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail", "20", *job.arguments()]
    ended = tool.run(job.tool, job.name, command, min(seconds, job.seconds), PORT + 20 * place)
    passed = sum(int(number) for number in re.findall(r"(\d+) passed", ended.output))
    verdict = "ok"
    if ended.report.errors:
        verdict = "found"
    elif ended.code is None:
        verdict = "out of time"
    elif ended.code not in (0, FOUND_EXIT) or re.search(r"\d+ (failed|error)", ended.output):
        verdict = "tests failed"
    elif ended.report.errors is None or ended.code == FOUND_EXIT:
        verdict = "no summary"
    elif not passed:
        verdict = "nothing ran"
    done = passed or sum(line.count(".") for line in ended.output.splitlines() if re.match(r"[.sFE]+( +\[|$)", line))
    return {
        "job": job.name,
        "tool": job.tool,
        "verdict": verdict,
        "tests": done,
        "errors": ended.report.errors,
        "seconds": round(ended.seconds, 1),
        "lines": ended.report.lines,
        "end": ended.output.strip().splitlines()[-1:],
    }


def collect(files: Iterable[str]) -> list[str]:
    """The names of all tests in some files."""
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [line for line in done.stdout.splitlines() if "::" in line]


def rehearse(figures: dict[str, Any]) -> None:
    """What needs no GPU: the planted faults compile, every job has tests."""
    failures = figures["failures"]
    nvcc = find("nvcc", "CUDACXX")
    if nvcc is None:
        figures["not_done"].append("the planted faults were not compiled: there is no nvcc")
    else:
        with tempfile.TemporaryDirectory() as folder:
            wrong = compile_planted(nvcc, Path(folder) / "planted", "sm_90")
        failures += [wrong] if wrong else []
    compile((HERE / "planted.py").read_text(), "planted.py", "exec")
    known = collect(sorted({job.file for job in JOBS}))
    for job in JOBS:
        tests = sum(matching(job, name) for name in known)
        figures["jobs"].append({"job": job.name, "tool": job.tool, "verdict": "rehearsed", "tests": tests})
        if not tests:
            failures.append(f"{job.name}: no test of {job.file} is selected by {job.expression!r}")
    figures["not_done"].append("the tool itself, on a GPU: this was a rehearsal on the CPU")


def inspect(figures: dict[str, Any], out: Path, program: str, nvcc: str, until: float, at_once: int) -> None:
    """The real thing: sight first, then the jobs, those of blind tools left out."""
    tool = Tool(program, out.parent / "sanitize")
    binary = tool.folder / "planted"
    major, minor = torch.cuda.get_device_capability()
    wrong = compile_planted(nvcc, binary, f"sm_{major}{minor}")
    if wrong:
        figures["failures"].append(wrong)
        return
    figures["planted"], blind = sight(tool, binary)
    for row in figures["planted"]:
        if not row["seen"]:
            figures["failures"].append(
                f"{row['tool']} is blind here: planted fault {row['fault']!r}, {row['errors']} errors reported; "
                f"it said {row['lines'] or row['output']!r}"
            )
    save(out, figures)
    wanted = [job for job in JOBS if job.tool not in blind]
    figures["not_done"] += [f"{job.name}: {job.tool} is blind" for job in JOBS if job.tool in blind]

    def one(item: tuple[int, Job]) -> dict[str, Any]:
        place, job = item
        left = until - time.monotonic()
        if left < 30:  # it would not get past its start
            return {"job": job.name, "tool": job.tool, "verdict": "not begun", "tests": 0, "errors": None}
        return run_job(tool, job, left, place)

    with concurrent.futures.ThreadPoolExecutor(at_once) as pool:
        for future in concurrent.futures.as_completed([pool.submit(one, item) for item in enumerate(wanted)]):
            row = future.result()
            figures["jobs"].append(row)
            print(f"{row['job']}: {row['verdict']}, {row['tests']} tests", file=sys.stderr, flush=True)
            if row["verdict"] in ("out of time", "not begun"):
                figures["not_done"].append(f"{row['job']}: {row['verdict']}, {row['tests']} tests had passed")
            elif row["verdict"] != "ok":
                what = "; ".join([*row["lines"], *row["end"]])
                figures["failures"].append(f"{row['job']}: {row['verdict']}, {row['errors']} errors: {what}")
            save(out, figures)


def show(figures: dict[str, Any]) -> None:
    """The tables, on standard output."""
    for row in figures["planted"]:
        print(f"planted {row['fault']:<18}{row['tool']:<12}{'as it should be' if row['seen'] else 'BLIND'}")
    print(f"{'job':<42}{'verdict':<14}{'tests':>7}{'errors':>8}{'seconds':>9}")
    for row in sorted(figures["jobs"], key=lambda row: [job.name for job in JOBS].index(row["job"])):
        errors = "" if row.get("errors") is None else row["errors"]
        print(f"{row['job']:<42}{row['verdict']:<14}{row['tests']:>7}{errors:>8}{row.get('seconds', ''):>9}")
    for failure in figures["failures"]:
        print(f"FAILED: {failure}")
    for line in figures["not_done"]:
        print(f"not done: {line}")
    print(f"sanitize: {'ok' if figures['ok'] else 'FAILED'}, {figures['seconds']:.0f} s")


def main(argv: list[str] | None = None) -> int:
    """Find the tools, run, write, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options.add_argument("--minutes", type=float, default=float("inf"), metavar="M")
    options.add_argument("--rehearse", action="store_true", help="what needs neither the tool nor a GPU")
    options.add_argument("--at-once", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)), metavar="N")
    given = options.parse_args(argv)
    program, nvcc = find("compute-sanitizer", "COMPUTE_SANITIZER"), find("nvcc", "CUDACXX")
    if not given.rehearse:
        missing = {
            "no NVIDIA GPU here; run it on a machine with one, or with --rehearse": not torch.cuda.is_available(),
            "no compute-sanitizer: it comes with the CUDA toolkit, put its bin folder on the PATH or its path into "
            "COMPUTE_SANITIZER; or pip install nvidia-cuda-sanitizer-api": program is None,
            "no nvcc for the planted faults: install the CUDA toolkit and put it on the PATH": nvcc is None,
        }
        for why, so in missing.items():
            if so:
                print(f"sanitize: {why}", file=sys.stderr)
                return 2
    from machine import facts

    began = time.monotonic()
    figures: dict[str, Any] = {
        "stage": "sanitize",
        "machine": facts(torch.device("cpu" if given.rehearse else "cuda:0")),
        "rehearsal": given.rehearse,
        "ok": False,
        "failures": [],
        "not_done": [CUT_OFF],
        "planted": [],
        "jobs": [],
    }
    if given.rehearse:
        rehearse(figures)
    else:
        assert program is not None
        assert nvcc is not None
        inspect(figures, given.out.resolve(), program, nvcc, deadline(given.minutes), given.at_once)
    figures["not_done"].remove(CUT_OFF)
    if not any(row["tests"] for row in figures["jobs"]):
        figures["failures"].append("no test was run")
    figures["seconds"] = round(time.monotonic() - began, 1)
    figures["ok"] = not figures["failures"]
    save(given.out, figures)
    show(figures)
    return 0 if figures["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
