"""A network of the kind that one trains: small, float32, and wrong here and there."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ddpm_fast import Schedule


def digits() -> Tensor:
    """float32 (1797, 64) in [-1, 1]: scikit-learn's 8x8 scans, in an order of chance."""
    from sklearn.datasets import load_digits

    pixels = torch.tensor(load_digits().data, dtype=torch.float32) / 8 - 1
    return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]


class Small(torch.nn.Module):
    """A network of the kind that one trains: float32, (x, t) -> eps, x (N, D); t may be fractional."""

    def __init__(self, d: int = 64, width: int = 256) -> None:
        super().__init__()
        self.rates = torch.exp(torch.arange(32) * (-math.log(10000.0) / 31))
        self.into = torch.nn.Linear(d, width)
        self.of_time = torch.nn.ModuleList([torch.nn.Linear(64, width) for _ in range(3)])
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(width) for _ in range(4)])
        self.between = torch.nn.ModuleList([torch.nn.Linear(width, width) for _ in range(3)])
        self.out = torch.nn.Linear(width, d)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None].float() * self.rates
        temb = torch.cat([angles.sin(), angles.cos()], dim=1)
        h = self.into(x)
        for norm, layer, of_time in zip(self.norms, self.between, self.of_time, strict=False):
            h = h + layer(torch.nn.functional.silu(norm(h) + of_time(temb)))
        eps: Tensor = self.out(torch.nn.functional.silu(self.norms[-1](h)))
        return eps


def train(data: Tensor, schedule: Schedule, steps: int, batch: int = 256) -> Small:
    """A `Small` trained to predict eps of data (M, D), always the same; on one thread, whose sums are too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Small(data.shape[1])
        generator = torch.Generator().manual_seed(1)
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 4))
        table = schedule.noising_table()
        for _ in range(steps):
            x0 = data[torch.randint(len(data), (batch,), generator=generator)]
            t = torch.randint(len(schedule), (batch,), generator=generator)
            eps = torch.randn(x0.shape, generator=generator)
            loss = (net(table[t, :1] * x0 + table[t, 1:] * eps, t) - eps).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    torch.set_num_threads(threads)
    return net.eval().requires_grad_(False)
