"""The demo's training loop: noise, timesteps and label dropout keyed by (seed, image drawn)."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import noise, ops
from ..nn import UNet
from ..schedule import Schedule
from .digits import Digits
from .threads import Threads

_REPORT_EVERY = 10  # steps between looks at the loss, which wait for the device


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the network is trained; the learning rate falls along a cosine to nothing at the end."""

    seconds: float = 95.0  # budget
    min_steps: int = 900  # a slow machine takes longer for them ...
    max_seconds: float = 115.0  # ... but no longer than this
    max_steps: int = 3000  # some 107 epochs: a fast GPU should not learn the digits by heart
    steps: int | None = None  # exactly so many steps instead, whatever time they take
    batch: int = 64
    lr: float = 4e-3
    warmup_steps: int = 50
    label_dropout: float = 0.1
    ema_decay: float = 0.995
    weight_decay: float = 1e-4

    def progress(self, step: int, elapsed: float) -> float:
        """How much of the training is done after so many steps and seconds; it ends at 1."""
        if self.steps is not None:
            return step / self.steps
        slow = max(step / self.min_steps, elapsed / self.max_seconds)
        return max(step / self.max_steps, min(slow, elapsed / self.seconds))


@dataclasses.dataclass(frozen=True)
class TrainLog:
    """What the training did; losses are means over _REPORT_EVERY steps, oldest first; threads: those it ended on."""

    steps: int
    images: int
    seconds: float
    threads: int
    losses: list[float]

    @property
    def final_loss(self) -> float:
        """Mean over the last 100 steps."""
        last = self.losses[-100 // _REPORT_EVERY :]
        return sum(last) / len(last)


def batches(count: int, batch: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Endless int64 [batch] indices: epoch after epoch, each in the order of its keyed bits."""
    queue = torch.empty(0, dtype=torch.int64, device=device)
    drawn = 0
    while True:
        while len(queue) < batch:
            keys = ops.random_bits(
                count, (1,), seed=seed, first_sample=drawn, stream=noise.STREAM_PERMUTATION, device=device
            )
            queue = torch.cat([queue, keys[:, 0].argsort(stable=True)])
            drawn += count
        yield queue[:batch]
        queue = queue[batch:]


def draw_t(rng: Tensor, batch: int, timesteps: int) -> Tensor:
    """int64 [batch], uniform in 0..timesteps-1: (r T) >> 32 for 32 random bits r."""
    bits = ops.random_bits(batch, (1,), rng=rng, stream=noise.STREAM_TRAIN_T, device=rng.device)
    return (bits[:, 0] * timesteps) >> 32


def drop_labels(rng: Tensor, labels: Tensor, share: float, null_label: int) -> Tensor:
    """Labels with a keyed coin of probability `share` each turned into the null label."""
    bits = ops.random_bits(len(labels), (1,), rng=rng, stream=noise.STREAM_LABEL_DROPOUT, device=rng.device)
    return torch.where(bits[:, 0] < int(share * 2**32), null_label, labels)


def bf16_pays(device: torch.device) -> bool:
    """Whether convolutions in bfloat16 are faster than in float32: the hardware has to multiply it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return supported is not None and bool(supported())


@torch.no_grad()
def update_average(average: UNet, net: UNet, decay: float) -> None:
    """average <- decay average + (1 - decay) net for the weights; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - decay)
    for ours, theirs in zip(average.buffers(), net.buffers(), strict=True):
        ours.copy_(theirs)


def train(
    net: UNet, digits: Digits, schedule: Schedule, recipe: Recipe, *, seed: int, bar: Any
) -> tuple[UNet, TrainLog]:
    """Trains `net` in place to predict eps and returns the average of its weights, in eval mode.

    On a CPU it leaves torch on as many threads as was fastest last; the caller puts its own number back.

    Args:
        net: class-conditional, on the device to train on.
        digits: the data, on any device.
        schedule: the noising.
        recipe: budget and hyperparameters.
        seed: keys the order of the images, the timesteps, the noise and the label dropout.
        bar: a tqdm bar of 100 percent.
    """
    device = net.device
    images, labels = digits.images.to(device), digits.labels.to(device)
    table, T = schedule.noising_table(device), schedule.num_timesteps
    null_label = net.null_label
    if null_label is None:
        raise ValueError("net must be class-conditional, got a UNet without num_classes")
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    order = batches(len(digits), recipe.batch, seed, device)
    rng = noise.make_rng(seed, 0, device)
    half = bf16_pays(device)
    losses: list[float] = []
    recent = torch.zeros((), device=device)
    net.train()
    threads = Threads(device)
    step, done, began = 0, 0.0, time.perf_counter()
    while done < 1:
        rate = 0.5 * (1 + math.cos(math.pi * done)) * min(1.0, (step + 1) / recipe.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * rate
        threads.before(step)
        step_began = time.perf_counter()
        index = next(order)
        x0, t = images[index], draw_t(rng, recipe.batch, T)
        y = drop_labels(rng, labels[index], recipe.label_dropout, null_label)
        x_t = ops.q_sample(x0, t, table, rng=rng)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            pred = net(x_t, t, y)
        loss = ops.noise_mse(pred, rng=rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        threads.after(time.perf_counter() - step_began)
        step += 1
        update_average(average, net, min(recipe.ema_decay, (1 + step) / (10 + step)))
        rng[1] += recipe.batch
        recent += loss.detach()
        before, done = done, min(1.0, recipe.progress(step, time.perf_counter() - began))
        if step % _REPORT_EVERY == 0 or done == 1:
            losses.append(float(recent) / ((step - 1) % _REPORT_EVERY + 1))
            recent.zero_()
            bar.set_postfix_str(f"step {step}, loss {losses[-1]:.4f}", refresh=False)
        bar.update(100 * (done - before))
    seconds = time.perf_counter() - began
    return average, TrainLog(step, step * recipe.batch, seconds, torch.get_num_threads(), losses)
