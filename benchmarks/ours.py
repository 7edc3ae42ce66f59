"""What is ours in the benchmark: `ddpm_fast.Sampler`, with and without the fused network plan.

    F16  fused plan, bfloat16      S16  no plan: the network as it is, bfloat16, channels_last
    F32  fused plan, float32       S32  the same, float32

A turn is one call of `Sampler.sample` over the last steps of the schedule. What such a call costs however many steps it
does (arguments checked, buffers made, weights looked at for changes) is measured beside it, by a call of no steps, and
taken off: a user pays it once per 1000 steps. `fixed` has it.
"""

from __future__ import annotations

import copy
import time
from typing import Any

import torch
from candidate import Candidate, Problem
from packages import Missing
from plain import cast
from torch import Tensor

from ddpm_fast import Sampler


class Ours(Candidate):
    """A Sampler over the whole schedule."""

    def __init__(self, dtype: torch.dtype, *, fused: bool) -> None:
        self.dtype, self.fused = dtype, fused
        short = {torch.bfloat16: "16", torch.float32: "32"}[dtype]
        self.id = ("F" if fused else "S") + short
        name = str(dtype).removeprefix("torch.")
        self.what = f"ddpm_fast.Sampler, {'fused plan' if fused else 'no plan'}, {name}"
        network = "" if fused or dtype == torch.float32 else f".to({name}, memory_format=channels_last)"
        self.flags = f"Sampler(unet{network}, Schedule.linear(1000), fused={fused}, dtype={name})"
        self.fixed: list[float] = []

    def prepare(self, problem: Problem) -> None:
        self.problem = problem
        unet: Any = problem.unet
        if not self.fused and self.dtype != torch.float32:
            unet = cast(copy.deepcopy(unet), self.dtype)
        self.sampler = Sampler(unet, problem.schedule, fused=self.fused, dtype=self.dtype)
        if self.fused and not self.sampler.fused:
            raise Missing(f"no fused plan for this model: {self.sampler.not_fused_because}")
        self._sample(1)

    def _sample(self, steps: int) -> Tensor:
        problem = self.problem
        images: Tensor = self.sampler.sample(
            problem.case.n,
            problem.case.shape,
            seed=0,
            labels=problem.labels,
            x=problem.x,
            start=problem.T - steps,
            progress=False,
        )
        return images

    def predict(self, t: int, x: Tensor | None = None) -> Tensor:
        """From x0 = a x - b m, the estimate of the step that leaves t; at large t b is large and no digits are lost."""
        problem = self.problem
        x = problem.x if x is None else x
        row = problem.T - 1 - t
        step = next(
            self.sampler.stream(problem.case.n, problem.case.shape, seed=0, labels=problem.labels, x=x, start=row)
        )
        a, b = self.sampler.choices.steps.coefficients[row, :2]
        m: Tensor = (float(a) * x.double() - step.x0.double()) / float(b)
        return m.float()

    def run(self, steps: int) -> None:
        self._sample(steps)

    def seconds(self, steps: int) -> float:
        start = time.perf_counter()
        self._sample(0)
        begun = time.perf_counter()
        self._sample(steps)  # waits for the device by itself: it looks whether every value is finite
        done = time.perf_counter()
        self.fixed.append(begun - start)
        # The least of all: a call of no steps that was held up by others must not make the steps look shorter.
        return (done - begun - min(self.fixed)) / steps

    def layers(self) -> str:
        """Where a step's time goes, layer by layer, as the plan tells it; empty without one."""
        plans = self.sampler.compiled
        n, (_, h, w) = self.problem.case.n, self.problem.case.shape
        return "" if plans is None else plans.describe(n, h, w)
