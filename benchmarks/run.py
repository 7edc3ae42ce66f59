"""The whole benchmark: ops, sampling and training steps, drift, schedulers; ours and every baseline, each checked.

    python benchmarks/run.py [--quick] [--only ops|sampler|paper|lucidrains|variants|drift|training|host]
                             [--variants] [--n 1,16] [--minutes M] [--out FILE.json]

Prints tables as it goes and writes benchmarks/results/<machine>.json, which benchmarks/report.py turns into Markdown
and plots; the file is written again after every case, so a run that is cut off keeps what it had. Several runs of one
machine and commit become one file by report.py --merge. NOTES.md tells how to read it. Exit code 1 when a check of ours
failed, 2 when it could not start.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import compile_options
import drift
import host
import inductor
import machine
import op_speed
import results
import sampler
import targets
import torch
import training
from candidate import Case
from machine import progress

FOLDER = Path(__file__).parent / "results"
SECTIONS = ("ops", "sampler", "paper", "lucidrains", "variants", "drift", "training", "host")
DRIFT_CANDIDATES = ("F16", "F32", "S16", "E16", "C16", "OV16")


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between them, such as 1,16,64; got {text!r}") from None
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"batches of at least 1, got {min(numbers)}")
    return numbers


def _names(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in sampler.CANDIDATES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no candidate {unknown[0]!r}; there are {', '.join(sampler.CANDIDATES)}")
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "--quick", action="store_true", help="small batches, short turns, 100 steps of drift; 4 minutes"
    )
    result.add_argument("--only", choices=SECTIONS, action="append", help="this section; may be repeated")
    result.add_argument("--variants", action="store_true", help="also other widths, depths, sizes, labels (long)")
    result.add_argument(
        "--n",
        type=_numbers,
        metavar="N,N,...",
        help="batches; default 1,16,64,256, of the others' networks 1,16,64 and 1,4,16,64",
    )
    result.add_argument("--candidates", type=_names, metavar="ID,ID,...", help=", ".join(sampler.CANDIDATES))
    result.add_argument("--without-fused", action="store_true", help="leave the fused plan out")
    result.add_argument("--seconds", type=float, help="for each candidate of a case; default 3 (--quick: 1)")
    result.add_argument("--threads", type=int, help="of torch and OpenVINO; default: torch's own choice")
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--out", type=Path, metavar="FILE.json", help="default: benchmarks/results/<machine>.json")
    result.add_argument("--minutes", type=float, default=math.inf, metavar="M", help="begin no case after so long")
    result.add_argument(
        "--baselines",
        type=Path,
        metavar="FILE.json",
        help="which options make torch.compile fastest on this GPU, as gpu_check.search has found out; default: "
        "baselines.json beside the result, and what benchmarks/results has",
    )
    return result


def _candidates(options: argparse.Namespace, default: tuple[str, ...]) -> list[str]:
    names = options.candidates or list(default)
    return [name for name in names if not (options.without_fused and name.startswith("F"))]


def _say(found: list[str]) -> None:
    print("\n".join(found) + "\n", flush=True)


def _header(facts: dict[str, Any], peaks: dict[str, float]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    found = [
        f"{facts.get('gpu') or facts['cpu']}; {facts['threads']} threads of {facts['cpus']} CPUs; {versions}",
        f"ddpm_fast {facts['ddpm_fast']}, commit {facts['commit']}; load average {facts['load_average']}",
    ]
    rates = f"{peaks['bfloat16'] / 1e9:.0f} GFLOP/s bfloat16, {peaks['float32'] / 1e9:.0f} float32"
    found.append(f"matrix product {rates}; reading {peaks['read'] / 1e9:.1f} GB/s")
    if facts["omp_wait_policy"]:
        found.append(
            f"WARNING: OMP_WAIT_POLICY={facts['omp_wait_policy']} is set; it changes what PyTorch's CPU figures are. "
            "Unset it for a fair comparison"
        )
    return found


def _tune(device: torch.device) -> None:
    """What every user who cares sets, for the baselines' sake."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")


class Run:
    """A run so far. keep: is given the result after every case."""

    def __init__(self, options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
        self.options, self.keep, self.began = options, keep, time.perf_counter()
        device = torch.device(options.device)
        # With its index, so that it compares equal to where tensors say that they are.
        self.device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else device
        self.gpu = device.type == "cuda"
        self.sections = options.only or [section for section in SECTIONS if section != "variants"]
        if options.variants and "variants" not in self.sections:
            self.sections = [*self.sections, "variants"]
        self.batches = options.n or ([1, 16] if options.quick else [1, 16, 64, 512 if self.gpu else 256])
        self.budget = options.seconds or (1.0 if options.quick else 3.0)
        self.turn = 0.1 if options.quick else 0.3
        self.not_done: list[str] = []  # for lack of time
        self.broken: list[str] = []
        self.result: dict[str, Any] = {"schema": results.SCHEMA, "machine": machine.facts(self.device), "cases": []}
        self.result |= {"ops": [], "drift": None, "training": [], "host": [], "peaks": {}}

    def in_time(self, what: str = "") -> bool:
        """Whether something new may begin; what may not is noted."""
        left = bool(time.perf_counter() - self.began < 60 * self.options.minutes)
        if not left and what:
            progress(f"no time left for {what}")
            self.not_done.append(what)
        return left

    def write(self) -> None:
        """Hand the result so far to `keep`."""
        self.result["settings"] = {
            "argv": sys.argv[1:],
            "sections": self.sections,
            "batches": self.batches,
            "seconds_per_candidate": self.budget,
            "seconds_per_turn": self.turn,
            "took_s": round(time.perf_counter() - self.began, 1),
            "not_done": self.not_done,
            "broken": self.broken,
        }
        self.keep(self.result)

    def look(self) -> None:
        """What the machine can do: at the end again, for others may have been busy when the run began."""
        progress("measuring what the machine can do")
        before, now = self.result["peaks"], machine.peaks(self.device, budget=self.budget)
        self.result["peaks"] = {name: max(rate, before.get(name, 0.0)) for name, rate in now.items()}

    def ops(self) -> None:
        """Every op, on a GPU in two dtypes."""
        quick = self.options.quick
        for dtype in (torch.float32, torch.bfloat16) if self.gpu else (torch.float32,):
            if not self.in_time(f"ops, {dtype}"):
                continue
            progress(f"ops, {dtype}")

            def keep(figures: dict[str, Any], earlier: tuple[Any, ...] = tuple(self.result["ops"])) -> None:
                self.result["ops"] = [*earlier, figures]
                self.write()

            figures = op_speed.run_ops(
                self.device,
                dtype,
                elements=2**20 if quick and not self.gpu else None,
                budget=0.2 if quick else 0.6,
                say=lambda line: print(line, flush=True),
                keep=keep,
                in_time=self.in_time,
            )
            self.not_done += [f"{name}, {dtype}" for name in figures["not_done"]]
            print(flush=True)

    def cases(self) -> list[tuple[Case, list[str]]]:
        """Sampling steps to measure, and by which candidates."""
        options, device = self.options, self.device
        named = functools.partial(_candidates, options)
        todo: list[tuple[Case, list[str]]] = []
        if "sampler" in self.sections:
            todo += [(sampler.tutorial(n), named(sampler.ON_GPU if self.gpu else sampler.ON_CPU)) for n in self.batches]
        if "paper" in self.sections:
            for n in options.n or ([1] if options.quick else [1, 16, 64]):
                todo.append((sampler.paper(n), named(sampler.for_paper(n, device, quick=options.quick))))
        if "lucidrains" in self.sections:
            for n in options.n or ([1] if options.quick else [1, 4, 16, 64]):
                todo.append((sampler.lucidrains(n), named(sampler.for_lucidrains(n, device, quick=options.quick))))
        if "variants" in self.sections:
            todo += [(case, named(sampler.FOR_VARIANTS)) for n in (options.n or [16]) for case in sampler.variants(n)]
        return todo

    def case(self, case: Case, names: list[str]) -> None:
        """A sampling step. A case that fails must not take the others' figures with it."""
        try:
            figures = sampler.run_case(case, self.device, names, budget=self.budget, turn=self.turn)
        except Exception as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            self.broken.append(f"{case.name}, n = {case.n}: {type(error).__name__}: {first:.200}")
        else:
            self.result["cases"].append(figures)
            _say(sampler.lines(figures))
        self.write()
        if self.gpu:  # graphs and their memory are held by cycles
            gc.collect()
            torch.cuda.empty_cache()

    def drift(self) -> None:
        """Final images of a whole run from the same noise."""
        quick = self.options.quick
        names = [name for name in _candidates(self.options, DRIFT_CANDIDATES) if name in DRIFT_CANDIDATES]
        if quick:
            names = [name for name in names if not name.startswith("C")]  # compiles for half a minute
        case = sampler.tutorial(1 if quick else 2)
        self.result["drift"] = drift.run_drift(case, self.device, names, steps=100 if quick else None)
        _say(drift.lines(self.result["drift"]))

    def training(self) -> None:
        """Training steps."""
        quick = self.options.quick
        for n in self.options.n or ([16] if quick else [128]):
            if self.in_time(f"training, n = {n}"):
                names = tuple(name for name in training.CANDIDATES if not (quick and name.startswith("AC")))
                figures = training.run_training(n, self.device, names=names, budget=5 * self.budget)
                self.result["training"].append(figures)
                _say(training.lines(figures))

    def do(self) -> dict[str, Any]:
        """Everything asked for, printed as it comes; the result as the file has it."""
        self.look()
        _say(_header(self.result["machine"], self.result["peaks"]))
        if "ops" in self.sections:
            self.ops()
        for case, names in self.cases():
            if self.in_time(f"{case.name}, n = {case.n}"):
                self.case(case, names)
        if "drift" in self.sections and self.in_time("drift"):
            self.drift()
        if "training" in self.sections:
            self.training()
        if "host" in self.sections and self.in_time("host"):
            self.result["host"] = host.run_host(self.budget)
            _say(host.lines(self.result["host"]))
        _say(_verdict(self.result))
        self.look()
        self.write()
        return self.result


def measure(options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Everything asked for; `keep` is given the result after every case."""
    if options.threads:
        torch.set_num_threads(options.threads)
    _tune(torch.device(options.device))
    run = Run(options, keep)
    if options.quick:
        inductor.Compiled.most = 1
    if run.gpu:
        places = [FOLDER / f"{machine.slug(run.result['machine'])}-baselines.json"]
        places.append(options.baselines or _target(options, run.result).parent / "baselines.json")
        inductor.Compiled.found = compile_options.Store(places)
    return run.do()


def _verdict(result: dict[str, Any]) -> list[str]:
    rows = targets.targets(result)
    found = ["targets of the fused bfloat16 plan, of the ops and of the schedulers:"] if rows else []
    for row in rows:
        word = "MISSED" if row.verdict == "missed" else row.verdict
        where = f"{row.case}, n = {row.n}"
        found.append(f"  {where:<38} {row.of():<22} {row.shown()}, wanted {row.wanted()}: {word}")
    return found


def failed(result: dict[str, Any]) -> list[str]:
    """What of ours gave a wrong or inaccurate result."""
    wrong = [f"op {name}: {why}" for figures in result["ops"] for name, why in figures["failed"].items()]
    wrong += result.get("settings", {}).get("broken", [])
    for case in result["cases"]:
        for record in case["candidates"]:
            if record["id"] in results.OURS and record["status"] not in ("ok", "missing"):
                wrong.append(f"{record['id']} at {case['name']}, n = {case['n']}: {record['status']}")
    for figures in result.get("training") or []:
        wrong += [
            f"training with {record['id']}, n = {figures['n']}: {record['status']}"
            for record in figures["candidates"]
            if record["id"] == results.TRAINER and record["status"] != "ok"
        ]
    return wrong + [f"{row['scheduler']}: {row['reason']}" for row in result["host"] if row["status"] == "wrong"]


def _target(options: argparse.Namespace, result: dict[str, Any]) -> Path:
    out: Path = options.out or FOLDER / f"{machine.slug(result['machine'])}.json"
    return out


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = parser().parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("run.py: error: --device cuda, but torch finds no usable NVIDIA GPU", file=sys.stderr)
        return 2
    try:
        result = measure(options, lambda result: results.save(result, _target(options, result)))
    except compile_options.Unreadable as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2
    out = _target(options, result)
    print(f"{os.path.relpath(out)} written; {result['settings']['took_s'] / 60:.1f} minutes", flush=True)
    wrong = failed(result)
    for what in wrong:
        print(f"check failed: {what}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
