"""The whole benchmark: ops, sampling and training steps, drift, schedulers; ours and every baseline, each checked.

    python benchmarks/run.py [--quick] [--only ops|sampler|paper|lucidrains|variants|drift|training|host]
                             [--variants] [--n 1,16] [--out FILE.json]

Prints tables as it goes and writes benchmarks/results/<machine>.json, which benchmarks/report.py turns into Markdown
and plots. NOTES.md tells how to read it. Exit code 1 when a check of ours failed, 2 when it could not start.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import cases
import drift
import host
import inductor
import machine
import results
import sampler
import torch
import training
from machine import progress

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


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Everything asked for, printed as it comes; the result as the file has it."""
    device = torch.device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    _tune(device)
    began = time.perf_counter()
    sections = options.only or [section for section in SECTIONS if section != "variants"]
    if options.variants and "variants" not in sections:
        sections = [*sections, "variants"]
    gpu = device.type == "cuda"
    batches = options.n or ([1, 16] if options.quick else [1, 16, 64, 512 if gpu else 256])
    budget = options.seconds or (1.0 if options.quick else 3.0)
    turn = 0.1 if options.quick else 0.3
    if options.quick:
        inductor.Compiled.most = 2 if gpu else 1
    progress("measuring what the machine can do")
    facts, peaks = machine.facts(device), machine.peaks(device, budget=budget)
    _say(_header(facts, peaks))
    result: dict[str, Any] = {"schema": results.SCHEMA, "machine": facts, "peaks": peaks, "cases": []}
    result |= {"ops": [], "drift": None, "training": [], "host": []}

    if "ops" in sections:
        for dtype in (torch.float32, torch.bfloat16) if gpu else (torch.float32,):
            progress(f"ops, {dtype}")
            figures = cases.run_ops(
                device,
                dtype,
                elements=2**20 if options.quick and not gpu else None,
                budget=0.2 if options.quick else 0.6,
                say=lambda line: print(line, flush=True),
            )
            result["ops"].append(figures)
            print(flush=True)
    todo = []
    if "sampler" in sections:
        names = _candidates(options, sampler.ON_GPU if gpu else sampler.ON_CPU)
        todo += [(sampler.tutorial(n), names) for n in batches]
    if "paper" in sections:
        for n in options.n or ([1] if options.quick else [1, 16, 64]):
            names = _candidates(options, sampler.for_paper(n, device, quick=options.quick))
            todo.append((sampler.paper(n), names))
    if "lucidrains" in sections:
        for n in options.n or ([1] if options.quick else [1, 4, 16, 64]):
            names = _candidates(options, sampler.for_lucidrains(n, device, quick=options.quick))
            todo.append((sampler.lucidrains(n), names))
    if "variants" in sections:
        names = _candidates(options, sampler.FOR_VARIANTS)
        todo += [(case, names) for n in (options.n or [16]) for case in sampler.variants(n)]
    for case, names in todo:
        figures = sampler.run_case(case, device, names, budget=budget, turn=turn)
        result["cases"].append(figures)
        _say(sampler.lines(figures))
    if "drift" in sections:
        names = [name for name in _candidates(options, DRIFT_CANDIDATES) if name in DRIFT_CANDIDATES]
        if options.quick:
            names = [name for name in names if not name.startswith("C")]  # compiles for half a minute
        case = sampler.tutorial(1 if options.quick else 2)
        result["drift"] = drift.run_drift(case, device, names, steps=100 if options.quick else None)
        _say(drift.lines(result["drift"]))
    if "training" in sections:
        for n in options.n or ([16] if options.quick else [128]):
            names = tuple(name for name in training.CANDIDATES if not (options.quick and name.startswith("AC")))
            figures = training.run_training(n, device, names=names, budget=5 * budget)
            result["training"].append(figures)
            _say(training.lines(figures))
    if "host" in sections:
        result["host"] = host.run_host(budget)
        _say(host.lines(result["host"]))
    _say(_verdict(result))
    # Others may have been busy when the run began: a limit is the best that was seen.
    again = machine.peaks(device, budget=budget)
    result["peaks"] = {name: max(rate, again[name]) for name, rate in peaks.items()}
    result["settings"] = {
        "argv": sys.argv[1:],
        "sections": sections,
        "batches": batches,
        "seconds_per_candidate": budget,
        "seconds_per_turn": turn,
        "took_s": round(time.perf_counter() - began, 1),
    }
    return result


def _verdict(result: dict[str, Any]) -> list[str]:
    rows = results.targets(result)
    if not rows:
        return []
    found = ["targets of the fused bfloat16 plan, and of the schedulers, on a CPU:"]
    for row in rows:
        word = "reached" if row.reached else "MISSED"
        ratio = f"{row.measured.median:.2f}x ({row.measured.p20:.2f} - {row.measured.p80:.2f})"
        where = f"{row.case}, n = {row.n}"
        found.append(f"  {where:<28} against {row.baseline:<9} {ratio}, wanted {row.least}x: {word}")
    return found


def failed(result: dict[str, Any]) -> list[str]:
    """What of ours gave a wrong or inaccurate result."""
    wrong = [f"op {name}" for figures in result["ops"] for name in figures["failed"]]
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


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write."""
    options = parser().parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("run.py: error: --device cuda, but torch finds no usable NVIDIA GPU", file=sys.stderr)
        return 2
    result = measure(options)
    out = options.out or Path(__file__).parent / "results" / f"{machine.slug(result['machine'])}.json"
    results.save(result, out)
    print(f"{os.path.relpath(out)} written; {result['settings']['took_s'] / 60:.1f} minutes", flush=True)
    wrong = failed(result)
    for what in wrong:
        print(f"check failed: {what}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
