"""Compiles every kernel for sm_80 and sm_90 and reads the result: needs no GPU.

    python -m gpu_check.static --out FILE.json [--only PART] [--all] [--rehearse] [--minutes M] [--jobs K]

Parts: ops (the Triton ops), layers (chosen layers of the U-Nets), cuda (csrc/cuda), plans (every candidate of every
layer of whole networks). What is judged is in rules.py. Exit code 1: a kernel breaks a rule or was not inspected.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from . import findings, rules, sources
from .kernels import Kernel

PARTS = ("ops", "layers", "cuda", "plans")
REHEARSED = ("normal",)
SAVED_EVERY = 20.0
"""Seconds between two versions of the file."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = findings.parser("static", __doc__)
    result.add_argument("--only", choices=PARTS, action="append", help="this part; may be given again")
    result.add_argument("--all", action="store_true", help="plans for more batch sizes and dtypes")
    result.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), metavar="K", help="processes")
    return result


class Inspection:
    """The kernels so far and what is wrong with them, on their way into the file."""

    def __init__(self, given: argparse.Namespace) -> None:
        options: dict[str, Any] = {"rehearsal": given.rehearse, "minutes": given.minutes}
        self.found = findings.Findings("static", given.out, torch.device("cpu"), **options)
        self.given, self.kernels, self.saved = given, list[Kernel](), -math.inf
        self.until = math.inf if given.minutes is None else time.monotonic() + 60 * given.minutes

    def add(self, kernels: list[Kernel], failures: list[str]) -> None:
        """Judges kernels and keeps them."""
        self.kernels += kernels
        for line in [*failures, *(f"{kernel}: {problem}" for kernel in kernels for problem in rules.problems(kernel))]:
            self.found.fail(line)
        if time.monotonic() - self.saved > SAVED_EVERY:
            self.save()

    def save(self) -> None:
        """All kernels in one order, whatever the one in which they came."""
        self.kernels.sort(key=lambda k: (PARTS.index(k.part), k.name, k.function, k.dtype, k.capability))
        records = [dataclasses.asdict(kernel) | {"resident_warps": kernel.resident_warps} for kernel in self.kernels]
        self.found.add(kernels=records)
        self.saved = time.monotonic()

    def triton(self, part: str) -> None:
        """Compiles the jobs of a part as far as time allows."""
        from . import triton_jobs, triton_layers, triton_ops, triton_plans

        given = self.given
        if part == "plans":
            jobs = triton_plans.jobs(triton_plans.SMALLEST if given.rehearse else triton_plans.plans(given.all))
        else:
            jobs = triton_ops.jobs() if part == "ops" else triton_layers.jobs()
        if given.rehearse:
            jobs = jobs[:: max(1, len(jobs) // 8)]
        begun = triton_jobs.compile_all(jobs, given.jobs, self.until, self.add)
        if begun < len(jobs):
            uses = sorted({use for job in jobs[begun:] for use in job.used}) if part == "plans" else []
            of = f": of {', '.join(uses)}" if uses else ""
            self.found.leave_out(f"{part}: {len(jobs) - begun} of {len(jobs)} kernels, no time left{of}")

    def cuda(self) -> None:
        """Reads the kernels of csrc/cuda; for a rehearsal those of one op."""
        from . import cuda_kernels

        if cuda_kernels.find_nvcc() is None:
            self.found.leave_out("cuda: the PTX was not looked at, there is no nvcc: install the CUDA toolkit")
        with tempfile.TemporaryDirectory() as folder:
            wanted = REHEARSED if self.given.rehearse else ()
            self.add(list(cuda_kernels.kernels(Path(folder), self.given.jobs, wanted)), [])


def main(argv: list[str] | None = None) -> int:
    """Compile, judge, write, print."""
    given = parser().parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # kernels decorated under it cannot be compiled
    try:
        from ddpm_fast.backends.triton.launch import INTERPRETED
    except ImportError as error:
        print(f"static: error: Triton cannot be imported ({error}): pip install 'ddpm_fast[triton]'", file=sys.stderr)
        return 2
    if INTERPRETED:
        print("static: error: Triton was imported with TRITON_INTERPRET=1; unset it", file=sys.stderr)
        return 2
    from . import static_table, triton_plans

    inspection = Inspection(given)
    found, seconds = inspection.found, dict[str, float]()
    parts = [part for part in PARTS if given.only is None or part in given.only]
    for part in parts:
        began = time.monotonic()
        if part == "cuda":
            found.attempt(part, inspection.cuda)
        else:
            found.attempt(part, inspection.triton, part)
        seconds[part] = round(time.monotonic() - began, 1)
    whole = not given.rehearse and not found.not_done
    triton = whole and {"ops", "layers", "plans"} <= set(parts)
    for line in sources.missing(inspection.kernels, triton=triton, cuda=whole and "cuda" in parts):
        found.fail(line)
    found.figures["seconds"] = seconds
    inspection.save()

    spent = ", ".join(f"{part} {took:.0f} s" for part, took in seconds.items())
    count = f"{len(inspection.kernels)} kernels, {len(found.failures)} problems ({spent}, {given.jobs} processes)"
    found.say(static_table.text(inspection.kernels, triton_plans.plans(given.all)), "", count, *found.ending())
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
