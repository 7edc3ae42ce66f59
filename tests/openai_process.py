"""A cheap network and the papers' formulas in float64, for the tests of OpenAI's sampling and losses."""

from __future__ import annotations

import numpy as np
import torch

from ddpm_fast.interop.openai import ModelVarType

T = 100
RANGE, LARGE, SMALL = ModelVarType.LEARNED_RANGE, ModelVarType.FIXED_LARGE, ModelVarType.FIXED_SMALL
SHAPE = (2, 3, 8, 8)


class Net(torch.nn.Module):
    """Something cheap that depends on all it is told, and remembers the times."""

    def __init__(self, learned=False, classes=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, 6 if learned else 3, 3, padding=1)
            self.labels = None if classes is None else torch.nn.Embedding(classes, 1)
        self.told = []

    def forward(self, x, t, y=None):
        self.told.append(t.clone())
        shift = torch.sin(t.float() / 50)[:, None, None, None]
        if y is not None:
            shift = shift + self.labels(y)[..., None, None]
        return torch.tanh(self.conv(x.float()) + shift).to(x.dtype)


def tables(betas, kept):
    """A, P and beta of the kept timesteps, ascending."""
    A = np.cumprod(1.0 - betas)[kept]
    P = np.append(1.0, A[:-1])
    return A, P, 1.0 - A / P


@torch.no_grad()
def by_formula(model, betas, kept, x, noise, *, kind="ddpm", variance=LARGE, x0=False, clip=True, eta=0.0, y=None):
    """Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, eq. 15; Song et al. 2020, eq. 12. noise: in the order of use."""
    A, P, beta = tables(betas, kept)
    x, kwargs = x.double(), {} if y is None else {"y": y}
    for row, i in enumerate(reversed(range(len(kept)))):
        m = model(x.float(), torch.full((len(x),), kept[i]), **kwargs).double()
        m, v = m.chunk(2, dim=1) if variance is RANGE else (m, None)
        data = m if x0 else (x - np.sqrt(1 - A[i]) * m) / np.sqrt(A[i])
        data = data.clamp(-1, 1) if clip else data
        z = noise[row].double() if i else torch.zeros_like(x)
        if kind == "ddim":
            sigma = eta * np.sqrt((1 - P[i]) / (1 - A[i]) * beta[i])
            eps = (x - np.sqrt(A[i]) * data) / np.sqrt(1 - A[i])
            x = np.sqrt(P[i]) * data + np.sqrt(max(1 - P[i] - sigma**2, 0)) * eps + sigma * z
            continue
        small = beta[i] * (1 - P[i]) / (1 - A[i])
        if variance is RANGE:
            low = np.log(small if i else beta[1] * (1 - P[1]) / (1 - A[1]))
            logvar = (v + 1) / 2 * np.log(beta[i]) + (1 - v) / 2 * low
        else:
            logvar = torch.tensor(np.log(beta[i] if variance is LARGE or not i else small))
        mean = np.sqrt(P[i]) * beta[i] / (1 - A[i]) * data + np.sqrt(A[i] / P[i]) * (1 - P[i]) / (1 - A[i]) * x
        x = mean + torch.exp(logvar / 2) * z
    return x


def drawn(seed, rows):
    """x_T and the noise of each row, as torch.randn gives them in turn."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=g), [torch.randn(SHAPE, generator=g) for _ in range(rows)]


def linear(steps):
    return np.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps)


def cosine(steps):
    u = np.arange(steps + 1) / steps
    signal = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999)
