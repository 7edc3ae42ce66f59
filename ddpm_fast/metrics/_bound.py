"""The terms of the variational bound by formula, in nats, float64; each is summed over an image's dimensions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gaussian_kl(apart: Tensor, logvar1: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(m1, exp(logvar1)) || N(m2, exp(logvar2))) with apart = m1 - m2, (N, ...) -> (N,)."""
    ratio = logvar1 - logvar2
    # expm1(r) - r is exact to its digits where the variances are nearly equal.
    terms = 0.5 * (torch.expm1(ratio) - ratio + apart * apart * torch.exp(-logvar2))
    return terms.flatten(1).sum(1)


def prior_nats(x0: Tensor, signal: float, variance: float) -> Tensor:
    """KL(N(sqrt(signal) x0, variance) || N(0, 1)), (N, ...) -> (N,); signal is alphas_cumprod of the last timestep."""
    spread = variance - 1 - math.log(variance)
    return 0.5 * (spread + signal * x0 * x0).flatten(1).sum(1)


def decoder_nats(pixels: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """-log of the mass that N(mean, exp(logvar)) has within 1/255 of a pixel (Ho et al. 2020, eq. 13).

    pixels: uint8 (N, ...), whose value u stands for u/127.5 - 1; 0 reaches down to -infinity, 255 up to infinity.
    """
    x0 = pixels.double() / 127.5 - 1
    inverse = torch.exp(-0.5 * logvar)
    low = torch.where(pixels == 0, -torch.inf, (x0 - 1 / 255 - mean) * inverse)
    high = torch.where(pixels == 255, torch.inf, (x0 + 1 / 255 - mean) * inverse)
    # Mirrored so that the interval lies mostly below 0, where the tails keep their digits.
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    above, below = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    nats: Tensor = -(above + torch.log(-torch.expm1(below - above))).flatten(1).sum(1)
    return nats
