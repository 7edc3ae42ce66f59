"""Which options make torch.compile of the whole step fastest on this GPU; goes on where an earlier call stopped.

    python -m gpu_check.search --out FILE.json [--cases tutorial:64,ddpm-cifar10-32:1] [--store FILE.json]
                               [--limit SECONDS] [--rehearse] [--minutes M]

First the most promising set of options of every case, then the second of every case, and so on. Each is compiled,
checked against float64 and timed in a process of its own, which may fail or be ended without harm to the others. The
outcomes are in --store (default: baselines.json beside FILE.json), from which benchmarks/run.py takes the best,
compiles it anew and times it beside ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import sampler
import torch
from candidate import Case, Problem, check
from compile_options import Options, Outcome, Store, best_first, for_gpu, key
from inductor import Compiled
from machine import facts, slug
from packages import Missing
from results import PAPER, finite

from . import children
from .findings import Findings, parser, run

ROOT = Path(__file__).resolve().parents[2]
CASES = "tutorial:64,tutorial:1,tutorial:512,tutorial:16,ddpm-cifar10-32:64,ddpm-cifar10-32:1"
NETWORKS = {"tutorial": sampler.tutorial, PAPER: sampler.paper}
LIMIT = 300.0
"""Seconds of one set of options, at the most."""
SHORTEST = 60.0
"""Seconds below which none is begun: it could not be compiled."""
DIFFERENT = ("freezing", "epilogue_fusion", "max_autotune_conv_backends")  # in which the sets differ
DTYPE = torch.bfloat16


def wanted(text: str) -> list[Case]:
    """The cases of NETWORK:N,NETWORK:N,...; argparse.ArgumentTypeError for others."""
    cases = []
    for part in text.split(","):
        name, _, n = part.partition(":")
        if name not in NETWORKS or not n.isdigit() or int(n) < 1:
            known = " or ".join(NETWORKS)
            raise argparse.ArgumentTypeError(f"cases are NETWORK:N with NETWORK {known} and N from 1 on, got {part!r}")
        cases.append(NETWORKS[name](int(n)))
    return cases


class Only(Compiled):
    """`torch.compile` with one set of options."""

    def __init__(self, dtype: torch.dtype, options: Options) -> None:
        super().__init__(dtype)
        self.only = options

    def options(self) -> list[Options]:
        return [self.only]


def attempt(case: Case, options: Options, device: torch.device) -> Outcome:
    """One set of options compiled, checked and timed, here and now. "missing": the network's package is not here."""
    began = time.perf_counter()
    tune(device)
    problem = Problem(case, device)
    candidate = Only(DTYPE, options)
    status, reason, error, ms = "missing", "", float("nan"), None
    try:
        problem.plain()  # wants the package whose network it is
        status = "failed"
        candidate.prepare(problem)
        error, status = check(candidate, problem)
        if status != "wrong":
            once = candidate.seconds(1)
            steps = max(1, min(500, round(0.1 / max(once, 1e-6))))
            ms = min(candidate.seconds(steps) for _ in range(5)) * 1e3
    except Missing as missing:
        reason = str(missing)
    return {
        "key": key(case, DTYPE, device),
        "options": options,
        "status": status,
        "ms": ms,
        "error": finite(error),
        "took_s": round(time.perf_counter() - began, 1),
        "reason": reason.replace("torch.compile failed: ", ""),
        "when": today(),
    }


def tune(device: torch.device) -> None:
    """As run.py does for the baselines' sake."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")


def in_a_child(case: Case, options: Options, device: torch.device, seconds: float, log: Path) -> Outcome:
    """`attempt` in a process of its own, ended after so many seconds."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        job, answer = Path(folder) / "job.json", Path(folder) / "outcome.json"
        job.write_text(json.dumps({"case": dataclasses.asdict(case), "options": options, "device": str(device)}))
        with log.open("a", encoding="utf-8") as file:
            ended = children.run(command(job, answer), ROOT, os.environ, seconds, file)
        if answer.exists():
            found: Outcome = json.loads(answer.read_text(encoding="utf-8"))
            return found
    last = next((line for line in reversed(ended.errors) if line.strip()), "")
    status = "failed" if ended.returncode is not None else "out of time"
    return {
        "key": key(case, DTYPE, device),
        "options": options,
        "status": status,
        "ms": None,
        "error": None,
        "took_s": round(time.perf_counter() - began, 1),
        "reason": f"{ended.verdict}: {last[:160]}" if status == "failed" else ended.verdict,
        "when": today(),
    }


def command(job: Path, answer: Path) -> list[str]:
    """The process that does a job."""
    return [sys.executable, "-m", "gpu_check.search", "--out", str(answer), "--job", str(job)]


def do_job(job: Path, answer: Path) -> int:
    """The child's part: the outcome of `attempt` into `answer`."""
    told = json.loads(job.read_text(encoding="utf-8"))
    case = told["case"]
    case["shape"] = tuple(case["shape"])
    outcome = attempt(Case(**case), told["options"], torch.device(told["device"]))
    part = answer.with_suffix(".part")
    part.write_text(json.dumps(outcome), encoding="utf-8")
    part.replace(answer)
    return 0


def untried(
    cases: list[Case], every: list[Options], store: Store, device: torch.device, seconds: float
) -> Iterator[tuple[Case, Options]]:
    """(case, options) that have no outcome yet, the first set of every case first. One that ran out of time is tried
    again only where it has a quarter more."""
    for options in every:
        for case in cases:
            before = [o for o in store.outcomes(key(case, DTYPE, device)) if o["options"] == options]
            if not before or (before[0]["status"] == "out of time" and seconds > 1.25 * before[0]["took_s"]):
                yield case, options


def search(
    findings: Findings, cases: list[Case], every: list[Options], store: Store, limit: float, minutes: float | None
) -> None:
    """Try what has no outcome yet, as long as there is time."""
    log = findings.out.with_suffix(".children.log")
    lacking: set[str] = set()  # networks whose package is not here
    end = math.inf if minutes is None else time.monotonic() + 60 * minutes
    for case, options in list(untried(cases, every, store, findings.device, limit)):
        seconds = min(limit, end - time.monotonic())
        what = f"{case.name}, n = {case.n}: " + ", ".join(f"{name}={options.get(name)}" for name in DIFFERENT)
        if case.network in lacking:
            continue
        if seconds < min(SHORTEST, limit):
            findings.leave_out(f"{what}: no time left")
            continue
        outcome = findings.attempt(what, in_a_child, case, options, findings.device, seconds, log)
        if outcome is None:
            continue
        if outcome["status"] == "missing":
            lacking.add(case.network)
            findings.leave_out(f"{case.network}: {outcome['reason']}")
            continue
        if outcome["status"] == "out of time" and seconds < limit:
            findings.leave_out(f"{what}: cut off after {outcome['took_s']:.0f} s, when the time was over")
            continue
        store.add(outcome)
        findings.add(outcomes=[*findings.figures.get("outcomes", []), outcome])


def table(cases: list[Case], every: list[Options], store: Store, device: torch.device) -> list[str]:
    """What is known, the fastest first."""
    lines = [f"{'case':<26}{'ms/step':>9}{'error':>9}{'took s':>8}  options; one figure of each, for choosing only"]
    for case in cases:
        tried = store.outcomes(key(case, DTYPE, device))
        order = best_first(tried, [])
        tried.sort(key=lambda outcome: order.index(outcome["options"]) if outcome["options"] in order else len(order))
        for outcome in tried:
            ms = outcome["status"] if outcome["ms"] is None else f"{outcome['ms']:.3f}"
            error = "" if outcome["error"] is None else f"{outcome['error']:.1e}"
            options = ", ".join(f"{name}={outcome['options'].get(name)}" for name in DIFFERENT)
            reason = f": {outcome['reason']}" if outcome["reason"] else ""
            lines.append(
                f"{f'{case.name}, n = {case.n}':<26}{ms:>9}{error:>9}{outcome['took_s']:>8.0f}  {options}{reason}"
            )
        lines.append(f"{f'{case.name}, n = {case.n}':<26}{len(tried)} of {len(every)} sets tried")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Search and print; the exit code. A set that fails is an outcome, not a failure."""
    options_ = parser("search", __doc__)
    options_.add_argument("--cases", type=wanted, default=None, metavar="NETWORK:N,...", help=f"default: {CASES}")
    options_.add_argument("--store", type=Path, metavar="FILE.json", help="default: baselines.json beside --out")
    options_.add_argument("--limit", type=float, default=LIMIT, metavar="SECONDS", help="of one set of options")
    options_.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    options = options_.parse_args(argv)
    if options.job:
        return do_job(options.job, options.out)
    # Ended from outside, the process that compiles must end, too: children.run sees to it on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def work(findings: Findings) -> list[str]:
        cases, every = options.cases or wanted(CASES), for_gpu()
        places = [options.store or options.out.parent / "baselines.json"]
        if findings.rehearsal:
            small = {"width": 8, "depth": 1}
            cases = [Case("tiny", 1, (1, 4, 4), options=small)]
            every = [{"freezing": True, "fallback_random": True}]
            findings.leave_out("the sets of options for a GPU, max-autotune: only a GPU can be tuned for")
        else:
            found = ROOT / "benchmarks" / "results" / f"{slug(facts(findings.device))}-baselines.json"
            places.insert(0, found)
        if findings.rehearsal:
            places[-1].unlink(missing_ok=True)  # a rehearsal does it all again
        store = Store(places)
        search(findings, cases, every, store, options.limit, options.minutes)
        for case in cases:
            if all(outcome["ms"] is None for outcome in store.outcomes(key(case, DTYPE, findings.device))):
                findings.leave_out(f"{case.name}, n = {case.n}: no set of options has worked yet")
        return table(cases, every, store, findings.device)

    return run("search", options, work)


if __name__ == "__main__":
    sys.exit(main())
