"""Betas of the named schedules, as float64 arrays of length T, and the check that betas are betas.

Each function is the formula behind the `Schedule` class method of the same name, which documents its arguments.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

Float64 = npt.NDArray[np.float64]


def linear(T: int, beta_start: float, beta_end: float, scale_betas: bool) -> Float64:
    scale = 1000.0 / checked_T(T) if scale_betas else 1.0
    return np.linspace(beta_start * scale, beta_end * scale, checked_T(T))


def scaled_linear(T: int, beta_start: float, beta_end: float) -> Float64:
    if beta_start < 0 or beta_end < 0:
        raise ValueError(
            f"scaled_linear takes square roots of its ends, got beta_start={beta_start}, beta_end={beta_end}"
        )
    return np.linspace(beta_start**0.5, beta_end**0.5, checked_T(T)) ** 2


def cosine(T: int, s: float, max_beta: float) -> Float64:
    u = _grid(T)
    return _following(np.cos((u + s) / (1.0 + s) * (math.pi / 2)) ** 2, max_beta)


def sigmoid_alphas_cumprod(T: int, start: float, end: float, tau: float, max_beta: float) -> Float64:
    if not (end > start and tau > 0):
        raise ValueError(
            f"sigmoid_alphas_cumprod needs start < end and tau > 0, got start={start}, end={end}, tau={tau}"
        )
    y = _sigmoid((start + _grid(T) * (end - start)) / tau)
    return _following((y[-1] - y) / (y[-1] - y[0]), max_beta)


def sigmoid_betas(T: int, beta_start: float, beta_end: float) -> Float64:
    return beta_start + _sigmoid(np.linspace(-6.0, 6.0, checked_T(T))) * (beta_end - beta_start)


def exponential(T: int, rate: float, max_beta: float) -> Float64:
    return _following(np.exp(-rate * _grid(T)), max_beta)


def laplace(T: int, max_beta: float) -> Float64:
    from_middle = 0.5 - _grid(T)
    log_r = -0.5 * np.copysign(1.0, from_middle) * np.log(1.0 - 2.0 * np.abs(from_middle) + 1e-6)
    r = np.exp(log_r)
    return _following(np.sqrt(r / (1.0 + r)), max_beta)


def zero_terminal_snr(betas: Float64, root: Float64) -> Float64:
    """Algorithm 1 of arXiv 2305.08891: root = sqrt(alphas_cumprod), shifted to end at 0, scaled to start as it did.

    The scale cancels in the ratios of neighbours, so keeping the first beta is all that it comes to.
    """
    if len(root) < 2:
        raise ValueError("rescale_zero_terminal_snr needs a schedule of at least 2 timesteps, got 1")
    shifted = (root - root[-1]) ** 2
    return np.concatenate([betas[:1], 1.0 - shifted[1:] / shifted[:-1]])


def checked_T(T: int) -> int:
    """T as an int of at least 1, else TypeError or ValueError."""
    if isinstance(T, bool) or not isinstance(T, (int, np.integer)):
        raise TypeError(f"T, the number of timesteps, must be an int, got {type(T).__name__}")
    if T < 1:
        raise ValueError(f"T, the number of timesteps, must be at least 1, got {T}")
    return int(T)


def checked_betas(betas: npt.ArrayLike | torch.Tensor) -> Float64:
    """A private float64 copy of betas, or ValueError/TypeError saying what is wrong with them and where."""
    values = betas.detach().cpu().double().numpy() if isinstance(betas, torch.Tensor) else betas
    try:
        result = np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"betas must be a 1-D sequence of numbers, got {type(betas).__name__}") from None
    if result.ndim != 1:
        raise ValueError(f"betas must be 1-D (one per timestep), got shape {result.shape}")
    if len(result) == 0:
        raise ValueError("betas must hold at least one timestep, got none")
    bad = ~((result > 0.0) & (result <= 1.0))  # true for NaN too
    if bad.any():
        t = int(np.argmax(bad))
        raise ValueError(f"betas must lie in (0, 1], got {result[t]} at t = {t}")
    if (result[:-1] == 1.0).any():
        t = int(np.argmax(result == 1.0))
        raise ValueError(
            f"betas may be 1 only at the last timestep (t = {len(result) - 1}), got 1 at t = {t}: "
            "no signal would be left for the timesteps after it"
        )
    return result


def _grid(T: int) -> Float64:
    """T + 1 times u = 0, 1/T, ..., 1."""
    return np.asarray(np.arange(checked_T(T) + 1) / T)


def _sigmoid(y: Float64) -> Float64:
    return np.asarray(1.0 / (1.0 + np.exp(-y)))


def _following(signal: Float64, max_beta: float) -> Float64:
    """Betas whose alphas_cumprod are signal[1:] / signal[0], none above max_beta."""
    return np.minimum(1.0 - signal[1:] / signal[:-1], max_beta)
