"""The baselines made of eager PyTorch, one of them in a CUDA graph. `torch.compile` is in inductor.py.

E32   eager float32, NCHW, coefficients gathered per sample in every step: what tutorials do
E16   eager bfloat16 weights and activations, channels_last, float32 state, coefficients looked up once per step
G16   E16 with BatchNorm folded, the whole step in one CUDA graph
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from candidate import Candidate, Problem
from packages import Missing
from plain import Plain, cast
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]


class StepGraph:
    """A step captured in a CUDA graph: x and row lie at fixed addresses, and the row moves on by itself."""

    def __init__(self, step: Step, problem: Problem, guard: Callable[[], AbstractContextManager[Any]]) -> None:
        self.x, self.row, self.guard = problem.x.clone(), problem.rows[:1].clone(), guard
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with guard(), torch.cuda.stream(beside):
            for _ in range(3):
                step(self.x, self.row)
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with guard(), torch.cuda.graph(self.graph):
            self.x.copy_(step(self.x, self.row))
            self.row.add_(1)

    def load(self, x: Tensor, row: Tensor) -> None:
        """The next replay is the step of `row` on x."""
        with self.guard():
            self.x.copy_(x)
            self.row.copy_(row)


class Baseline(Candidate):
    """A step (x, row int64 [1]) -> the next x, run in a Python loop, or replayed where `make` has captured it."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.captured: StepGraph | None = None

    def prepare(self, problem: Problem) -> None:
        self.problem = problem
        self.step = self.make(self.network(problem))

    def network(self, problem: Problem) -> Plain:
        """The plain network in this baseline's dtype; half precision is channels_last."""
        return cast(problem.plain(), self.dtype)

    @abstractmethod
    def make(self, network: Plain) -> Step:
        """The reverse step around this network, in this baseline's own way."""

    def guard(self) -> AbstractContextManager[Any]:
        return torch.inference_mode()

    def predict(self, t: int, x: Tensor | None = None) -> Tensor:
        x, row = self.problem.x if x is None else x, self.problem.look_at(t)
        if self.captured is not None:
            self.captured.load(x, row)
            self.captured.graph.replay()
            return self.captured.x.clone()
        with self.guard():
            return self.step(x, row).clone()

    def run(self, steps: int) -> None:
        problem, first = self.problem, self.problem.T - steps
        if self.captured is not None:
            self.captured.load(problem.x, problem.rows[first : first + 1])
            for _ in range(steps):
                self.captured.graph.replay()
            return
        with self.guard():
            x = problem.x
            for row in range(first, problem.T):
                x = self.step(x, problem.rows[row : row + 1])


class Eager32(Baseline):
    id = "E32"
    what = "eager float32"
    flags = "float32, NCHW, inference_mode, t and coefficients gathered per sample, randn_like"

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def make(self, network: Plain) -> Step:
        problem = self.problem
        n = problem.case.n

        def step(x: Tensor, row: Tensor) -> Tensor:
            c2, c3, s = (c.view(-1, 1, 1, 1) for c in problem.coefficients[row.expand(n)].unbind(1))
            m = network(x, problem.t_of_row[row.expand(n)], problem.labels)
            result: Tensor = c2 * x + c3 * m + s * torch.randn_like(x)
            return result

        return step


class Eager16(Baseline):
    id = "E16"
    what = "eager bfloat16, channels_last"
    flags = (
        "module.to(bfloat16, memory_format=channels_last), no autocast, float32 state, inference_mode, "
        "coefficients hoisted, randn_like"
    )

    def __init__(self) -> None:
        super().__init__(torch.bfloat16)

    def make(self, network: Plain) -> Step:
        return whole_step(network, self.problem, self.dtype)


def whole_step(network: Plain, problem: Problem, dtype: torch.dtype) -> Step:
    """Network and update as one function of (x, row), with everything else in it fixed."""
    n, labels = problem.case.n, problem.labels
    t_of_row, coefficients = problem.t_of_row, problem.coefficients
    layout = torch.contiguous_format if dtype == torch.float32 else torch.channels_last

    def step(x: Tensor, row: Tensor) -> Tensor:
        t = t_of_row.index_select(0, row).expand(n)
        m = network(x.to(dtype, memory_format=layout), t, labels)
        c2, c3, s = coefficients.index_select(0, row)[0].unbind()
        result: Tensor = c2 * x + c3 * m.float() + s * torch.randn_like(x)
        return result

    return step


class Graph16(Eager16):
    id = "G16"
    what = "eager bfloat16 in a CUDA graph"
    flags = "E16, network, update and randn_like in one torch.cuda.CUDAGraph"

    def prepare(self, problem: Problem) -> None:
        if problem.device.type != "cuda":
            raise Missing("needs an NVIDIA GPU")
        super().prepare(problem)

    def network(self, problem: Problem) -> Plain:
        return cast(problem.plain().folded(), self.dtype)

    def make(self, network: Plain) -> Step:
        step = super().make(network)
        self.flags = f"{type(self).flags}; {network.folds or 'nothing to fold'}"
        self.captured = StepGraph(step, self.problem, self.guard)
        return step
