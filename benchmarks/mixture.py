"""Data whose best possible network is a formula: a mixture of Gaussians fitted to scikit-learn's 8x8 digits.

For x = a x0 + s eps everything about x0 given x is known in closed form. A sampler that is given this network differs
from the data by its own errors alone; and the density says of any sample how likely it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ddpm_fast import Schedule

# Pixels are halved: the tails of the mixture then stay inside [-1, 1], as the pixels of images do.
SCALE = 0.5
FLOOR = 0.02**2  # of a variance: the digits' corners are always blank

Network = Callable[[Tensor, Tensor], Tensor]


class Mixture:
    """x0 ~ sum_k w_k N(mu_k, Sigma), the mu_k (K, D) and Sigma kept in the basis of Sigma's eigenvectors; float64."""

    def __init__(self, weights: Tensor, means: Tensor, covariance: Tensor) -> None:
        values, self.basis = torch.linalg.eigh(covariance.double())
        self.values = values.clamp(min=FLOOR)
        self.weights, self.means = weights.double(), means.double() @ self.basis

    @classmethod
    def of_digits(cls, components: int = 100) -> Mixture:
        """Fitted by expectation maximisation; samples look like digits."""
        from sklearn.datasets import load_digits
        from sklearn.mixture import GaussianMixture

        pixels = (load_digits().data / 8 - 1) * SCALE
        fit = GaussianMixture(components, covariance_type="tied", random_state=0, max_iter=20, tol=1e-2).fit(pixels)
        return cls(*(torch.tensor(part) for part in (fit.weights_, fit.means_, fit.covariances_)))

    def draw(self, n: int, seed: int) -> Tensor:
        """float64 (n, D)."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, len(self.values), generator=generator, dtype=torch.float64)
        return (self.means[k] + z * self.values.sqrt()) @ self.basis.T

    def _log_shares(self, y: Tensor, a: float, spread: Tensor) -> Tensor:
        """log w_k N(y; a mu_k, spread), (N, K), but for what all k have in common; y in the basis."""
        scaled = a * self.means / spread
        return self.weights.log() + y @ scaled.T - 0.5 * a * (scaled * self.means).sum(1)

    def log_density(self, x: Tensor) -> Tensor:
        """float64 (N,): the natural logarithm of the density of x (N, D)."""
        y = x.double() @ self.basis
        common = (y * y / self.values + self.values.log() + math.log(2 * math.pi)).sum(1)
        return self._log_shares(y, 1.0, self.values).logsumexp(1) - 0.5 * common

    def x0_given(self, x: Tensor, a: float, s: float) -> tuple[Tensor, Callable[[], Tensor]]:
        """The mean of x0 given x = a x0 + s eps, x (N, D), and a function that gives each element's variance."""
        spread = a * a * self.values + s * s
        y = x.double() @ self.basis
        share = self._log_shares(y, a, spread).softmax(1)
        keep = s * s / spread  # of a component's mean; the rest comes from x
        mean = (keep * (share @ self.means) + a * self.values / spread * y) @ self.basis.T

        def variance() -> Tensor:
            centres = (keep * self.means) @ self.basis.T
            return share @ centres**2 - (share @ centres) ** 2 + self.basis**2 @ (self.values * keep)

        return mean, variance


def exact(mixture: Mixture, schedule: Schedule, prediction: str = "eps", dtype: torch.dtype | None = None) -> Network:
    """The network that no training can better, for "eps", "x0" or "v"; its output rounded to dtype if given."""
    signal, sigma = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod

    def network(x: Tensor, t: Tensor) -> Tensor:
        a, s = float(signal[int(t[0])]), float(sigma[int(t[0])])
        x0, _ = mixture.x0_given(x, a, s)
        eps = (x.double() - a * x0) / s
        m = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[prediction]
        return m if dtype is None else m.to(dtype).double()

    return network


def exact_with_variance(mixture: Mixture, schedule: Schedule) -> Network:
    """The same with the best v for variance="learned_range" and all T steps: the variance of x_prev given x_t is the
    posterior's and, as x0 is not known, c1^2 Var[x0 | x_t] (Bao et al. 2022, arXiv 2201.06503)."""
    signal, sigma = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    table = schedule.step_table(clip=1.0, variance="learned_range")
    c1 = table.coefficients[::-1, 2]
    assert table.logvar_range is not None
    limits = table.logvar_range.double().numpy()[::-1]

    def network(x: Tensor, t: Tensor) -> Tensor:
        i = int(t[0])
        a, s = float(signal[i]), float(sigma[i])
        x0, variance = mixture.x0_given(x, a, s)
        low, high = limits[i]
        f = ((np.exp(low) + c1[i] ** 2 * variance()).log() - low) / (high - low)
        return torch.cat([(x.double() - a * x0) / s, 2 * f.clamp(0, 1) - 1], dim=1)

    return network


def trained_in(mixture: Mixture, schedule: Schedule, dtype: torch.dtype) -> Network:
    """The best network for an x_t made as diffusers' `add_noise` makes it in a low precision, alphas_cumprod rounded
    before anything is computed. Where that adds no noise, the noise asked for cannot be known, and 0 is best."""
    A = torch.tensor(schedule.alphas_cumprod.copy(), dtype=torch.float32).to(dtype)
    signal, sigma = A**0.5, (1 - A) ** 0.5

    def network(x: Tensor, t: Tensor) -> Tensor:
        a, s = float(signal[int(t[0])]), float(sigma[int(t[0])])
        if s == 0:
            return torch.zeros_like(x)
        return (x.double() - a * mixture.x0_given(x, a, s)[0]) / s

    return network
