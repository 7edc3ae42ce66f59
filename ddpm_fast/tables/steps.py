"""The coefficients of every reverse step, computed in float64 and stored as the float32 table that `ddpm_step` reads.

One row is a, b, c1, c2, c3, c4, s, clip:

    x0     = clip(a x - b m)                                  m: the network's output
    x_prev = c1 x0 + c2 x + c3 m + c4 x0_prev + s z           z: standard normal

With A = alphas_cumprod at the timestep that the row leaves, P = alphas_cumprod at the one it arrives at (1 at the data)
and beta = 1 - A/P, which is the schedule's own beta when no timestep is skipped:

    eps: a = 1/sqrt(A), b = sqrt(1/A - 1)      x0: a = 0, b = -1      v: a = sqrt(A), b = sqrt(1 - A)
    DDPM (eq. 7): c1 = sqrt(P) beta/(1-A), c2 = sqrt(A/P) (1-P)/(1-A), s^2 = beta (1-P)/(1-A) [small] or beta [large]
    DDIM (eq. 12): s = eta sqrt((1-P)/(1-A)) sqrt(1 - A/P), d = sqrt(1 - P - s^2), x_prev = sqrt(P) x0 + d eps + s z
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from .betas import Float64
from .timesteps import Timesteps

if TYPE_CHECKING:
    from ..schedule import Schedule

METHODS = ("ddpm", "ddim")
PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("fixed_small", "fixed_large")
COLUMNS = ("a", "b", "c1", "c2", "c3", "c4", "s", "clip")


@dataclasses.dataclass(frozen=True, eq=False)
class StepTable:
    """The reverse process as `ddpm_step` wants it; row 0 is the first reverse step.

    table: float32 [steps, 8], columns COLUMNS (clip = inf: none).
    t_of_row: int32 [steps], the timestep that each row leaves.
    coefficients: float64 [steps, 8], what `table` was rounded from.
    timesteps: int64 [steps], the same as t_of_row on the host.
    """

    table: torch.Tensor
    t_of_row: torch.Tensor
    coefficients: Float64
    timesteps: Timesteps

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> StepTable:
        """The same table with both tensors on `device`."""
        return dataclasses.replace(self, table=self.table.to(device), t_of_row=self.t_of_row.to(device))


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """ValueError naming the argument and what is known, unless `value` is one of them."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def clip_range(clip: float | bool | None) -> float:
    """The bound on |x0|: inf for None and False, 1 for True, else the number, which must be positive."""
    if clip is None or clip is False:
        return math.inf
    if clip is True:
        return 1.0
    if not isinstance(clip, (int, float)):
        raise TypeError(f"clip must be a bool, a positive number or None, got {type(clip).__name__}")
    if not clip > 0:
        raise ValueError(f"clip must be a positive bound on |x0| (or False for none), got {clip}")
    return float(clip)


def build_step_table(
    schedule: Schedule,
    timesteps: Timesteps,
    *,
    method: str,
    prediction: str,
    variance: str,
    eta: float,
    clip: float | bool | None,
    thresholding: bool,
    rederive_eps: bool,
) -> StepTable:
    """The table for `timesteps` (strictly descending); the arguments are those of `Schedule.step_table`."""
    check_choice("method", method, METHODS)
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("variance", variance, VARIANCES)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)):
        raise TypeError(f"eta must be a number, got {type(eta).__name__}")
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be a finite number of at least 0, got {eta}")
    if prediction == "eps" and schedule.has_zero_terminal_snr:
        raise ValueError(
            'prediction="eps" cannot be sampled on a schedule with zero terminal SNR: at the last timestep x_t is pure '
            'noise and eps says nothing about x0; use a model with prediction="v" or prediction="x0"'
        )
    bound = math.inf if thresholding else clip_range(clip)
    coefficients = step_rows(
        schedule,
        timesteps,
        np.append(timesteps[1:], -1),
        method=method,
        prediction=prediction,
        variance=variance,
        eta=eta,
        bound=bound,
        clipped=thresholding or math.isfinite(bound),
        rederive_eps=rederive_eps,
    )
    coefficients[-1, COLUMNS.index("s")] = 0.0  # no noise is added to the data
    coefficients.setflags(write=False)
    table = torch.tensor(coefficients, dtype=torch.float32, device="cpu")
    overflowing = ~torch.isfinite(table[:, :7]).all(dim=1)
    if overflowing.any():
        t = int(timesteps[int(overflowing.int().argmax())])
        raise ValueError(
            f"the coefficients of t = {t} do not fit float32: too little signal is left there for "
            f'prediction={prediction!r}; use prediction="v" or "x0", or smaller betas'
        )
    return StepTable(
        table=table,
        t_of_row=torch.tensor(timesteps, dtype=torch.int32, device="cpu"),
        coefficients=coefficients,
        timesteps=timesteps,
    )


def step_rows(
    schedule: Schedule,
    here: Timesteps,
    there: Timesteps,
    *,
    method: str,
    prediction: str,
    variance: str,
    eta: float,
    bound: float,
    clipped: bool,
    rederive_eps: bool,
) -> Float64:
    """float64 [rows, 8], COLUMNS: row i leaves timestep here[i] and arrives at there[i], at the data where that is -1.

    Its noise is the formula's, also at the data. clipped: x0 is bounded, by `bound` or by a threshold at run time.
    """
    level = _Levels(schedule, here, there)
    a, b = level.x0_from(prediction)
    if method == "ddpm":
        c1, c2, c3, s = level.ddpm(variance)
    else:
        c1, c2, c3, s = level.ddim(eta, prediction, rederive=clipped and rederive_eps)
    if not clipped:
        # x0 = a x - b m put into the update: one rounding of x0 fewer, and the kernel need not form it.
        c1, c2, c3 = np.zeros_like(c1), c2 + c1 * a, c3 - c1 * b
    return np.stack([a, b, c1, c2, c3, np.zeros_like(a), s, np.full_like(a, bound)], axis=1)


class _Levels:
    """Signal and noise of each row, before and after it: A, P, their roots, and those of 1 - A and 1 - P."""

    def __init__(self, schedule: Schedule, here: Timesteps, there: Timesteps) -> None:
        def at_both_ends(values: Float64, at_data: float) -> tuple[Float64, Float64]:
            return values[here], np.where(there >= 0, values[there], at_data)

        self.A, self.P = at_both_ends(schedule.alphas_cumprod, 1.0)
        self.sqrt_A, self.sqrt_P = at_both_ends(schedule.sqrt_alphas_cumprod, 1.0)
        self.noise_A, self.noise_P = at_both_ends(schedule.one_minus_alphas_cumprod, 0.0)
        self.sigma_A, self.sigma_P = at_both_ends(schedule.sqrt_one_minus_alphas_cumprod, 0.0)
        # 1 - A/P as a difference of noise levels, which loses less to cancellation than one of ratios near 1.
        self.beta = (self.noise_A - self.noise_P) / self.P

    def x0_from(self, prediction: str) -> tuple[Float64, Float64]:
        """a and b of x0 = a x - b m."""
        if prediction == "eps":
            return 1.0 / self.sqrt_A, self.sigma_A / self.sqrt_A
        if prediction == "v":
            return self.sqrt_A, self.sigma_A
        return np.zeros_like(self.A), np.full_like(self.A, -1.0)

    def eps_from(self, prediction: str) -> tuple[Float64, Float64]:
        """p and q of eps = p x + q m, taken from the network's own output and not from a clipped x0."""
        if prediction == "eps":
            return np.zeros_like(self.A), np.ones_like(self.A)
        if prediction == "v":
            return self.sigma_A, self.sqrt_A
        return 1.0 / self.sigma_A, -self.sqrt_A / self.sigma_A

    def ddpm(self, variance: str) -> tuple[Float64, Float64, Float64, Float64]:
        """c1, c2, c3 and s of the posterior q(x_prev | x_t, x0)."""
        c1 = self.sqrt_P * self.beta / self.noise_A
        c2 = self.sqrt_A / self.sqrt_P * self.noise_P / self.noise_A
        small = self.beta * self.noise_P / self.noise_A
        s = np.sqrt(small if variance == "fixed_small" else self.beta)
        return c1, c2, np.zeros_like(c1), s

    def ddim(self, eta: float, prediction: str, rederive: bool) -> tuple[Float64, Float64, Float64, Float64]:
        """c1, c2, c3 and s; `rederive` takes eps from the clipped x0, else from the network's output."""
        s = eta * (self.sigma_P / self.sigma_A) * np.sqrt(self.beta)
        d_squared = self.noise_P - s * s
        # At eta = 1 on a zero-SNR step the two are equal, and a rounding error must not turn the root into a NaN.
        if (d_squared < -1e-12).any():
            row = int(np.argmin(d_squared))
            raise ValueError(
                f"eta={eta} adds more noise in row {row} than the state there may hold; choose eta in [0, 1]"
            )
        d = np.sqrt(np.maximum(d_squared, 0.0))
        if rederive:
            c2 = d / self.sigma_A
            return self.sqrt_P - self.sqrt_A * c2, c2, np.zeros_like(d), s
        p, q = self.eps_from(prediction)
        return self.sqrt_P.copy(), d * p, d * q, s
