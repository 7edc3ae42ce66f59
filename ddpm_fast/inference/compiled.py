"""`Compiled`: a model read into a network, and a plan for every batch and image size that comes along."""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..backends import native as extension
from ..backends import resolve
from . import native
from .arguments import check_call, check_shape, in_range
from .candidate import Packs
from .known import read
from .module import Modules
from .network import Network
from .plan import Plan
from .planner import make
from .times import embed, embeddings, finish, table
from .watch import Watch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEPT_PLANS = 8
TABLED = 1000  # integer timesteps are tabulated by so many
MOST_TABLED = 4000


class Compiled:
    """A fused inference plan of a model: call it as `m = compiled(x, t)`, `compiled(x, t, labels)` or, where it is
    self-conditioned, `compiled(x, t, x_self_cond=x0)`.

    Made by `ddpm_fast.inference.compile`, which says what the arguments mean. The model stays the caller's: it is read,
    never written to, and its weights are watched (see `refresh`). Results carry no gradients. Calls from several
    threads take turns; on a GPU they have to be on one stream, for the buffers of a plan are shared.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
        timesteps: Tensor | None = None,
        deterministic: bool = False,
        verbose: bool = False,
    ) -> None:
        if dtype is None:
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        if dtype not in DTYPES:
            known = ", ".join(str(known) for known in DTYPES)
            raise ValueError(f"dtype must be one of {known}, got {dtype}; a fused plan computes in no other")
        if timesteps is not None and (timesteps.dim() != 1 or timesteps.dtype == torch.bool or timesteps.is_complex()):
            raise ValueError(f"timesteps must be a tensor [rows] of real numbers, got {tuple(timesteps.shape)}")
        self.model, self.dtype = model, dtype
        self.deterministic, self.verbose = deterministic, verbose
        self._timesteps = timesteps
        self._lock = threading.RLock()
        self._integers: Tensor | None = None  # the embeddings of t = 0, 1, 2, ... so far
        self._build()

    # -- what a Sampler asks ----------------------------------------------------------------------------------------

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self._network.image_channels

    @property
    def out_channels(self) -> int:
        """Channels of what is predicted: as many, or twice, where the model also predicts a variance."""
        return self._network.out_channels

    @property
    def self_condition(self) -> bool:
        """Whether calls take the x0 of the step before, as `x_self_cond`."""
        return self._network.self_condition

    @property
    def num_classes(self) -> int | None:
        """How many labels there are, "none" aside; None for an unconditional model."""
        classes, null = self._network.time.classes, self._network.time.null_label
        return classes if classes is None or null is None else classes - 1

    @property
    def null_label(self) -> int | None:
        """The label that means "none"; None for a model that has none."""
        return self._network.time.null_label

    @property
    def device(self) -> torch.device:
        """Where the model was when its weights were read."""
        return self._network.time.weight.device

    # -- running ------------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None = None, x_self_cond: Tensor | None = None) -> Tensor:
        """m = model(x, t, labels): float32 (N, C, H, W), contiguous.

        x: (N, C, H, W), any float dtype, on `device`. t: (N,), integer or floating. labels: (N,) int64 or int32.
        x_self_cond: in x's shape, any float dtype; None for zeros. Only for a model with `self_condition`.
        Raises ValueError for what the model itself would refuse, for a model in training mode, for x on another device
        and for x that requires a gradient.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad(), _no_autocast(self.device):
            self._look(full=False)
            check_call(self._network, x, labels, x_self_cond)
            if t.shape != x.shape[:1]:
                raise ValueError(f"t must have shape ({x.shape[0]},), one per image, got {tuple(t.shape)}")
            if t.dtype == torch.bool or t.is_complex():
                raise ValueError(f"t must be an integer or floating tensor, got {t.dtype}")
            out = torch.empty(self._out_shape(x), dtype=torch.float32, device=x.device)
            if not x.shape[0]:
                return out
            plan = self.plan(x.shape[0], x.shape[2], x.shape[3])
            if plan.module is not None:
                return out.copy_(plan.module(x, t, labels, x_self_cond))
            self._load(plan, labels)
            plan.run(plan.fed(x, x_self_cond), out, *self._embedded(plan, t.to(x.device)))
            return out

    def at_rows(
        self,
        x: Tensor,
        rows: Tensor,
        labels: Tensor | None = None,
        out: Tensor | None = None,
        x_self_cond: Tensor | None = None,
    ) -> Tensor:
        """The same at t = timesteps[rows], whose embeddings were computed beforehand. What a sampling step calls.

        rows: int64 [1] or [N], on `device`; nothing waits for it there. out: float32 (N, C, H, W) contiguous, written
        and returned. The weights are looked at by `refresh_if_changed`, which the caller calls once per run.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad(), _no_autocast(self.device):
            check_call(self._network, x, labels, x_self_cond)
            table, timesteps = self._check_rows(x, rows)
            shape = self._out_shape(x)
            if out is None:
                out = torch.empty(shape, dtype=torch.float32, device=x.device)
            elif out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous() or _same(out, x):
                raise ValueError(f"out must be float32 {shape}, contiguous and not x, got {_what(out)}")
            if not x.shape[0]:
                return out
            plan = self.plan(x.shape[0], x.shape[2], x.shape[3])
            plan.rows.copy_(rows)
            if plan.module is not None:
                return out.copy_(plan.module(x, timesteps.index_select(0, plan.rows), labels, x_self_cond))
            self._load(plan, labels)
            plan.run(plan.fed(x, x_self_cond), out, *self._at_rows(plan, table, plan.rows))
            return out

    def step_at_rows(
        self,
        x: Tensor,
        rows: Tensor,
        labels: Tensor | None,
        steps: tuple[Tensor, Tensor],
        rng: Tensor,
        bad_row: Tensor,
        x0_out: Tensor | None = None,
    ) -> None:
        """ops.ddpm_step(x, at_rows(x, rows, labels), *steps, rows, rng, bad_row=..., x0_out=...) with the last layer in
        the same pass. For plans whose `step` is not None; x: float32, contiguous, changed in place. rows: int64 [1], or
        [N] of the same number, which the plan then reads where it is: a launch less.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad(), _no_autocast(self.device):
            check_call(self._network, x, labels)
            table, _ = self._check_rows(x, rows)
            plan = self.plan(x.shape[0], x.shape[2], x.shape[3])
            assert plan.step is not None
            if len(rows) != plan.n:
                plan.rows.copy_(rows)
            self._load(plan, labels)
            plan.run_all_but_last(x, *self._at_rows(plan, table, rows if len(rows) == plan.n else plan.rows))
            plan.step(x, *steps, rows[:1], rng, bad_row, x0_out)

    def whole_step(
        self,
        x: Tensor,
        m: Tensor,
        row: Tensor,
        labels: Tensor | None,
        steps: tuple[Tensor, Tensor],
        rng: Tensor,
        bad_row: Tensor,
        x0_out: Tensor | None = None,
    ) -> Callable[[], bool] | None:
        """at_rows, ops.ddpm_step and row += 1 on these static tensors as one call, where a plan on a CPU can do that.

        x, m: float32, contiguous. row: int64 [1]. labels: int64 [N] or None. Returns None where it cannot, else what
        does one step and returns True, or returns False and does nothing once the plan was made anew.
        """
        if self.device.type != "cpu" or resolve("ddpm_step", x) is not extension.ddpm_step:
            return None
        check_call(self._network, x, labels)
        table, _ = self._check_rows(x, row)
        plan, time = self.plan(x.shape[0], x.shape[2], x.shape[3]), self._network.time
        if plan.program is None or (labels is not None and labels.dtype != torch.int64) or time.joint:
            return None
        if m.shape != x.shape or self.self_condition:
            return None
        if labels is None and time.null_label is not None:
            labels = torch.full((x.shape[0],), time.null_label, dtype=torch.int64)
        call = plan.program.step(x, m, table, time.added_labels, labels, steps, row, rng, bad_row, x0_out)
        kept = (plan, table, labels)  # what the call has the addresses of

        def step() -> bool:
            with self._lock:
                if self._table is not kept[1]:
                    return False
                call()
            return True

        return step

    def prepare(self, n: int, shape: tuple[int, ...]) -> Plan:
        """Makes the plan for n images of this shape (C, H, W), so that the first call does not have to.

        ValueError for a shape that the model cannot take. Who captures a CUDA graph of `at_rows` must hold the result:
        plans that nobody holds and that were not used lately are dropped, with their buffers.
        """
        check_shape(self._network, (n, *shape))
        return self.plan(n, shape[1], shape[2])

    def plan(self, n: int, h: int, w: int) -> Plan:
        """The plan for n images of h x w pixels, made now if it is new."""
        key: tuple[object, ...] = (n, h, w)
        if self.device.type == "cpu":
            key = (*key, torch.get_num_threads(), native.isa_mask())
        with self._lock, torch.inference_mode(False), torch.no_grad(), _no_autocast(self.device):
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
            begun = time.perf_counter()
            with _current(self.device):  # candidates are timed on the GPU that is current
                plan = make(self._network, n, h, w, self.dtype, self._packs, self._modules, self.deterministic)
            self._plans[key] = plan
            self._living.add(plan)
            while len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
            self._packs.keep({name for one in self._living for name in one.uses})
            self._modules.keep({one.module for one in self._living if one.module is not None})
        if self.verbose:
            print(f"fused plan made in {time.perf_counter() - begun:.2f} s: {plan}")
        return plan

    # -- weights ------------------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Reads the model's weights again. Plans and their choices stay, and packed weights stay where they are.

        Done without being asked when a call finds the weights changed. A call looks at what PyTorch counts (in-place
        writes, load_state_dict, optimiser steps, replaced or moved parameters) and on a CPU at some values of every
        tensor; a write through `.data` to other values is found by the next `refresh_if_changed`, at the latest.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad(), _no_autocast(self.device):
            network = read(self.model)
            old, new = self._network.tensors(), network.tensors()
            same = [(a.shape, a.device) for a in old] == [(b.shape, b.device) for b in new]
            if not same or network.numbers() != self._network.numbers():
                self._build()
                return
            for kept, read_now in zip(old, new, strict=True):
                kept.copy_(read_now)
            self._packs.refresh()
            self._integers = None
            if self._table is not None and self._timesteps is not None:
                self._table.copy_(self._tabulated(self._timesteps))
            for module in self._modules.values():
                module.refresh()
            self._watch.note()

    def refresh_if_changed(self, full: bool = True) -> None:
        """Compares the model's weights with those that the plans are made of, and refreshes if they differ.

        full: all of them, which takes milliseconds and on a GPU waits for it; else as a call does. ValueError for a
        model in training mode.
        """
        with self._lock:
            self._look(full)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        self._network: Network = read(self.model)
        self._watch = Watch(self.model)
        self._packs = Packs()
        self._plans: OrderedDict[tuple[object, ...], Plan] = OrderedDict()
        self._living: weakref.WeakSet[Plan] = weakref.WeakSet()  # those that a captured graph holds, too
        self._modules = Modules(self.model)
        self._integers = None
        self._table: Tensor | None = None
        if self._timesteps is not None:
            with torch.inference_mode(False), torch.no_grad(), _no_autocast(self.device):
                self._timesteps = self._timesteps.detach().to(self.device, copy=True)
                self._table = self._tabulated(self._timesteps)

    def _tabulated(self, timesteps: Tensor) -> Tensor:
        """What is known of timesteps beforehand: their temb, or what it is made of together with a label."""
        time = self._network.time
        return embeddings(time, timesteps) if time.joint else table(time, timesteps)

    def _at_rows(self, plan: Plan, tabulated: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """A time table, and the rows of it that belong to the images, for these rows [N] of what was tabulated."""
        if not self._network.time.joint:
            return tabulated, rows
        assert plan.label_rows is not None
        finish(self._network.time, tabulated.index_select(0, rows), plan.label_rows, plan.own_table)
        return plan.own_table, plan.own_rows

    def _look(self, full: bool) -> None:
        """The model as it is now: in eval mode, and the plans made of its present weights."""
        watch = self._watch
        if watch.training():
            raise ValueError(
                "the model is in training mode, where BatchNorm and dropout depend on the batch; a fused plan computes "
                "what eval mode computes: call model.eval() first"
            )
        changed = watch.contents_changed() if full else watch.moved() or watch.sampled_changed()
        if changed:
            self.refresh()

    def _out_shape(self, x: Tensor) -> tuple[int, ...]:
        return (x.shape[0], self.out_channels, *x.shape[2:])

    def _check_rows(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The time table and its timesteps, which these rows are in, as far as the host can see."""
        if self._table is None or self._timesteps is None:
            raise ValueError("at_rows needs the timesteps beforehand: compile(model, timesteps=...)")
        if rows.dtype != torch.int64 or rows.shape not in ((1,), x.shape[:1]):
            raise ValueError(f"rows must be int64 of shape (1,) or ({x.shape[0]},), got {rows.dtype} {rows.shape}")
        if rows.device.type == "cpu":
            in_range("rows", rows, len(self._table) - 1, "the last of timesteps")
        return self._table, self._timesteps

    def _embedded(self, plan: Plan, t: Tensor) -> tuple[Tensor, Tensor]:
        """A time table, and the rows of it that belong to t.

        On a CPU those of small integers are kept: beside the time saved, a product in every call would wake torch's
        threads, which then spin on the cores that the plan wants.
        """
        if t.device.type == "cpu" and not t.is_floating_point():
            plan.rows.copy_(t)
            low, high = int(plan.rows.min()), int(plan.rows.max())
            if low >= 0 and high < MOST_TABLED:
                if self._integers is None or len(self._integers) <= high:
                    integers = torch.arange((high // TABLED + 1) * TABLED)
                    self._integers = self._tabulated(integers)
                return self._at_rows(plan, self._integers, plan.rows)
        embed(self._network.time, t, plan.label_rows, plan.own_table)
        return plan.own_table, plan.own_rows

    def _load(self, plan: Plan, labels: Tensor | None) -> None:
        if plan.label_rows is None:
            return
        if labels is None:
            assert self.null_label is not None
            plan.label_rows.fill_(self.null_label)
        else:
            plan.label_rows.copy_(labels)

    def describe(self, n: int, h: int, w: int) -> str:
        """The plan for this size, a line per layer: what was chosen, its microseconds, and the runners-up."""
        return str(self.plan(n, h, w))

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"Compiled({name}, {self.dtype}, {self.device}, {len(self._plans)} plans)"


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A plan computes in its own dtype, whatever the caller's autocast says; without one this costs next to nothing."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _what(x: Tensor) -> str:
    return f"{x.dtype} {tuple(x.shape)} with strides {x.stride()}"
