"""How far apart two sets of samples are: energy distance and Frechet distance, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

_CHUNK_ELEMENTS = 1 << 22  # distances held at once: 32 MiB of float64


def _as_rows(name: str, samples: Any) -> Tensor:
    """Tensor or array (N, ...) -> float64 (N, D) on its own device."""
    rows = torch.as_tensor(samples)
    if rows.dim() < 2:
        raise ValueError(f"{name} must have shape (N, ...) with at least two dimensions, got {tuple(rows.shape)}")
    rows = rows.detach().flatten(1).to(torch.float64)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return rows


def _distance_sum(x: Tensor, y: Tensor) -> float:
    """Sum of |x_i - y_j| over all pairs, a block of rows at a time."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for block in x.split(max(1, _CHUNK_ELEMENTS // max(1, y.shape[0]))):
        # The matrix-product shortcut for distances cancels badly for near neighbours.
        total += torch.cdist(block, y, compute_mode="donot_use_mm_for_euclid_dist").sum()
    return float(total)


def energy_distance(x: Any, y: Any, *, unbiased: bool = False) -> float:
    """Energy distance between two sets of samples: D = 2 E|X - Y| - E|X - X'| - E|Y - Y'|.

    |.| is the Euclidean norm of the flattened samples; D is zero only when the distributions are
    equal (Szekely and Rizzo 2013). All pairs are summed, in float64, with bounded memory.

    Args:
        x: (N, ...) tensor or array.
        y: (M, ...) tensor or array, as many elements a sample as x.
        unbiased: False (V-statistic): the means over X, X' take in a sample with itself, so D >= 0
            and equal sets give 0, but two sets of one distribution give E|X - X'| (1/N + 1/M) on
            average. True (U-statistic): those pairs are left out; right on average, may be < 0.

    Raises ValueError for shapes that do not match, too few samples, and NaN or infinite values.
    """
    a, b = _as_rows("x", x), _as_rows("y", y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"y must have {a.shape[1]} elements a sample as x has, got {b.shape[1]}")
    least = 2 if unbiased else 1
    for name, rows in (("x", a), ("y", b)):
        if rows.shape[0] < least:
            raise ValueError(f"{name} must hold at least {least} samples, got {rows.shape[0]}")
    b = b.to(a.device)
    n, m, one = a.shape[0], b.shape[0], int(unbiased)
    between = _distance_sum(a, b) / (n * m)
    within_a = _distance_sum(a, a) / (n * (n - one))
    within_b = _distance_sum(b, b) / (m * (m - one))
    return 2 * between - within_a - within_b


def energy_ratio(samples: Any, real: Any, *, splits: int = 20, seed: int = 0) -> float:
    """Energy distance of samples to real data, in units of real data's distance to itself.

    For each random split of `real` into N (as many as `samples`) and the rest:
    ratio = sum D(samples, rest) / sum D(real N, rest), D being the biased `energy_distance`.
    1 means that the samples are as close to the data as the data's own draws are; a model that
    only repeats the data cannot be told from a good one by this number.

    Args:
        samples: (N, ...) tensor or array.
        real: (M, ...), M > N, as many elements a sample.
        splits: how many random splits are summed over.
        seed: of the splits.
    """
    a, b = _as_rows("samples", samples), _as_rows("real", real)
    n, m = a.shape[0], b.shape[0]
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"real must have {a.shape[1]} elements a sample, got {b.shape[1]}")
    if not 0 < n < m:
        raise ValueError(f"real must hold more samples than samples' {n} (> 0), got {m}")
    if splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    b = b.to(a.device)
    mode = "donot_use_mm_for_euclid_dist"
    to_real, in_real = torch.cdist(a, b, compute_mode=mode), torch.cdist(b, b, compute_mode=mode)
    within = torch.cdist(a, a, compute_mode=mode).mean()
    generator = torch.Generator().manual_seed(seed)
    ours = theirs = 0.0
    for _ in range(splits):
        order = torch.randperm(m, generator=generator).to(b.device)
        some, rest = order[:n], order[n:]
        in_rest = in_real[rest][:, rest].mean()
        ours += float(2 * to_real[:, rest].mean() - within - in_rest)
        theirs += float(2 * in_real[some][:, rest].mean() - in_real[some][:, some].mean() - in_rest)
    return ours / theirs


def nearest_distance(x: Any, y: Any) -> float:
    """Mean over x of the distance to the nearest row of y; a row of x is not its own neighbour.

    Beside `nearest_distance(real, real)` it tells copies from new samples. x (N, ...), y (M, ...);
    `y is x` (the same object) leaves the diagonal out.
    """
    a, b = _as_rows("x", x), _as_rows("y", y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"y must have {a.shape[1]} elements a sample as x has, got {b.shape[1]}")
    same = x is y
    if a.shape[0] < 1 or b.shape[0] < 1 + same:
        raise ValueError(f"y must hold at least {1 + same} samples, got {b.shape[0]}")
    distances = torch.cdist(a, b.to(a.device), compute_mode="donot_use_mm_for_euclid_dist")
    if same:
        distances.fill_diagonal_(torch.inf)
    return float(distances.min(dim=1).values.mean())


class FeatureStatistics:
    """Mean and covariance of feature vectors that come a batch at a time, in float64 (Chan et al. 1979).

    `count`, `mean` (D,), `covariance` (D, D), the unbiased one; NumPy arrays.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: FloatArray = np.zeros(0)
        self._scatter: FloatArray = np.zeros((0, 0))  # sum of (f - mean) (f - mean)^T

    def update(self, features: Any) -> None:
        """features (N, D), finite. Nothing is kept of a batch but its sums, taken about its own mean."""
        rows = _as_rows("features", features).cpu().numpy()
        if self.count == 0:
            self.mean, self._scatter = np.zeros(rows.shape[1]), np.zeros((rows.shape[1],) * 2)
        if rows.shape[1] != len(self.mean):
            raise ValueError(f"features must have {len(self.mean)} elements a sample as before, got {rows.shape[1]}")
        if len(rows) == 0:
            return
        mean = rows.mean(0)
        around = rows - mean
        apart, whole = mean - self.mean, self.count + len(rows)
        self._scatter += around.T @ around + np.outer(apart, apart) * (self.count * len(rows) / whole)
        self.mean = self.mean + apart * (len(rows) / whole)
        self.count = whole

    @property
    def covariance(self) -> FloatArray:
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self._scatter / (self.count - 1)


def frechet_distance(mu1: Any, sigma1: Any, mu2: Any, sigma2: Any) -> float:
    """Squared Frechet distance between N(mu1, sigma1) and N(mu2, sigma2) (Dowson and Landau 1982), in float64:

        |mu1 - mu2|^2 + tr(sigma1) + tr(sigma2) - 2 tr((sigma1 sigma2)^(1/2))

    Of Inception features it is the FID (Heusel et al. 2017). The last trace is the sum of the square roots of the
    eigenvalues of s sigma2 s, s = sigma1^(1/2): symmetric, so that singular matrices (fewer samples than dimensions)
    need no care.

    Args:
        mu1, mu2: (D,).
        sigma1, sigma2: (D, D), symmetric, with no negative eigenvalues but by rounding.
    """
    means = [np.asarray(mu, np.float64) for mu in (mu1, mu2)]
    sigmas = [np.asarray(sigma, np.float64) for sigma in (sigma1, sigma2)]
    d = means[0].size
    for i, (mu, sigma) in enumerate(zip(means, sigmas, strict=True), 1):
        if mu.shape != (d,) or sigma.shape != (d, d):
            raise ValueError(
                f"mu{i} and sigma{i} must have shapes ({d},) and ({d}, {d}), got {mu.shape} and {sigma.shape}"
            )
        if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
            raise ValueError(f"mu{i} and sigma{i} must be finite, got NaN or infinite values")
    values, vectors = np.linalg.eigh(sigmas[0])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ sigmas[1] @ root).clip(min=0)).sum()
    apart = means[0] - means[1]
    return float(apart @ apart + np.trace(sigmas[0]) + np.trace(sigmas[1]) - 2 * shared)
