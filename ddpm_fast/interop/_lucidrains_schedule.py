"""lucidrains' noise schedules, buffers, loss weights and DDIM timesteps, in float64 from `ddpm_fast.Schedule`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..schedule import Schedule
from ..tables.betas import Float64

OBJECTIVES = {"pred_noise": "eps", "pred_x0": "x0", "pred_v": "v"}
# Their name -> ours, and the arguments of their function. clamp_min has no effect there, and none here.
SCHEDULES: dict[str, tuple[str, tuple[str, ...]]] = {
    "linear": ("linear", ()),
    "cosine": ("cosine", ("s",)),
    "sigmoid": ("sigmoid_alphas_cumprod", ("start", "end", "tau", "clamp_min")),
}
# Two schedules whose float32 betas are this close are one schedule, rounded twice.
SAME = 1e-6


def schedule_of(name: str, timesteps: int, options: Mapping[str, Any]) -> Schedule:
    """The schedule of T timesteps by lucidrains' name for it; linear betas are scaled by 1000 / T, as there."""
    if not isinstance(name, str) or name not in SCHEDULES:
        raise ValueError(f"beta_schedule must be one of {', '.join(SCHEDULES)}, got {name!r}")
    if not isinstance(options, Mapping):
        raise TypeError(f"schedule_fn_kwargs must be a mapping of option to value, got {options!r}")
    ours, known = SCHEDULES[name]
    unknown = [option for option in options if option not in known]
    if unknown:
        takes = f"takes {', '.join(known)}" if known else "takes none"
        raise ValueError(f"schedule_fn_kwargs: {name!r} {takes}, got {', '.join(unknown)}")
    chosen = {option: value for option, value in options.items() if option != "clamp_min"}
    if name == "linear":
        chosen["scale_betas"] = True
    return Schedule.named(ours, timesteps, **chosen)


def tables(schedule: Schedule) -> dict[str, Float64]:
    """The twelve buffers that follow from the betas, by lucidrains' names, float64 [T]."""
    betas, A, P = schedule.betas, schedule.alphas_cumprod, schedule.alphas_cumprod_prev
    noise = schedule.one_minus_alphas_cumprod
    noise_before = np.concatenate([[0.0], noise[:-1]])
    variance = betas * noise_before / noise
    with np.errstate(divide="ignore"):  # a schedule may end without any signal
        recip, recipm1 = np.sqrt(1.0 / A), np.sqrt(noise / A)
    return {
        "betas": betas,
        "alphas_cumprod": A,
        "alphas_cumprod_prev": P,
        "sqrt_alphas_cumprod": schedule.sqrt_alphas_cumprod,
        "sqrt_one_minus_alphas_cumprod": schedule.sqrt_one_minus_alphas_cumprod,
        "log_one_minus_alphas_cumprod": np.log(noise),
        "sqrt_recip_alphas_cumprod": recip,
        "sqrt_recipm1_alphas_cumprod": recipm1,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),  # it is 0 at t = 0
        "posterior_mean_coef1": betas * np.sqrt(P) / noise,
        "posterior_mean_coef2": noise_before * np.sqrt(schedule.alphas) / noise,
    }


def loss_weight(snr: Float64, objective: str, gamma: float | None) -> Float64:
    """The weight of each timestep, float64 [T]: eps c/snr, x0 c, v c/(snr + 1), with c = snr, or min(snr, gamma) for
    min-SNR (Hang et al. 2023, arXiv 2303.09556).
    """
    c = snr if gamma is None else np.minimum(snr, gamma)
    if objective != "pred_noise":
        return np.asarray(c / (snr + 1.0) if objective == "pred_v" else c)
    with np.errstate(divide="ignore"):  # linear betas of 20 steps end in snr = 0, where c / snr is 1
        return np.ones_like(snr) if gamma is None else np.minimum(1.0, gamma / snr)


def objective_of(weight: Tensor, snr: Float64) -> tuple[str, float | None] | None:
    """The objective, and the min-SNR gamma or None, whose weights these are; None where there is none.

    The weight times what the objective divides by is min(snr, gamma), and no two objectives agree in that.
    """
    given = weight.detach().cpu().double().numpy()
    near = max(1e-4, 4 * torch.finfo(weight.dtype).eps)
    for objective, divisor in (("pred_noise", snr), ("pred_x0", 1.0), ("pred_v", snr + 1.0)):
        c = given * divisor
        gamma = float(c.max())
        expected = torch.from_numpy(np.asarray(np.minimum(snr, gamma) / divisor)).to(weight.dtype).double().numpy()
        if np.allclose(given, expected, rtol=near, atol=0.0):
            return objective, None if gamma >= snr.max() * (1.0 - near) else gamma
    return None


def ddim_times(timesteps: int, steps: int) -> list[int]:
    """The timesteps of a DDIM run, highest first: a float32 grid from -1 to T - 1 without its first point, cut off.

    Torch's own grid, because the rounding of its points decides some of the timesteps.
    """
    grid = torch.linspace(-1, timesteps - 1, steps=steps + 1, dtype=torch.float32, device="cpu")
    times: list[int] = grid.int().tolist()
    return times[:0:-1]


def adopted(schedule: Schedule, betas: Tensor) -> Schedule:
    """The schedule itself if `betas`, a buffer, are its own, rounded; else the schedule of those betas."""
    if betas.dtype not in (torch.float32, torch.float64) or betas.device.type == "meta":
        return schedule  # a module cast to half precision says nothing about its schedule any more
    given = betas.detach().cpu().double().numpy()
    if given.shape == schedule.betas.shape and np.allclose(given, schedule.betas, rtol=SAME, atol=0.0):
        return schedule
    return Schedule.from_betas(given)
