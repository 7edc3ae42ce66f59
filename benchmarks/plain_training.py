"""What training is compared with: the textbook's loop in plain eager PyTorch, by its own random numbers.

Nothing of ddpm_fast's training runs here; the network is the same layers with a plain forward pass.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_fast import Schedule, UNet
from ddpm_fast.demo.textbook import plain_unet


class PlainNet(nn.Module):
    """(x, t, labels) -> eps by torch's own functions on the layers of `net`."""

    def __init__(self, net: UNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return plain_unet(self.net, x, t, labels)


def train_plainly(
    net: UNet,
    schedule: Schedule,
    pixels: Tensor,
    labels: Tensor,
    *,
    images: int,
    batch: int,
    lr: float,
    warmup: int,
    label_dropout: float,
    ema: float,
    seed: int,
    precision: torch.dtype | None,
    flip: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains `net` in place on so many images and returns the averaged network, the losses and the seconds.

    Ho et al. 2020, algorithm 1: uniform t, eps by torch.randn, mean squared error; AdamW, a warm-up and a cosine to 0,
    gradients clipped to norm 1, labels dropped for guidance, an average of the weights with a warm-up.

    Args:
        net: class-conditional, in training mode, on a CPU.
        pixels: uint8 (M, C, H, W). labels: int64 (M,).
        images, batch, warmup: numbers of images; the last batch is as long as the others.
        precision: what autocast computes in, or None.
    """
    torch.manual_seed(seed)
    model = PlainNet(net).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    average = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0)
    alphas_cumprod = torch.tensor(schedule.alphas_cumprod, dtype=torch.float32)
    data = pixels.float() / 127.5 - 1
    losses: list[float] = []
    seen, order, began = 0, torch.empty(0, dtype=torch.int64), time.perf_counter()
    while seen < images:
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(data))])
        index, order = order[:batch], order[batch:]
        x0, y = data[index], labels[index]
        if flip:
            x0 = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, x0.flip(-1), x0)
        y = torch.where(torch.rand(batch) < label_dropout, net.null_label, y)
        t = torch.randint(0, schedule.num_timesteps, (batch,))
        eps = torch.randn_like(x0)
        signal = alphas_cumprod[t][:, None, None, None]
        x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * eps
        rate = min(1.0, (seen + batch) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, seen / images)))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
            m = model(x_t.contiguous(memory_format=torch.channels_last), t, y)
            loss = F.mse_loss(m.float(), eps)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        seen += batch
        losses.append(loss.item())
        _follow(average, net, min(ema, (1 + len(losses)) / (10 + len(losses))))
        if len(losses) % 200 == 0:
            say(f"plain loop: {seen:,} images, loss {sum(losses[-200:]) / 200:.4f}")
    return {"average": average, "losses": losses, "images": seen, "seconds": time.perf_counter() - began}


@torch.no_grad()
def _follow(average: nn.Module, net: nn.Module, decay: float) -> None:
    for ours, theirs in zip(average.parameters(), net.parameters(), strict=True):
        ours.mul_(decay).add_(theirs, alpha=1 - decay)
    for ours, theirs in zip(average.buffers(), net.buffers(), strict=True):
        ours.copy_(theirs)
