"""The formulas of lucidrains' GaussianDiffusion on its buffers: what a step of it is, in torch, one call at a time."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..schedule import Schedule
from ._lucidrains_schedule import adopted, tables

ModelPrediction = namedtuple("ModelPrediction", ["pred_noise", "pred_x_start"])


def normalize_to_neg_one_to_one(img: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]; bytes 0..255 too."""
    return img.float() / 127.5 - 1 if img.dtype == torch.uint8 else img * 2 - 1


def unnormalize_to_zero_to_one(t: Tensor) -> Tensor:
    """[-1, 1] to [0, 1], not clamped."""
    return (t + 1) * 0.5


def identity(t: Tensor) -> Tensor:
    """t."""
    return t


def extract(values: Tensor, t: Tensor, x: Tensor) -> Tensor:
    """values[t] as (N, 1, ...), to go with x (N, ...)."""
    return values.gather(-1, t).reshape(-1, *[1] * (x.dim() - 1))


class Process(nn.Module):
    """Buffers and formulas. t is int64 (N,) and x float (N, C, H, W) everywhere."""

    _schedule: Schedule
    _seen: tuple[Tensor | None, int | None]

    betas: Tensor
    alphas_cumprod: Tensor
    alphas_cumprod_prev: Tensor
    sqrt_alphas_cumprod: Tensor
    sqrt_one_minus_alphas_cumprod: Tensor
    log_one_minus_alphas_cumprod: Tensor
    sqrt_recip_alphas_cumprod: Tensor
    sqrt_recipm1_alphas_cumprod: Tensor
    posterior_variance: Tensor
    posterior_log_variance_clipped: Tensor
    posterior_mean_coef1: Tensor
    posterior_mean_coef2: Tensor
    loss_weight: Tensor

    model: Any
    objective: str
    self_condition: bool
    immiscible: bool
    num_timesteps: int
    normalize: Callable[[Tensor], Tensor]
    unnormalize: Callable[[Tensor], Tensor]

    def _use(self, schedule: Schedule) -> None:
        self._schedule, self._seen = schedule, (None, None)
        for name, values in tables(schedule).items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32))

    @property
    def schedule(self) -> Schedule:
        """The noise schedule in float64: the constructor's, or that of the betas that were loaded since."""
        betas = self.betas
        mark = betas, None if betas.is_inference() else betas._version
        if mark[0] is not self._seen[0] or mark[1] != self._seen[1]:
            self._schedule, self._seen = adopted(self._schedule, betas), mark
        return self._schedule

    def __getstate__(self) -> dict[str, Any]:
        # A copy looks at its own betas.
        return {**self.__dict__, "_seen": (None, None)}

    @property
    def device(self) -> torch.device:
        """Where the buffers are."""
        return self.betas.device

    # -- x0, eps and v from one another -------------------------------------------------------------------------------

    def predict_start_from_noise(self, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x0 = x_t / sqrt(ab_t) - sqrt(1 / ab_t - 1) eps"""
        recip, recipm1 = (
            extract(v, t, x_t) for v in (self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod)
        )
        return recip * x_t - recipm1 * noise

    def predict_noise_from_start(self, x_t: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        """eps = (x_t / sqrt(ab_t) - x0) / sqrt(1 / ab_t - 1)"""
        recip, recipm1 = (
            extract(v, t, x_t) for v in (self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod)
        )
        return (recip * x_t - x0) / recipm1

    def predict_v(self, x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0 (Salimans and Ho 2022)"""
        signal, sigma = self._levels(t, x_start)
        return signal * noise - sigma * x_start

    def predict_start_from_v(self, x_t: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """x0 = sqrt(ab_t) x_t - sqrt(1 - ab_t) v"""
        signal, sigma = self._levels(t, x_t)
        return signal * x_t - sigma * v

    def _levels(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return extract(self.sqrt_alphas_cumprod, t, x), extract(self.sqrt_one_minus_alphas_cumprod, t, x)

    # -- the forward process ------------------------------------------------------------------------------------------

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps in one pass.

        noise: eps, used as it is; None draws it, and with immiscible=True assigns it to the images.
        """
        if noise is None:
            noise = self._assigned(x_start, torch.randn_like(x_start))
        x_t: Tensor = self._noised(x_start, t, noise)
        return x_t

    def _noised(self, x_start: Tensor, t: Tensor, noise: Tensor, target: str | None = None) -> Any:
        """x_t; with target also what a network is to predict there, in the same pass."""
        double = x_start.dtype == torch.float64
        eps = noise.to(torch.float64 if double else torch.float32)
        dtype = torch.promote_types(x_start.dtype, torch.float32 if double else self.betas.dtype)
        table = self.schedule.noising_table(x_start.device)
        if target is None:
            return ops.q_sample(x_start, t, table, noise=eps, dtype=dtype)
        return ops.q_sample(x_start, t, table, noise=eps, dtype=dtype, target=target)  # type: ignore[call-overload]

    def noise_assignment(self, x_start: Tensor, noise: Tensor) -> Tensor:
        """int64 (N,): which noise each image is given so that the distances add up to the least (Li et al. 2024,
        arXiv 2406.12303). ImportError without scipy.
        """
        distances = torch.cdist(x_start.detach().flatten(1).float(), noise.detach().flatten(1).float())
        _, columns = assignment()(distances.cpu().numpy())
        return torch.from_numpy(columns).to(x_start.device)

    def _assigned(self, x_start: Tensor, noise: Tensor) -> Tensor:
        return noise[self.noise_assignment(x_start, noise)] if self.immiscible else noise

    # -- the reverse process ------------------------------------------------------------------------------------------

    def q_posterior(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance (at least log 1e-20) of q(x_{t-1} | x_t, x0), DDPM eq. 7; the latter two
        are (N, 1, 1, 1).
        """
        mean = extract(self.posterior_mean_coef1, t, x_t) * x_start + extract(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, extract(self.posterior_variance, t, x_t), extract(self.posterior_log_variance_clipped, t, x_t)

    def _call(self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        output: Tensor = self.model(x, t, x_self_cond) if self.self_condition else self.model(x, t)
        return output

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> Any:
        """ModelPrediction(pred_noise, pred_x_start) at x_t = x.

        clip_x_start: x0 within [-1, 1]. rederive_pred_noise: with it, eps that goes with the clipped x0; for pred_x0
        and pred_v always.
        """
        m = self._call(x, t, x_self_cond)
        if self.objective == "pred_noise":
            x_start = self.predict_start_from_noise(x, t, m)
        else:
            x_start = m if self.objective == "pred_x0" else self.predict_start_from_v(x, t, m)
        if clip_x_start:
            x_start = x_start.clamp(-1.0, 1.0)
        if self.objective == "pred_noise" and not (clip_x_start and rederive_pred_noise):
            return ModelPrediction(m, x_start)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    def p_mean_variance(
        self, x: Tensor, t: Tensor, x_self_cond: Tensor | None = None, clip_denoised: bool = True
    ) -> tuple[Tensor, ...]:
        """(mean, variance, log variance, x0) of p(x_{t-1} | x_t); clip_denoised: x0 within [-1, 1]."""
        x_start = self.model_predictions(x, t, x_self_cond).pred_x_start
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        return *self.q_posterior(x_start, x, t), x_start

    @torch.inference_mode()
    def p_sample(self, x: Tensor, t: int, x_self_cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """One reverse step from x_t = x: (x_{t-1}, x0), noise from torch's generator, none at t = 0."""
        times = torch.full((x.shape[0],), t, device=x.device, dtype=torch.long)
        mean, _, log_variance, x_start = self.p_mean_variance(x=x, t=times, x_self_cond=x_self_cond, clip_denoised=True)
        if t == 0:
            return mean, x_start
        return mean + (0.5 * log_variance).exp() * torch.randn_like(x), x_start


def assignment() -> Callable[..., Any]:
    """scipy's linear_sum_assignment, or an ImportError that says what needs it."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("immiscible=True needs scipy to assign noise to images: pip install scipy") from error
    solve: Callable[..., Any] = linear_sum_assignment
    return solve
