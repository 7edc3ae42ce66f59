"""How far apart two sets of samples are by the distances between them: energy distance, nearest neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._rows import as_rows, blocks


def _distance_sum(x: Tensor, y: Tensor) -> float:
    """Sum of |x_i - y_j| over all pairs, a block of rows at a time."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for block in blocks(x, y.shape[0]):
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
    a, b = as_rows("x", x), as_rows("y", y)
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
    a, b = as_rows("samples", samples), as_rows("real", real)
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
    a, b = as_rows("x", x), as_rows("y", y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"y must have {a.shape[1]} elements a sample as x has, got {b.shape[1]}")
    same = x is y
    if a.shape[0] < 1 or b.shape[0] < 1 + same:
        raise ValueError(f"y must hold at least {1 + same} samples, got {b.shape[0]}")
    distances = torch.cdist(a, b.to(a.device), compute_mode="donot_use_mm_for_euclid_dist")
    if same:
        distances.fill_diagonal_(torch.inf)
    return float(distances.min(dim=1).values.mean())
