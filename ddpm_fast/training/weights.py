"""Loss weights per timestep, from the signal-to-noise ratio of a schedule, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..schedule import Schedule

WEIGHTINGS = ("min-snr", "p2")


def loss_weights(
    schedule: Schedule,
    weighting: str | None,
    prediction: str,
    *,
    min_snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
) -> Tensor | None:
    """float64 [T]: what the loss against eps, x0 or v is multiplied by at each timestep; None where that is 1.

    "min-snr" (Hang et al. 2023, arXiv 2303.09556): min(snr, gamma) as a weight of the error of x0, hence for
        eps: min(snr, gamma) / snr;   x0: min(snr, gamma);   v: min(snr, gamma) / (snr + 1).
    "p2" (Choi et al. 2022, arXiv 2204.00227): 1 / (k + snr)^gamma, whatever is predicted.
    """
    if weighting is None:
        return None
    snr = schedule.snr
    if weighting == "p2":
        return torch.from_numpy((p2_k + snr) ** -p2_gamma)
    if prediction == "x0":
        weights = np.minimum(snr, min_snr_gamma)
    elif prediction == "v":
        weights = np.minimum(snr, min_snr_gamma) / (snr + 1)
    else:
        # min(snr, gamma) / snr, which is 1 where there is no signal at all
        weights = np.ones_like(snr)
        np.divide(min_snr_gamma, snr, out=weights, where=snr > min_snr_gamma)
    return torch.from_numpy(weights)
