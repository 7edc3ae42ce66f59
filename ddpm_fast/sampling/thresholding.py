"""Dynamic thresholding (Saharia et al. 2022): the bound on |x0| that each sample sets itself."""

from __future__ import annotations

import math

from torch import Tensor


def dynamic_threshold(x0: Tensor, ratio: float, max_value: float) -> Tensor:
    """(N,): the ratio-quantile of |x0| over each sample of (N, ...), within [1, max_value]."""
    size = x0.abs().flatten(1).sort(dim=1).values
    # Between the two order statistics around it, as torch.quantile, which refuses large batches.
    position = ratio * (size.shape[1] - 1)
    low, high = math.floor(position), math.ceil(position)
    quantile = size[:, low] + (position - low) * (size[:, high] - size[:, low])
    return quantile.clamp(1.0, max_value)
