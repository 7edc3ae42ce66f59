"""Host time of `scheduler.step` for one small image on the CPU: the drop-in schedulers beside diffusers' own.

A turn is a whole run as diffusers' pipelines do it: `set_timesteps`, t taken by iterating `scheduler.timesteps`, the
next image is the step's `prev_sample`. The network is left out: its prediction is always the same tensor. Before
anything is timed both make images with equal generators, which must agree within what float32 tables explain.
"""

from __future__ import annotations

import functools
from typing import Any

import targets
import torch
from machine import progress
from packages import Missing, package
from results import host_ratio
from timing import Timing, interleaved_rounds
from torch import Tensor

SHAPE = (1, 3, 32, 32)
CLOSE = 2e-3  # largest difference of images in [-1, 1]

# class -> (steps of a run, keywords: those of google/ddpm-cifar10-32)
SCHEDULERS: dict[str, tuple[int, dict[str, Any]]] = {
    "DDPMScheduler": (1000, {"variance_type": "fixed_large", "clip_sample": True}),
    "DDIMScheduler": (50, {"clip_sample": True}),
}
MODULES = {"ours": "ddpm_fast.interop.diffusers", "diffusers": "diffusers"}


def run(scheduler: Any, steps: int, x: Tensor, m: Tensor, generator: torch.Generator) -> Tensor:
    """What a pipeline does beside calling its network, from x_T to the images."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(m, t, x, generator=generator).prev_sample
    return x


def measure(name: str, budget: float) -> dict[str, Any]:
    """The row of one scheduler; seconds are of a step. Raises Missing."""
    steps, options = SCHEDULERS[name]
    made = {who: getattr(package(module), name)(**options) for who, module in MODULES.items()}

    def go(scheduler: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return run(scheduler, steps, x, m, generator)

    with torch.no_grad():
        x, m = torch.randn(SHAPE), torch.randn(SHAPE)
        difference = float((go(made["ours"]) - go(made["diffusers"])).abs().max())
        if not difference <= CLOSE:
            return {"status": "wrong", "reason": f"images differ by {difference:.2g} after {steps} steps"}
        runs = {who: functools.partial(go, scheduler) for who, scheduler in made.items()}
        rounds = interleaved_rounds(runs, torch.device("cpu"), budget=budget)
    rounds = {who: [seconds / steps for seconds in times] for who, times in rounds.items()}
    return {"status": "ok", "difference": difference, "rounds_s": rounds}


def run_host(budget: float = 2.0) -> list[dict[str, Any]]:
    """A row for each scheduler, as a result file has it. budget: seconds for each scheduler."""
    rows = []
    for name, (steps, options) in SCHEDULERS.items():
        progress(f"host time of {name}.step")
        keywords = ", ".join(f"{key}={value!r}" for key, value in options.items())
        what = f"{name}({keywords}), {steps} steps, {'x'.join(map(str, SHAPE))}, float32, torch's generator"
        row: dict[str, Any] = {"scheduler": name, "what": what, "reason": "", "rounds_s": {}}
        try:
            row |= measure(name, budget)
        except Missing as missing:
            row |= {"status": "missing", "reason": str(missing)}
        rows.append(row)
    return rows


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The rows for a terminal."""
    found = ["host time of scheduler.step, one image of 3x32x32 on the CPU"]
    for row in rows:
        ratio = host_ratio(row)
        if ratio is None:
            found.append(f"  {row['scheduler']:<14} {row['status']}: {row['reason']}")
            continue
        ours, theirs = (Timing.of(row["rounds_s"][who]).median * 1e6 for who in MODULES)
        found.append(
            f"  {row['scheduler']:<14} ours {ours:.1f} us, diffusers {theirs:.1f} us: {ratio.median:.2f}x "
            f"({ratio.p20:.2f} - {ratio.p80:.2f}), wanted {targets.HOST}x"
        )
    return found
