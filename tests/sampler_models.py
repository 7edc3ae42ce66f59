"""Small networks and eager loops for the sampler's tests."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

SHAPE = (3, 8, 8)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Networks this small spend their time waiting for each other's threads, on a busy machine seconds of it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Net(nn.Module):
    """A convolutional (x, t[, labels]) -> tensor like x, with something that train mode changes."""

    def __init__(self, channels: int = 3, num_classes: int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.in_channels, self.num_classes = channels, num_classes
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Conv2d(channels, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.5)
            self.last = nn.Conv2d(8, channels, 3, padding=1)
            if num_classes is not None:
                self.embedding = nn.Embedding(num_classes + 1, 8)
                self.null_label = num_classes

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.norm(self.first(x)) + torch.sin(t.to(x.dtype) / 50.0)[:, None, None, None]
        if labels is not None:
            h = h + self.embedding(labels)[:, :, None, None]
        return self.last(self.drop(nn.functional.silu(h)))


class Mlp(nn.Module):
    """(N, 2) vectors."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.layers = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None] / 100.0], dim=1))


@torch.no_grad()
def tutorial_loop(model, T, x, noise, beta_start=1e-4, beta_end=0.02):
    """The reverse loop as tutorials write it: float32 eager torch, every timestep, nothing clipped; yields each x."""
    betas = torch.linspace(beta_start, beta_end, T)
    signal = torch.cumprod(1.0 - betas, dim=0)
    for i in reversed(range(T)):
        eps = model(x, torch.full((len(x),), i, dtype=torch.long))
        mean = (1.0 / torch.sqrt(1.0 - betas[i])) * (x - betas[i] / torch.sqrt(1.0 - signal[i]) * eps)
        x = mean + torch.sqrt(betas[i]) * (noise[i] if i > 0 else torch.zeros_like(x))
        yield i, x


@torch.no_grad()
def textbook_loop(model, alphas_cumprod, timesteps, x, noise, *, method, prediction="eps", clip=None, eta=0.0):
    """DDPM with the small variance, or DDIM, over `timesteps`, in float64 but for the network."""
    x = x.double()
    for row, t in enumerate(timesteps):
        A = alphas_cumprod[t]
        P = alphas_cumprod[timesteps[row + 1]] if row + 1 < len(timesteps) else 1.0
        m = model(x.float(), torch.full((len(x),), int(t))).double()
        x0 = {
            "eps": lambda x=x, m=m, A=A: (x - (1 - A) ** 0.5 * m) / A**0.5,
            "x0": lambda m=m: m,
            "v": lambda x=x, m=m, A=A: A**0.5 * x - (1 - A) ** 0.5 * m,
        }[prediction]()
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        z = noise[row].double()
        if method == "ddpm":
            beta = 1 - A / P
            variance = beta * (1 - P) / (1 - A)
            x = P**0.5 * beta / (1 - A) * x0 + (A / P) ** 0.5 * (1 - P) / (1 - A) * x + variance**0.5 * z
        else:
            sigma = eta * ((1 - P) / (1 - A) * (1 - A / P)) ** 0.5
            eps = (x - A**0.5 * x0) / (1 - A) ** 0.5
            x = P**0.5 * x0 + max(1 - P - sigma**2, 0.0) ** 0.5 * eps + sigma * z
    return x
