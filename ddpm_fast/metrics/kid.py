"""Kernel Inception distance (Binkowski et al. 2018, arXiv 1801.01401): an unbiased squared MMD of features."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import noise
from ._rows import as_pair, blocks


@dataclasses.dataclass(frozen=True)
class Kid:
    """Mean and standard deviation (of N - 1) of `kernel_distance` over subsets. The mean may be below 0."""

    mean: float
    std: float
    subsets: int
    subset_size: int

    @property
    def standard_error(self) -> float:
        """Of the mean, subsets taken as independent; too small where they overlap much."""
        return self.std / math.sqrt(self.subsets)


def kernel_distance(x: Any, y: Any) -> float:
    """Squared maximum mean discrepancy between two sets of features, the U-statistic over all pairs, in float64:

        mean over i != j of k(x_i, x_j) + mean over i != j of k(y_i, y_j) - 2 mean of k(x_i, y_j)

    with the kernel k(a, b) = (a.b / D + 1)^3 (Binkowski et al. 2018, section 4; the MMD: Gretton et al. 2012, eq. 3).
    Right on average for any number of samples, so it may be below 0. Memory is bounded; the work is (N + M)^2 D.

    Args:
        x: (N, ...) tensor or array, N >= 2.
        y: (M, ...), M >= 2, as many elements a sample.

    Raises ValueError for shapes that do not match, too few samples, and NaN or infinite values.
    """
    a, b = as_pair(("x", "y"), x, y, 2)
    return _distance(a, b)


def kid(x: Any, y: Any, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Kid:
    """`kernel_distance` over random subsets of both sets of features, as KID is reported: mean and deviation.

    Every subset is drawn without replacement, from x and from y, by random bits that are a function of the seed, the
    number of the subset and the index in the set.

    Args:
        x: (N, ...) tensor or array.
        y: (M, ...), as many elements a sample.
        subsets: how many.
        subset_size: of each, at most; where x or y holds fewer samples, that many.
        seed: of the choice.
    """
    if subsets < 1 or subset_size < 2:
        raise ValueError(f"subsets must be at least 1 and subset_size at least 2, got {subsets} and {subset_size}")
    a, b = as_pair(("x", "y"), x, y, 2)
    size = min(subset_size, a.shape[0], b.shape[0])
    values = []
    for subset in range(subsets):
        some, others = (_chosen(rows.shape[0], size, seed, 2 * subset + side) for side, rows in enumerate((a, b)))
        values.append(_distance(a[some.to(a.device)], b[others.to(b.device)]))
    return Kid(float(np.mean(values)), float(np.std(values, ddof=1)) if subsets > 1 else 0.0, subsets, size)


def _chosen(count: int, size: int, seed: int, draw: int) -> Tensor:
    """`size` of the indices below `count`: those with the smallest keys."""
    keys = noise.random_bits(seed, draw, 1, noise.STREAM_SUBSET, count)[0]
    return torch.from_numpy(np.argsort(keys, kind="stable")[:size])


def _distance(x: Tensor, y: Tensor) -> float:
    n, m = x.shape[0], y.shape[0]
    within_x = _kernel_sum(x, x) - float(_kernel(x.square().sum(1) / x.shape[1]).sum())
    within_y = _kernel_sum(y, y) - float(_kernel(y.square().sum(1) / y.shape[1]).sum())
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * _kernel_sum(x, y) / (n * m)


def _kernel(products: Tensor) -> Tensor:
    """k of a.b / D."""
    one_more = products + 1
    return one_more * one_more * one_more


def _kernel_sum(x: Tensor, y: Tensor) -> float:
    """Sum of k(x_i, y_j) over all pairs, a block of rows at a time."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for block in blocks(x, y.shape[0]):
        total += _kernel((block / x.shape[1]) @ y.T).sum()
    return float(total)
