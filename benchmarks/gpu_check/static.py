"""Compiles every kernel for sm_80 and sm_90 and reads the result: needs no GPU.

    python -m gpu_check.static --out FILE.json [--only PART] [--all] [--rehearse] [--minutes M] [--jobs K]

Parts: ops (the Triton ops), layers (chosen layers of the U-Nets), cuda (csrc/cuda), plans (every candidate of every
layer of whole networks). What is judged is in rules.py. Exit code 1: a kernel breaks a rule or was not inspected.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PARTS = ("ops", "layers", "cuda", "plans")
REHEARSED = ("normal",)
SAVED_EVERY = 20.0
"""Seconds between two versions of the file."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    result.add_argument("--only", choices=PARTS, action="append", help="this part; may be given again")
    result.add_argument("--all", action="store_true", help="plans for more batch sizes and dtypes")
    result.add_argument("--rehearse", action="store_true", help="a few kernels of each part")
    result.add_argument("--minutes", type=float, metavar="M", help="start nothing new after so long")
    result.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), metavar="K", help="processes")
    return result


class Findings:
    """The kernels so far and what is wrong with them, on their way into the file."""

    def __init__(self, out: Path, rehearsal: bool) -> None:
        import torch
        from machine import facts

        self.out, self.saved = out, -math.inf
        self.kernels: list[Any] = []
        self.failures: list[str] = []
        self.not_done: list[str] = []
        self.seconds: dict[str, float] = {}
        self.head = {"stage": "static", "machine": facts(torch.device("cpu")), "rehearsal": rehearsal}

    def add(self, kernels: list[Any], failures: list[str]) -> None:
        """Judges kernels and keeps them."""
        from . import rules

        self.kernels += kernels
        self.failures += failures
        for kernel in kernels:
            self.failures += [f"{kernel}: {problem}" for problem in rules.problems(kernel)]
        if time.monotonic() - self.saved > SAVED_EVERY:
            self.save(finished=False)

    def save(self, finished: bool) -> None:
        """Writes the file, whole or not at all."""
        self.kernels.sort(key=lambda k: (PARTS.index(k.part), k.name, k.function, k.dtype, k.capability))
        records = [dataclasses.asdict(kernel) | {"resident_warps": kernel.resident_warps} for kernel in self.kernels]
        figures = {
            **self.head,
            "ok": finished and not self.failures,
            "failures": self.failures,
            "not_done": self.not_done if finished else [*self.not_done, "the run did not come to its end"],
            "seconds": self.seconds,
            "kernels": records,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        part = self.out.with_suffix(".json.part")
        part.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(self.out)
        self.saved = time.monotonic()


def triton_part(part: str, given: argparse.Namespace, until: float, findings: Findings) -> None:
    """Compiles the jobs of a part as far as time allows."""
    from . import triton_jobs, triton_layers, triton_ops, triton_plans

    if part == "plans":
        jobs = triton_plans.jobs(triton_plans.SMALLEST if given.rehearse else triton_plans.plans(given.all))
    else:
        jobs = triton_ops.jobs() if part == "ops" else triton_layers.jobs()
    if given.rehearse:
        jobs = jobs[:: max(1, len(jobs) // 8)]
    begun = triton_jobs.compile_all(jobs, given.jobs, until, findings.add)
    if begun < len(jobs):
        left = sorted({use for job in jobs[begun:] for use in job.used}) if part == "plans" else []
        findings.not_done.append(
            f"{part}: {len(jobs) - begun} of {len(jobs)} kernels, no time left{': of ' * bool(left)}{', '.join(left)}"
        )


def cuda_part(given: argparse.Namespace, findings: Findings) -> None:
    """Reads the kernels of csrc/cuda; for a rehearsal those of one op."""
    from . import cuda_kernels

    if cuda_kernels.find_nvcc() is None:
        findings.not_done.append("cuda: the PTX was not looked at, there is no nvcc: install the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        try:
            findings.add(list(cuda_kernels.kernels(Path(folder), given.jobs, REHEARSED if given.rehearse else ())), [])
        except RuntimeError as error:
            findings.failures.append(f"cuda: {error}")


def main(argv: list[str] | None = None) -> int:
    """Compile, judge, write, print."""
    given = parser().parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # kernels decorated under it cannot be compiled
    from ddpm_fast.backends.triton.launch import INTERPRETED

    if INTERPRETED:
        print("static: error: Triton was imported with TRITON_INTERPRET=1; unset it", file=sys.stderr)
        return 2
    from . import sources, static_table, triton_plans

    until = math.inf if given.minutes is None else time.monotonic() + 60 * given.minutes
    findings = Findings(given.out, given.rehearse)
    parts = [part for part in PARTS if given.only is None or part in given.only]
    for part in parts:
        began = time.monotonic()
        if part == "cuda":
            if began < until:
                cuda_part(given, findings)
            else:
                findings.not_done.append("cuda: no time left")
        else:
            triton_part(part, given, until, findings)
        findings.seconds[part] = round(time.monotonic() - began, 1)
    whole = not given.rehearse and not findings.not_done
    triton = whole and {"ops", "layers", "plans"} <= set(parts)
    findings.failures += sources.missing(findings.kernels, triton=triton, cuda=whole and "cuda" in parts)
    findings.save(finished=True)

    print(static_table.text(findings.kernels, triton_plans.plans(given.all)))
    print()
    for line in (
        *(f"static: {failure}" for failure in findings.failures),
        *(f"not done: {n}" for n in findings.not_done),
    ):
        print(line)
    spent = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in findings.seconds.items())
    print(f"{len(findings.kernels)} kernels, {len(findings.failures)} problems ({spent}, {given.jobs} processes)")
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())
