"""Improved precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020), of features."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ._rows import as_pair, blocks


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
    """precision, recall and coverage lie in [0, 1]; density may exceed 1. See `precision_recall`."""

    precision: float
    recall: float
    density: float
    coverage: float


def precision_recall(samples: Any, real: Any, *, k: int = 3) -> PrecisionRecall:
    """How much of the samples lies where the data is, and how much of the data where the samples are.

    Round every point of a set there is a ball that reaches to its k-th nearest neighbour in the same set, itself not
    counted. Then, with the balls closed:

        precision: share of the samples that lie in the ball of some real image
        recall: share of the real images that lie in the ball of some sample
                (Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1-2; k = 3 is theirs)
        density: number of real images in whose ball a sample lies, on average, over k
        coverage: share of the real images in whose ball some sample lies
                (Naeem et al. 2020, arXiv 2002.09797, eq. 3-4, where k = 5 is used)

    Precision and recall fall with the number of images; compare at equal numbers, N = M. Distances are of matrix
    products in float64, so two points within about 1e-7 of the features' spread count as one. Memory is bounded; the
    work is (N + M)^2 D.

    Args:
        samples: features (N, ...), N > k, tensor or array.
        real: features (M, ...), M > k, as many elements a sample.
        k: which neighbour the balls reach to.

    Raises ValueError for shapes that do not match, too few samples, and NaN or infinite values.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k must be an integer of at least 1, got {k!r}")
    fake, true = as_pair(("samples", "real"), samples, real, k + 1)
    middle = true.mean(0)  # products cancel least near the origin
    fake, true = fake - middle, true - middle
    to_true, to_fake = _radii(true, k), _radii(fake, k)
    inside_true = torch.zeros(fake.shape[0], dtype=torch.int64, device=fake.device)  # balls of `true` round each
    covered = torch.zeros(true.shape[0], dtype=torch.bool, device=fake.device)
    inside_fake = torch.zeros_like(covered)
    first = 0
    for block in blocks(fake, true.shape[0]):
        distances, slack = _squared(block, true)
        of_true = distances <= to_true + slack
        inside_true[first : first + len(block)] = of_true.sum(1)
        covered |= of_true.any(0)
        inside_fake |= (distances <= to_fake[first : first + len(block), None] + slack).any(0)
        first += len(block)
    return PrecisionRecall(
        precision=float((inside_true > 0).double().mean()),
        recall=float(inside_fake.double().mean()),
        density=float(inside_true.double().mean()) / k,
        coverage=float(covered.double().mean()),
    )


def _squared(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """|x_i - y_j|^2, and how far rounding may have taken it: sums of squares and products of up to D terms."""
    lengths = x.square().sum(1)[:, None] + y.square().sum(1)
    return (lengths - 2 * (x @ y.T)).clamp_(min=0), lengths * 1e-14


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row."""
    found, first = [], 0
    for block in blocks(x, x.shape[0]):
        distances, _ = _squared(block, x)
        own = torch.arange(len(block), device=x.device)
        distances[own, own + first] = torch.inf
        found.append(distances.topk(k, dim=1, largest=False).values[:, -1])
        first += len(block)
    return torch.cat(found)
