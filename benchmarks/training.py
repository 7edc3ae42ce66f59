"""A whole training step of the tutorial U-Net in bfloat16 autocast: the Trainer beside eager PyTorch and torch.compile.

T16         ddpm_fast.Trainer as it comes
A16, A16L   eager autocast, the plain network, contiguous and channels_last
AC16, AC16L torch.compile of its forward pass and loss (and so of the backward pass)

All do the same: a batch of uint8 images, t and noise, the loss, gradients clipped to norm 1, AdamW (fused), an average
of the weights (torch._foreach). Before anything is timed, loss and gradient of each are compared, for equal images, t
and noise, with those of the plain network in float32. The memory of each is that of a process of its own.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import progress
from plain import PlainUNet
from results import training_ratio
from timing import Timing, step_rounds
from torch import Tensor

from ddpm_fast import Schedule, Trainer, UNet, noise, ops
from ddpm_fast.training import streams

CANDIDATES = {
    "T16": "ddpm_fast.Trainer(precision='bf16')",
    "A16": "eager autocast, contiguous",
    "A16L": "eager autocast, channels_last",
    "AC16": "torch.compile of forward and loss, contiguous",
    "AC16L": "torch.compile of forward and loss, channels_last",
}
SHAPE, IMAGES, SEED, LR, DECAY = (3, 32, 32), 512, 0, 2e-4, 0.9999
CLOSE, WRONG = 1.25, 0.3  # a gradient's error: as a multiple of eager's; relative, from which on it gets no speed


class Problem:
    """What all candidates share: weights, images, the schedule; and the draws of step 0, by which they are checked."""

    def __init__(self, n: int, device: torch.device, **options: Any) -> None:
        self.n, self.device = n, device
        torch.manual_seed(1)
        self.unet = UNet(3, **options).to(device)
        self.images = torch.randint(0, 256, (max(IMAGES, n), *SHAPE), dtype=torch.uint8)
        self.schedule = Schedule.linear(1000)
        self.ab = torch.tensor(self.schedule.alphas_cumprod, dtype=torch.float32, device=device)

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """x0 in [-1, 1], t and eps of the first step of a Trainer with this seed."""
        rng = noise.make_rng(SEED, 0, self.device)
        chosen = self.images[streams.Order(SEED, len(self.images)).indices(0, self.n)].to(self.device)
        t = streams.timesteps(rng, self.n, self.schedule.num_timesteps)
        eps = ops.normal(self.n, SHAPE, rng=rng, stream=noise.STREAM_TRAIN_NOISE, device=self.device)
        return chosen.float() / 127.5 - 1, t, eps


class Eager:
    """What people write: the plain network and loss in torch functions, compiled or not."""

    def __init__(self, problem: Problem, memory_format: torch.memory_format, compiled: bool, half: bool = True) -> None:
        self.problem, self.memory_format, self.half = problem, memory_format, half
        self.network = PlainUNet(problem.unet).train().to(memory_format=memory_format)  # type: ignore[call-overload]
        self.parameters = list(self.network.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0, fused=True)
        self.average = [value.detach().clone() for value in self._averaged()]
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _averaged(self) -> list[Tensor]:
        return [v for v in self.network.state_dict().values() if v.is_floating_point()]

    def _loss(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        ab = self.problem.ab[t].view(-1, 1, 1, 1)
        x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
        with torch.autocast(self.problem.device.type, torch.bfloat16, enabled=self.half):
            pred = self.network(x_t, t)
        return F.mse_loss(pred.float(), eps)

    def gradients(self) -> tuple[float, list[Tensor]]:
        """Loss and gradients of the step by which it is checked."""
        x0, t, eps = self.problem.drawn()
        loss = self.loss(x0.contiguous(memory_format=self.memory_format), t, eps)
        loss.backward()
        found = [p.grad.clone() for p in self.parameters if p.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), found

    def step(self) -> float:
        problem, device = self.problem, self.problem.device
        chosen = torch.randint(len(problem.images), (problem.n,))
        x0 = problem.images[chosen].to(device).contiguous(memory_format=self.memory_format).float() / 127.5 - 1
        t = torch.randint(problem.schedule.num_timesteps, (problem.n,), device=device)
        loss = self.loss(x0, t, torch.randn_like(x0))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self._averaged(), 1 - DECAY)
        return float(loss.detach())


class Ours:
    """`Trainer.step`."""

    def __init__(self, problem: Problem) -> None:
        options: dict[str, Any] = {"images": 10**9, "lr": LR, "ema": DECAY, "seed": SEED}
        data = problem.images
        self.trainer = Trainer(
            copy.deepcopy(problem.unet), problem.schedule, data, batch_size=problem.n, precision="bf16", **options
        )

    def gradients(self) -> tuple[float, list[Tensor]]:
        loss = self.trainer._forward_backward()
        found = [p.grad.clone() for p in self.trainer.model.parameters() if p.grad is not None]
        self.trainer.optimizer.zero_grad()
        self.trainer._batches = None  # it has not moved on: step 0 is still to come
        return float(loss), found

    def step(self) -> float:
        return self.trainer.step()


def make(name: str, problem: Problem) -> Eager | Ours:
    """The candidate of that name, built."""
    if name == "T16":
        return Ours(problem)
    return Eager(problem, torch.channels_last if name.endswith("L") else torch.contiguous_format, name.startswith("AC"))


def relative(found: list[Tensor], exact: list[Tensor]) -> float:
    """|found - exact| / |exact| over all tensors together."""
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, exact, strict=True))
    return float((wrong / sum(float(b.double().square().sum()) for b in exact)) ** 0.5)


def seconds_of(candidate: Eager | Ours, device: torch.device) -> Any:
    """How `timing.step_rounds` wants it: so many steps in a row -> seconds of one."""

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            candidate.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps

    return seconds


def run_training(
    n: int,
    device: torch.device,
    *,
    names: tuple[str, ...] = tuple(CANDIDATES),
    budget: float = 3.0,
    turn: float = 0.3,
    **options: Any,
) -> dict[str, Any]:
    """Build, check, time, and weigh; as a result file has it. options: of the UNet."""
    problem = Problem(n, device, **options)
    exact_loss, exact = Eager(problem, torch.contiguous_format, False, half=False).gradients()
    usual = relative(Eager(problem, torch.contiguous_format, False).gradients()[1], exact)
    records: list[dict[str, Any]] = []
    running: dict[str, Eager | Ours] = {}
    for name in names:
        progress(f"training, n = {n}: building {name}")
        began = time.perf_counter()
        candidate = make(name, problem)
        loss, gradients = candidate.gradients()
        error = relative(gradients, exact)
        record: dict[str, Any] = {"id": name, "what": CANDIDATES[name], "reason": "", "gradient_error": error}
        record |= {"loss_error": abs(loss - exact_loss) / exact_loss, "prepare_s": time.perf_counter() - began}
        records.append(record)
        if not (error <= WRONG and record["loss_error"] <= WRONG):  # NaN is wrong, too
            record |= {"status": "wrong", "reason": f"relative error of the gradient {error:.2g}"}
            continue
        record["status"] = "ok" if error <= CLOSE * usual else "inaccurate"
        running[name] = candidate
    progress(f"training, n = {n}: timing {', '.join(running)}")
    timed = {name: seconds_of(candidate, device) for name, candidate in running.items()}
    rounds = step_rounds(timed, budget=budget, turn=turn) if timed else {}
    running.clear()
    for record in records:
        record["rounds_s"] = rounds.get(record["id"], [])
        progress(f"training, n = {n}: memory of {record['id']}")
        record["peak_bytes"] = peak_of(record["id"], n, device, options) if record["rounds_s"] else None
    return {"case": "tutorial 3x32x32", "n": n, "candidates": records}


def peak_of(name: str, n: int, device: torch.device, options: dict[str, Any]) -> int | None:
    """Bytes that two steps need at the most in a process of their own; None where that cannot be told."""
    command = [sys.executable, str(Path(__file__).with_name("peak_memory.py")), name, str(n), str(device)]
    done = subprocess.run([*command, json.dumps(options)], capture_output=True, text=True, check=False)
    try:
        return int(done.stdout.split()[-1])
    except (IndexError, ValueError):
        return None


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures for a terminal."""
    found = [f"training step, {figures['case']}, n = {figures['n']}, bfloat16 autocast"]
    for record in figures["candidates"]:
        if not record["rounds_s"]:
            found.append(f"  {record['id']:<6} {record['status']}: {record['reason']}")
            continue
        time_of = Timing.of(record["rounds_s"])
        peak = "?" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 2**20:.0f}"
        ratio = training_ratio(figures, record["id"])
        against = "" if ratio is None else f"  {ratio.median:.2f}x ours ({ratio.p20:.2f} - {ratio.p80:.2f})"
        mark = " (inaccurate)" if record["status"] == "inaccurate" else ""
        found.append(
            f"  {record['id']:<6} {time_of.median * 1e3:8.1f} ms  {peak:>6} MiB  gradient off by "
            f"{record['gradient_error']:.1e}{mark}{against}  {record['what']}"
        )
    return found
