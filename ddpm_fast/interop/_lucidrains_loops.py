"""The reverse loops call by call, for subclasses of GaussianDiffusion that have steps of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.inference_mode()
def by_hand(diffusion: Any, x: Tensor, times: list[int] | None = None, ddim: bool = False) -> list[Tensor]:
    """x and every state after it: by `p_sample`, or with ddim by `model_predictions` and DDIM eq. 12.

    x: the state at times[0]. times: highest first, default all of them; the last step arrives at the data.
    """
    times = list(range(diffusion.num_timesteps - 1, -1, -1)) if times is None else times
    states, x_start = [x], None
    for t, t_next in zip(times, [*times[1:], -1], strict=True):
        told = x_start if diffusion.self_condition else None
        if ddim:
            x, x_start = _ddim_step(diffusion, x, t, t_next, told)
        else:
            x, x_start = diffusion.p_sample(x, t, told)
        states.append(x)
    return states


def _ddim_step(diffusion: Any, x: Tensor, t: int, t_next: int, told: Tensor | None) -> tuple[Tensor, Tensor]:
    times = torch.full((x.shape[0],), t, device=x.device)
    eps, x0, *_ = diffusion.model_predictions(x, times, told, clip_x_start=True, rederive_pred_noise=True)
    if t_next < 0:
        return x0, x0
    A, P = diffusion.alphas_cumprod[t], diffusion.alphas_cumprod[t_next]
    s = diffusion.ddim_sampling_eta * ((1 - A / P) * (1 - P) / (1 - A)).sqrt()
    return x0 * P.sqrt() + (1 - P - s**2).sqrt() * eps + s * torch.randn_like(x), x0
