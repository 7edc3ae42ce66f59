"""The state of one sampling run on its device, and the step that advances it without the host.

`Loop.step` is network, `ddpm_step`, row += 1. It reads and writes only the tensors made in `__init__`, at addresses
that never change, and takes nothing from the host; so it can run eagerly or be captured once in a CUDA graph and
replayed. Between replays the host may write to these static buffers: x, row, rng, guidance, labels, noise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..inference import Compiled
from ..noise import STREAM_X_T, make_rng
from ..tables.steps import COLUMNS, StepTable
from .model import Model, prediction
from .thresholding import dynamic_threshold


@dataclasses.dataclass(frozen=True)
class Plan:
    """What stays the same for every run of one Sampler on one device.

    steps: the step table, on the device. t_model: [steps], what the network is told as t, int64, or float32 if
    rescaled. dtype: what the network is fed. thresholding: (ratio, max_value) of dynamic thresholding, or None.
    variance: "learned" or "learned_range" where the network returns as many channels again that say it, else None;
    method "ddpm" uses them, other methods do not.
    fused: the plan of the network that runs in its place, made for the timesteps t_model; it is fed float32.
    self_condition: the network is also told the x0 of the row before, zeros where there was none.
    """

    model: Model
    steps: StepTable
    t_model: Tensor
    dtype: torch.dtype
    thresholding: tuple[float, float] | None
    fused: Compiled | None = None
    variance: str | None = None
    method: str = "ddpm"
    self_condition: bool = False

    @property
    def looks_back(self) -> bool:
        """Whether a row needs the x0 of the row before it."""
        return self.steps.needs_history or self.self_condition

    @property
    def device(self) -> torch.device:
        return self.t_model.device


@dataclasses.dataclass(frozen=True)
class Layout:
    """What decides the shapes of a run's buffers, and therefore whether a captured step can serve it.

    n samples of `shape`; label: (shape, dtype) of one label, None without labels; guided: two halves per pass;
    noise, x0: whether noise is given and x0 is wanted. The network always sees `chunk` samples at a time, and sample i
    of the batch takes place (offset + i) % chunk among them.
    """

    n: int
    shape: tuple[int, ...]
    label: tuple[tuple[int, ...], torch.dtype] | None = None
    guided: bool = False
    noise: bool = False
    x0: bool = False
    chunk: int = 0
    offset: int = 0

    def chunks(self) -> list[tuple[int, int, int]]:
        """(first sample, one past the last, place of the first) of every pass through the network."""
        result, first, place = [], 0, self.offset % self.chunk
        while first < self.n:
            last = min(first + self.chunk - place, self.n)
            result.append((first, last, place))
            first, place = last, 0
        return result


@dataclasses.dataclass(frozen=True)
class Start:
    """What differs from run to run under one Layout, written into the static buffers by `Loop.load`.

    x: the state before row `start`, None to draw x_T. x0_prev: the x0 of the row before `start`, for multistep methods
    and self-conditioned networks.
    null: one label meaning "none", when guided.
    """

    seed: int
    first_sample: int = 0
    start: int = 0
    x: Tensor | None = None
    x0_prev: Tensor | None = None
    labels: Tensor | None = None
    null: Tensor | None = None
    guidance: float = 1.0


class Loop:
    """Static buffers for one Layout under one Plan: `load` a run, then `step` once per row."""

    def __init__(self, plan: Plan, layout: Layout) -> None:
        self.plan, self.layout = plan, layout
        device, n, shape = plan.device, layout.n, layout.shape
        halves, chunk = 1 + layout.guided, layout.chunk
        self.chunks = layout.chunks()

        self.x = torch.zeros(n, *shape, dtype=torch.float32, device=device)
        # One number for every sample, all the same: a fused plan reads its own, and one addition moves all on.
        self.rows = torch.zeros(max(n, 1), dtype=torch.int64, device=device)
        self.row = self.rows[:1]
        self.rng = torch.zeros(2, dtype=torch.int64, device=device)
        self.bad_row = torch.full((1,), -1, dtype=torch.int32, device=device)
        self.noise = torch.zeros_like(self.x) if layout.noise else None
        # What the next row reads as x0_prev is what this one writes as x0: one buffer, in place.
        self.history = plan.steps.needs_history
        self.x0 = torch.zeros_like(self.x) if layout.x0 or plan.looks_back else None
        # A method that never adds noise runs a kernel that has none of it.
        self.draws = not layout.noise and bool(plan.steps.coefficients[:, COLUMNS.index("s")].any())
        self.guidance = torch.ones(1, dtype=torch.float32, device=device) if layout.guided else None
        self.t = torch.zeros(halves * chunk, dtype=plan.t_model.dtype, device=device)

        several = len(self.chunks) > 1
        self.parts = 1 if plan.variance is None else 2
        wide = (self.parts * shape[0], *shape[1:])
        self.m = torch.zeros(halves, n, *wide, dtype=torch.float32, device=device) if several else None

        whole = not layout.guided and self.chunks == [(0, n, 0)] and chunk == n
        self.feeds_x = whole and plan.dtype == torch.float32
        # In half precision ddpm_step writes the network's next input itself; float64 it cannot write.
        self.step_feeds = whole and plan.dtype in (torch.bfloat16, torch.float16)
        self.fed = None if self.feeds_x else torch.zeros(halves, chunk, *shape, dtype=plan.dtype, device=device)
        # The condition too is read where it is, in x0, unless it has to be in another dtype, place or number.
        self.condition = torch.zeros_like(self.fed) if plan.self_condition and self.fed is not None else None
        # A fused plan's own buffers live as long as somebody holds it; a captured step reads and writes them.
        self.held = None if plan.fused is None else plan.fused.prepare(halves * chunk, shape)
        self.fused_m = None
        if plan.fused is not None:
            size = (halves * chunk, plan.fused.out_channels, *shape[1:])
            self.fused_m = torch.zeros(size, dtype=torch.float32, device=device)
        # Whether the plan's last layer and ddpm_step are one pass, which draws its own noise and knows one m only.
        plain_step = whole and not layout.noise and plan.thresholding is None
        plain_step = plain_step and not plan.looks_back and self.parts == 1
        self.one_pass = plain_step and self.held is not None and self.held.step is not None
        self.labels: list[Tensor] = []
        if layout.label is not None:
            row_shape, dtype = layout.label
            size = (halves, chunk, *row_shape)
            self.labels = [torch.zeros(size, dtype=dtype, device=device) for _ in self.chunks]
        self.one_call = self._one_call() if plain_step and not self.one_pass else None

    def _one_call(self) -> Callable[[], bool] | None:
        """The whole step as one call, where the fused plan has that."""
        fused, m = self.plan.fused, self.fused_m
        if fused is None or m is None:
            return None
        labels, steps = self.labels[0][0] if self.labels else None, (self.plan.steps.table, self.plan.steps.t_of_row)
        return fused.whole_step(self.x, m, self.row, labels, steps, self.rng, self.bad_row, self.x0)

    def load(self, run: Start) -> None:
        """Write a run's values into the buffers; the next step is that of row `run.start`."""
        self.rows.fill_(run.start)
        self.bad_row.fill_(-1)
        self.rng.copy_(make_rng(run.seed, run.first_sample))
        if self.guidance is not None:
            self.guidance.fill_(run.guidance)
        if self.plan.looks_back and self.x0 is not None:
            if run.x0_prev is None:
                self.x0.zero_()  # row 0 is conditioned on it, or multiplies it by 0, which an old NaN would survive
            else:
                self.x0.copy_(run.x0_prev)
        if run.x is None:
            ops.normal(self.layout.n, self.layout.shape, rng=self.rng, stream=STREAM_X_T, out=self.x)
        else:
            self.x.copy_(run.x)
        if self.step_feeds and self.fed is not None:
            self.fed[0].copy_(self.x)
        if run.labels is not None:
            for buffer, (first, last, place) in zip(self.labels, self.chunks, strict=True):
                buffer[0] = run.labels[first]  # padding needs some label that exists
                buffer[0, place : place + last - first] = run.labels[first:last]
                if run.null is not None:
                    buffer[1] = run.null

    def step(self) -> None:
        """Advance every sample by the row that `self.row` names, and move `self.row` on."""
        plan = self.plan
        if self.one_call is not None:
            if self.one_call():
                return
            self.one_call = self._one_call()  # the weights moved between two rows
        if self.one_pass and plan.fused is not None:
            labels, steps = self.labels[0][0] if self.labels else None, (plan.steps.table, plan.steps.t_of_row)
            plan.fused.step_at_rows(self.x, self.rows, labels, steps, self.rng, self.bad_row, self.x0)
            self.rows.add_(1)
            return
        if plan.fused is None:
            self.t.copy_(plan.t_model.index_select(0, self.row))  # one number for all samples
        m, uncond = self._predict(0) if self.m is None else self._predict_in_chunks(self.m)
        logvar = None
        if plan.variance is not None:
            m, v = m.chunk(2, dim=1)
            logvar = v if plan.method == "ddpm" else None
            uncond = None if uncond is None else uncond.chunk(2, dim=1)[0]
        ops.ddpm_step(
            self.x,
            m,
            plan.steps.table,
            plan.steps.t_of_row,
            self.row,
            self.rng if self.draws else None,
            noise=self.noise,
            m_uncond=uncond,
            guidance=self.guidance,
            x0_prev=self.x0 if self.history else None,
            logvar=logvar,
            logvar_range=None if logvar is None else plan.steps.logvar_range,
            threshold=self._threshold(m, uncond),
            x0_out=self.x0,
            copy_out=self.fed[0] if self.step_feeds and self.fed is not None else None,
            bad_row=self.bad_row,
        )
        self.rows.add_(1)

    def _predict(self, i: int) -> tuple[Tensor, Tensor | None]:
        """The network's output for the samples of chunk i, with their labels, and when guided without."""
        first, last, place = self.chunks[i]
        inside = slice(place, place + last - first)
        if self.fed is None:
            fed = self.x
        else:
            if not self.step_feeds:
                if last - first < self.layout.chunk:
                    self.fed.zero_()
                self.fed[:, inside] = self.x[first:last]
            fed = self.fed.flatten(0, 1)
        labels = (self.labels[i].flatten(0, 1),) if self.labels else ()
        condition = self._condition(first, last, inside)
        extra = {} if condition is None else {"x_self_cond": condition}
        if self.plan.fused is not None:
            m = self.plan.fused.at_rows(fed, self.row, labels[0] if labels else None, self.fused_m, **extra)
        else:
            m = self.plan.model(fed, self.t, *labels, **extra)
        m = prediction(m, fed, self.parts)
        if any(_same_memory(m, given) for given in (fed, *extra.values())):
            m = m.clone()  # the network gave an input back, which ddpm_step is about to write to
        if self.layout.guided:
            labelled, unlabelled = m.chunk(2)
            return labelled[inside], unlabelled[inside]
        return m[inside], None

    def _condition(self, first: int, last: int, inside: slice) -> Tensor | None:
        """What a self-conditioned network is told beside the samples first .. last - 1: their x0 of the row before."""
        if not self.plan.self_condition:
            return None
        assert self.x0 is not None
        if self.condition is None:
            return self.x0
        if last - first < self.layout.chunk:
            self.condition.zero_()
        self.condition[:, inside] = self.x0[first:last]  # guided: the same for both halves
        return self.condition.flatten(0, 1)

    def _predict_in_chunks(self, m: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same for all samples, copied together at once: a network may return one and the same buffer each time."""
        for i, (first, last, _) in enumerate(self.chunks):
            for half, part in zip(m, self._predict(i), strict=False):
                half[first:last] = part
        return m[0], m[1] if self.layout.guided else None

    def _threshold(self, m: Tensor, uncond: Tensor | None) -> Tensor | None:
        """The bound of each sample, where the sampler was asked for dynamic thresholding."""
        if self.plan.thresholding is None:
            return None
        ratio, max_value = self.plan.thresholding
        a, b = self.plan.steps.table.index_select(0, self.row)[0, :2]
        m = m.float()
        if uncond is not None and self.guidance is not None:
            m = uncond.float() + self.guidance * (m - uncond.float())
        return dynamic_threshold(a * self.x - b * m, ratio, max_value)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
