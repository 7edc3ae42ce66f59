"""What the benchmark compares: candidates that do the same sampling step of the same network, each checked first.

A step is m = network(x, t); x = c2 x + c3 m + s z, z drawn afresh (Ho et al. 2020, Algorithm 2), x float32 unless the
candidate says otherwise. `predict` returns the m of the very step that is timed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from networks import NETWORKS, Network
from plain import Plain
from torch import Tensor

from ddpm_fast import Schedule

WRONG = 0.2  # relative error of m from which on an output is called wrong and gets no speed
CHECKED_AT = (999, 500)  # timesteps
CHECKED_IMAGES = 8


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, an image size and a batch: what a table row of the benchmark is about.

    network: one of NETWORKS. options: keywords of its class.
    """

    name: str
    n: int
    shape: tuple[int, int, int] = (3, 32, 32)
    network: str = "tutorial"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> Network:
        """The network: float32, in eval mode, on the CPU."""
        return NETWORKS[self.network].make(self.shape, **self.options)


class Problem:
    """A case on a device, and what all candidates share: weights, start state, labels, coefficients.

    table: float32 [T + 1, 8], the step table and one row more, (0, 0, 0, 0, 1, 0, 0, inf), whose update gives m itself:
    so a check sees the output of the network through the step that is timed. coefficients: its columns c2, c3, s.
    t_of_row: int64 [T + 1]; the last one is set by `look_at`.
    """

    def __init__(self, case: Case, device: torch.device, unet: Network | None = None) -> None:
        self.case, self.device = case, device
        self.unet = (case.build() if unet is None else unet).to(device)
        self.schedule = Schedule.linear(1000)
        steps = self.schedule.step_table()
        self.T = len(steps)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(case.n, *case.shape, generator=generator).to(device)
        self.labels = None
        classes = getattr(self.unet, "num_classes", None)
        if classes is not None:
            self.labels = (torch.arange(case.n) % classes).to(device)
        look = torch.tensor([[0, 0, 0, 0, 1, 0, 0, math.inf]])
        self.table = torch.cat([steps.table, look]).to(device)
        self.coefficients = self.table[:, [3, 4, 6]].contiguous()
        self.t_of_row = torch.cat([steps.t_of_row, steps.t_of_row[-1:]]).long().to(device)
        self.rows = torch.arange(self.T + 1, device=device)
        self._expected: dict[int, Tensor] = {}

    def plain(self) -> Plain:
        """A copy of the network for a baseline, in eval mode. Raises Missing where it is another package's."""
        return NETWORKS[self.case.network].plain(self.unet).eval()

    def look_at(self, t: int) -> Tensor:
        """The row, int64 [1], that gives m at timestep t."""
        self.t_of_row[-1] = t
        return self.rows[-1:]

    def picked(self) -> Tensor:
        """The images that a check compares: all of a small batch, else some of both ends of it."""
        n, half = self.case.n, CHECKED_IMAGES // 2
        return torch.arange(n) if n <= 2 * half else torch.cat([torch.arange(half), torch.arange(n - half, n)])

    def expected(self, t: int) -> Tensor:
        """m of the picked images at timestep t in float64, on the CPU."""
        if t not in self._expected:
            picked = self.picked()
            network = self.plain().double().cpu()
            labels = None if self.labels is None else self.labels.cpu()[picked]
            with torch.no_grad():
                x = self.x.cpu()[picked].double()
                self._expected[t] = network(x, torch.full((len(picked),), t), labels)
        return self._expected[t]


class Candidate(ABC):
    """One way to do the step. `id` names it in tables, `what` in words, `flags` exactly; dtype: of the network."""

    id: str
    what: str
    flags: str
    dtype: torch.dtype
    notes: str = ""

    @abstractmethod
    def prepare(self, problem: Problem) -> None:
        """Compile or build everything. Raises Missing where this cannot run."""

    @abstractmethod
    def predict(self, t: int, x: Tensor | None = None) -> Tensor:
        """m, float32 (n, C, H, W), for x (default: the problem's) at timestep t."""

    @abstractmethod
    def run(self, steps: int) -> None:
        """The last `steps` of the T reverse steps, in order; may return before the device has done them."""

    def seconds(self, steps: int) -> float:
        """Wall-clock seconds of one step, out of `steps` in a row."""
        start = time.perf_counter()
        self.run(steps)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps


def error_bound(dtype: torch.dtype) -> float:
    """Relative error of m that is as it should be: what rounding of weights and activations explains.

    Float32 with TF32 convolutions, PyTorch's default on a GPU, is near 1e-3.
    """
    if dtype == torch.float32:
        return 5e-3 if torch.cuda.is_available() else 1e-4
    return 3e-2


def check(candidate: Candidate, problem: Problem) -> tuple[float, str]:
    """(relative error of m, verdict) against float64: "ok", "inaccurate" (timed, and marked) or "wrong" (not timed)."""
    error = 0.0
    for t in CHECKED_AT:
        expected = problem.expected(t)
        got = candidate.predict(t).detach().cpu()[problem.picked()].double()
        norm = float((got - expected).norm() / expected.norm())
        error = max(error, norm) if math.isfinite(norm) and math.isfinite(error) else math.nan
    if not error <= WRONG:  # NaN is wrong, too
        return error, "wrong"
    return error, "ok" if error <= error_bound(candidate.dtype) else "inaccurate"
