"""One call of `Sampler.sample` or `Sampler.stream`, from the first buffer to the last check."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .graphs import Advance, Captured, Loops, portions, stride_of
from .inputs import check_noise
from .loop import Layout, Loop, Plan, Start
from .model import eval_mode

RowNoise = Callable[[int, int], Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One finished row of `Sampler.stream`.

    row, t: the row of the step table and the timestep that it left.
    x: float32 (n, *shape), the state that it arrived at. x0: float32 (n, *shape), the estimate of the data that it used
    on the way, after clipping. Both are copies, the caller's own. seed: None where a generator draws. looks_back:
    whether the next row needs x0 too.
    """

    row: int
    t: int
    x: Tensor
    x0: Tensor
    seed: int | None
    first_sample: int
    looks_back: bool = False

    def state(self) -> dict[str, Any]:
        """What `sample` and `stream` need to go on from here, bit for bit: `sampler.sample(n, **step.state())`.

        Labels, guidance, given noise and generators (as they are now) are the caller's and are passed again.
        """
        state: dict[str, Any] = {"x": self.x.clone(), "start": self.row + 1}
        if self.seed is not None:
            state |= {"seed": self.seed, "first_sample": self.first_sample}
        if self.looks_back:
            state["x0_prev"] = self.x0.clone()
        return state


class Run:
    """The rows from `begin.start` on, under one layout. Everything but `stream` works inside `open()` only.

    noise: what gives the normals of a row; draw: what draws the next ones from a generator, for x_T and every row.
    """

    def __init__(
        self,
        plan: Plan,
        layout: Layout,
        begin: Start,
        noise: RowNoise | None,
        draw: Callable[[], Tensor] | None,
        loops: Loops,
        deterministic: bool,
    ) -> None:
        self.plan, self.layout, self.begin = plan, layout, begin
        self._noise = noise if draw is None else lambda row, t: draw()
        self._draw, self._loops, self._deterministic = draw, loops, deterministic
        self._loop: Loop
        self._advance: Advance

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Takes a loop and loads it; gives it back at the end."""
        with self.running():
            self._loop, self._advance = self._loops.take(self.plan, self.layout)
        try:
            with self.running():
                begin = self.begin
                if self._draw is not None and begin.x is None:
                    begin = dataclasses.replace(begin, x=self._draw().float())
                self._loop.load(begin)
            yield
        finally:
            self._loops.give(self._loop, self._advance)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """No gradients, the model in eval mode, and with `deterministic` no choosing among algorithms by trial."""
        cudnn = torch.backends.cudnn
        before = cudnn.benchmark, cudnn.deterministic
        try:
            if self._deterministic:
                cudnn.benchmark, cudnn.deterministic = False, True
            with torch.inference_mode(), eval_mode(self.plan.model):
                yield
        finally:
            cudnn.benchmark, cudnn.deterministic = before

    def stream(self) -> Iterator[Step]:
        """The whole run, a `Step` after each row. Between rows the model's mode and torch's flags are the caller's."""
        if not self.layout.n:
            return
        with self.open():
            for row in range(self.begin.start, len(self.plan.steps)):
                with self.running():
                    if self.plan.fused is not None:  # the caller had the model in hand meanwhile
                        self.plan.fused.refresh_if_changed(full=False)
                    self.advance(row)
                    self.check()
                t = int(self.plan.steps.timesteps[row])
                seed = self.begin.seed if self._draw is None else None
                looks_back = self.plan.looks_back and row + 1 < len(self.plan.steps)
                yield Step(row, t, self.x(), self.x0(), seed, self.begin.first_sample, looks_back)

    def portions(self, shown: bool) -> Iterator[tuple[int, int]]:
        """(row, rows) of every call of `advance`: several rows at a time where the host has nothing to do in between.

        shown: whether a progress bar is to be moved after each row.
        """
        busy = shown or self._noise is not None
        return portions(self.begin.start, len(self.plan.steps), 1 if busy else stride_of(self._advance))

    def advance(self, row: int, rows: int = 1) -> None:
        """So many steps. `row` is what the device's own counter stands at; the host needs it for given noise only."""
        steps, buffer = self.plan.steps, self._loop.noise
        if self._noise is not None and buffer is not None and steps.coefficients[row, 6] != 0.0:
            z = self._noise(row, int(steps.timesteps[row]))
            buffer.copy_(check_noise(z, self.layout.n, self.layout.shape, self.plan.device))
        if rows > 1 and isinstance(self._advance, Captured):
            self._advance(rows)
            return
        for _ in range(rows):
            self._advance()

    def check(self) -> None:
        """Waits for the device; RuntimeError naming the first row that made a value that is not finite."""
        row = int(self._loop.bad_row)
        if row >= 0:
            t = int(self.plan.steps.timesteps[row])
            raise RuntimeError(
                f"a sample stopped being finite in row {row} (t = {t}): the model's output was NaN or infinite there, "
                "or so large that the step overflowed; check its weights, its dtype (float16 ends at 65504) and noise="
            )

    def x(self) -> Tensor:
        """A copy of the state, float32 (n, *shape), that is the caller's own."""
        return _own(self._loop.x)

    def x0(self) -> Tensor:
        """A copy of the last row's estimate of the data, of a run whose layout has x0."""
        assert self._loop.x0 is not None
        return _own(self._loop.x0)


def _own(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):  # an ordinary tensor, which may take part in autograd
        return tensor.clone()
