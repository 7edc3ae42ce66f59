"""What is wanted of a result, on a CPU and on a GPU, beside what was measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from results import (
    LUCIDRAINS,
    PAPER,
    TUTORIAL,
    best_in_training,
    host_ratio,
    speed,
    speed_up,
    timed,
    training_ratio,
)
from timing import Timing

# At the least, for the fused plan in bfloat16 on a CPU: case -> (baseline, n or None for every n) -> ratio of times.
ON_CPU: dict[str, dict[tuple[str, int | None], float]] = {
    TUTORIAL: {("C16", 1): 1.35}
    | {(i, n): r for n in (16, 64) for i, r in (("C16", 1.5), ("OV16", 1.3), ("E32", 5.0))},
    PAPER: {("C16", 16): 1.5, ("D32", None): 1.0, ("D16", None): 1.0},
    LUCIDRAINS: {("C16", 16): 1.3, ("C16", None): 1.0, ("L32", None): 1.0, ("L16", None): 1.0},
}
TRAINING = 1.0  # the Trainer's step against the fastest of the others, and its memory against eager's
HOST = 5.0  # of the host time of `scheduler.step`

# The same on a GPU; the ratios are those of an H100 and hold on an H200, too.
ON_GPU: dict[str, dict[tuple[str, int | None], float]] = {
    TUTORIAL: {
        **{("E16", n): r for n, r in ((1, 6.0), (16, 5.0), (64, 2.5), (512, 1.9))},
        **{("C16", n): r for n, r in ((1, 1.8), (16, 1.7), (64, 1.4), (512, 1.25))},
    },
    PAPER: {("C16", None): 1.3},
}
# On an H100, at the most: seconds of 1000 steps, everything that a call of `sample` does included.
SECONDS: dict[str, dict[int, float]] = {
    TUTORIAL: {1: 0.10, 16: 0.135, 64: 0.26, 512: 1.40},
    PAPER: {1: 0.55, 64: 2.1},
}
STEPS = 1000
# Elementwise ops on a GPU, 64 Mi elements. Bytes an element -> share of the copy bandwidth, at the least.
ENOUGH = 2**26
SHARES = {"H100": {12: 0.90, 8: 0.80}, "H200": {12: 0.90, 8: 0.65}}
DRAWING = ("normal", "q_sample", "q_sample, eps stored", "ddpm_step")
ELEMENTWISE = (*DRAWING, "q_sample, noise given", "add_bias_temb")
OPS_AGAINST_EAGER = {"q_sample, eps stored": 2.3, "q_sample": 3.2, "ddpm_step": 4.0}


def against_compile(op: str, dtype: str) -> float:
    """An elementwise op against `torch.compile`, at the least. In bfloat16 the compiler is slow at the noise; an op
    that draws none moves the same bytes as the compiled one."""
    return 1.3 if dtype != "float32" and op in DRAWING else 1.0


class Target(NamedTuple):
    """What was wanted and what was measured.

    kind: "ratio" (of times, baseline / ours, at least), "seconds" (of 1000 steps, at most) or "share" (of the copy
    bandwidth, at least). judged: False where the mark is not this machine's, and the figure only stands beside it.
    """

    case: str
    baseline: str
    n: int
    least: float
    measured: Timing
    kind: str = "ratio"
    judged: bool = True

    @property
    def reached(self) -> bool:
        """Whether the median is as wanted."""
        if self.kind == "seconds":
            return self.measured.median <= self.least
        return self.measured.median >= self.least

    @property
    def verdict(self) -> str:
        """In a word."""
        if not self.judged:
            return "no verdict on this machine"
        return "reached" if self.reached else "missed"

    def of(self) -> str:
        """What it is about: a baseline, seconds of 1000 steps, the rate of a copy."""
        return f"against {self.baseline}" if self.kind == "ratio" else f"{self.baseline}"

    def wanted(self) -> str:
        """The mark, with its unit."""
        return {"ratio": f"{self.least}x", "seconds": f"{self.least} s", "share": f"{self.least:.0%}"}[self.kind]

    def shown(self) -> str:
        """The measured median, with its unit, and the 20th and 80th percentile."""
        m = self.measured
        if self.kind == "seconds":
            return f"{m.median:.3f} s ({m.p20:.3f}-{m.p80:.3f})"
        if self.kind == "share":
            return f"{m.median:.0%} ({m.p20:.0%}-{m.p80:.0%})"
        return f"{m.median:.2f}x ({m.p20:.2f}-{m.p80:.2f})"


def chip(machine: dict[str, Any]) -> str | None:
    """H100 or H200 where the GPU is the SXM module that the marks are for, else None."""
    words = re.findall(r"\w+", machine.get("gpu") or "")
    found = next((name for name in SHARES if name in words), None)
    return None if {"PCIe", "NVL"} & set(words) else found


def thousand_steps(candidate: dict[str, Any]) -> Timing:
    """Seconds of a whole call of `sample`: 1000 steps, and what a call costs beside them."""
    step, fixed = speed(candidate), candidate.get("fixed_s", {}).get("median", 0.0)
    return Timing(STEPS * step.median + fixed, STEPS * step.p20 + fixed, STEPS * step.p80 + fixed, step.rounds)


def targets(result: dict[str, Any]) -> list[Target]:
    """Every target that this result speaks about."""
    if result["machine"]["device"] == "cuda":
        return [*_on_gpu(result), *_op_targets(result)]
    if result["machine"]["device"] != "cpu":
        return []
    rows = [row for case in result["cases"] for row in _ratios(case, ON_CPU)]
    for figures in result.get("training") or []:
        best = best_in_training(figures)
        measured = None if best is None else training_ratio(figures, best)
        if best is not None and measured is not None:
            rows.append(Target("training " + figures["case"], best, figures["n"], TRAINING, measured))
    for row in result.get("host") or []:
        measured = host_ratio(row)
        if measured is not None:
            rows.append(Target(row["scheduler"] + ".step", "diffusers", 1, HOST, measured))
    return rows


def _ratios(
    case: dict[str, Any], wanted: dict[str, dict[tuple[str, int | None], float]], *, judged: bool = True
) -> Iterator[Target]:
    for (baseline, n), least in wanted.get(case["name"], {}).items():
        measured = speed_up(case, baseline, "F16") if n in (None, case["n"]) else None
        if measured is not None:
            yield Target(case["name"], baseline, case["n"], least, measured, judged=judged)


def _on_gpu(result: dict[str, Any]) -> Iterator[Target]:
    known = chip(result["machine"])
    for case in sorted(result["cases"], key=lambda case: (case["name"] != TUTORIAL, case["name"], case["n"])):
        fast, most = timed(case).get("F16"), SECONDS.get(case["name"], {}).get(case["n"])
        if fast is not None and most is not None:
            taken = thousand_steps(fast)
            yield Target(case["name"], "1000 steps", case["n"], most, taken, "seconds", known == "H100")
        yield from _ratios(case, ON_GPU, judged=known is not None)


def _op_targets(result: dict[str, Any]) -> Iterator[Target]:
    known = chip(result["machine"])
    for figures in result["ops"]:
        for row in figures["cases"]:
            if row["op"] not in ELEMENTWISE or figures["elements"] < ENOUGH:
                continue
            name, n, judged = f"{row['op']}, {figures['dtype']}", figures["elements"], known is not None
            each = row["bytes"] / figures["elements"]
            marks = SHARES[known or "H100"]
            least = next((share for size, share in marks.items() if each >= size), None)
            if least is not None:
                rate = row["bytes"] / figures["copy_bytes_per_second"]
                taken = Timing(**row["seconds"]["ddpm_fast"])
                shares = Timing(rate / taken.median, rate / taken.p80, rate / taken.p20, taken.rounds)
                yield Target(name, "rate of a copy", n, least, shares, "share", judged)
            wanted = {"torch.compile": against_compile(row["op"], figures["dtype"])}
            if row["op"] in OPS_AGAINST_EAGER:
                wanted["eager"] = OPS_AGAINST_EAGER[row["op"]]
            for baseline, ratio in wanted.items():
                yield Target(name, baseline, n, ratio, Timing(**row["ratios"][baseline]), judged=judged)
