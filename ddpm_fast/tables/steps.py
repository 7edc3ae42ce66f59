"""The coefficients of every reverse step, computed in float64 and stored as the float32 table that `ddpm_step` reads.

One row is a, b, c1, c2, c3, c4, s, clip:

    x0     = clip(a x - b m)                                  m: the network's output
    x_prev = c1 x0 + c2 x + c3 m + c4 x0_prev + s z           z: standard normal

With A = alphas_cumprod at the timestep that the row leaves, P = alphas_cumprod at the one it arrives at (1 at the data)
and beta = 1 - A/P, which is the schedule's own beta when no timestep is skipped:

    eps: a = 1/sqrt(A), b = sqrt(1/A - 1)      x0: a = 0, b = -1      v: a = sqrt(A), b = sqrt(1 - A)
    DDPM (eq. 7): c1 = sqrt(P) beta/(1-A), c2 = sqrt(A/P) (1-P)/(1-A), s^2 = beta (1-P)/(1-A) [small] or beta [large]
    DDIM (eq. 12): s = eta sqrt((1-P)/(1-A)) sqrt(1 - A/P), d = sqrt(1 - P - s^2), x_prev = sqrt(P) x0 + d eps + s z
    DPM-Solver++(2M): with lambda = log(sqrt(A) / sqrt(1-A)), h = lambda_P - lambda_A, r = (h of the row before) / h and
        k = -sqrt(P) (e^-h - 1): x_prev = sqrt((1-P)/(1-A)) x + k (1 + 1/(2 r)) x0 - k/(2 r) x0_prev, without the terms
        in r in row 0, which has no x0_prev, and in the last row, which arrives at the data, where h is infinite
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

import numpy as np
import torch

from .betas import Float64
from .levels import Levels
from .timesteps import Timesteps

if TYPE_CHECKING:
    from ..schedule import Schedule

METHODS = ("ddpm", "ddim", "dpmsolver++")
PREDICTIONS = ("eps", "x0", "v")
LEARNED = ("learned", "learned_range")
VARIANCES = ("fixed_small", "fixed_large", *LEARNED)
COLUMNS = ("a", "b", "c1", "c2", "c3", "c4", "s", "clip")


@dataclasses.dataclass(frozen=True, eq=False)
class StepTable:
    """The reverse process as `ddpm_step` wants it; row 0 is the first reverse step.

    table: float32 [steps, 8], columns COLUMNS (clip = inf: none).
    t_of_row: int32 [steps], the timestep that each row leaves.
    coefficients: float64 [steps, 8], what `table` was rounded from.
    timesteps: int64 [steps], the same as t_of_row on the host.
    logvar_range: float32 [steps, 2], the log of the smallest and of the largest variance of each row, between which a
        network with variance="learned_range" chooses; else None.
    """

    table: torch.Tensor
    t_of_row: torch.Tensor
    coefficients: Float64
    timesteps: Timesteps
    logvar_range: torch.Tensor | None = None

    @property
    def needs_history(self) -> bool:
        """Whether any row reads x0_prev, the x0 of the row before."""
        return bool(self.coefficients[:, COLUMNS.index("c4")].any())

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> StepTable:
        """The same table with its tensors on `device`."""
        limits = None if self.logvar_range is None else self.logvar_range.to(device)
        return dataclasses.replace(
            self, table=self.table.to(device), t_of_row=self.t_of_row.to(device), logvar_range=limits
        )


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
    set_alpha_to_one: bool,
    solver_order: int,
) -> StepTable:
    """The table for `timesteps` (strictly descending); the arguments are those of `Schedule.step_table`."""
    check_choice("method", method, METHODS)
    check_choice("prediction", prediction, PREDICTIONS)
    check_choice("variance", variance, VARIANCES)
    if isinstance(eta, bool) or not isinstance(eta, (int, float)):
        raise TypeError(f"eta must be a number, got {type(eta).__name__}")
    if not (math.isfinite(eta) and eta >= 0):
        raise ValueError(f"eta must be a finite number of at least 0, got {eta}")
    if eta and method == "dpmsolver++":
        raise ValueError(f'eta={eta} belongs to method="ddim"; method="dpmsolver++" adds no noise')
    if not set_alpha_to_one and method != "ddim":
        raise ValueError(f'set_alpha_to_one=False belongs to method="ddim", got method={method!r}')
    if isinstance(solver_order, bool) or solver_order not in (1, 2):
        raise ValueError(f"solver_order must be 1 or 2, got {solver_order!r}")
    if prediction == "eps" and schedule.has_zero_terminal_snr:
        raise ValueError(
            'prediction="eps" cannot be sampled on a schedule with zero terminal SNR: at the last timestep x_t is pure '
            'noise and eps says nothing about x0; use a model with prediction="v" or prediction="x0"'
        )
    bound = math.inf if thresholding else clip_range(clip)
    there = np.append(timesteps[1:], -1 if set_alpha_to_one else 0)
    coefficients = step_rows(
        schedule,
        timesteps,
        there,
        method=method,
        prediction=prediction,
        variance=variance,
        eta=eta,
        bound=bound,
        clipped=thresholding or math.isfinite(bound),
        rederive_eps=rederive_eps,
        solver_order=solver_order,
    )
    if set_alpha_to_one:
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
    limits = None
    if method == "ddpm" and variance == "learned_range":
        limits = torch.tensor(Levels(schedule, timesteps, there).logvar_range(), dtype=torch.float32, device="cpu")
    return StepTable(
        table=table,
        t_of_row=torch.tensor(timesteps, dtype=torch.int32, device="cpu"),
        coefficients=coefficients,
        timesteps=timesteps,
        logvar_range=limits,
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
    solver_order: int = 2,
) -> Float64:
    """float64 [rows, 8], COLUMNS: row i leaves timestep here[i] and arrives at there[i], at the data where that is -1.

    Its noise is the formula's, also at the data. clipped: x0 is bounded, by `bound` or by a threshold at run time.
    For method "dpmsolver++" each row begins where the one before it ended.
    """
    level = Levels(schedule, here, there)
    a, b = level.x0_from(prediction)
    if method == "ddpm":
        c1, c2, c3, c4, s = level.ddpm(variance)
    elif method == "ddim":
        c1, c2, c3, c4, s = level.ddim(eta, prediction, rederive=clipped and rederive_eps)
    else:
        c1, c2, c3, c4, s = level.dpmsolver(solver_order)
    if not clipped:
        # x0 = a x - b m put into the update: one rounding of x0 fewer, and the kernel need not form it.
        c1, c2, c3 = np.zeros_like(c1), c2 + c1 * a, c3 - c1 * b
    return np.stack([a, b, c1, c2, c3, c4, s, np.full_like(a, bound)], axis=1)
