"""Training losses of OpenAI's diffusion classes, and the variational bound in bits per dimension."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ._openai_process import LEARNED, Fn, Kwargs, LossType, ModelMeanType, Process

BITS = math.log(2.0)


class Training(Process):
    """`Process` with what is minimised."""

    def training_losses(
        self, model: Fn, x_start: Tensor, t: Tensor, model_kwargs: Kwargs = None, noise: Tensor | None = None
    ) -> dict[str, Tensor]:
        """ "loss", and with a squared error "mse" and for a learned variance "vb": each (N,), one per image.

        x_start: (N, C, H, W) in [-1, 1]. t: (N,) in 0..num_timesteps-1. noise None is torch.randn_like.
        The variational term trains the variance only: the prediction in it is detached.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        if noise.shape != x_start.shape:
            raise ValueError(f"noise must have shape {tuple(x_start.shape)}, got {tuple(noise.shape)}")
        x_t = self.q_sample(x_start, t, noise)
        output = self._call(model, x_t, t, model_kwargs)
        if self.loss_type in (LossType.KL, LossType.RESCALED_KL):
            bound, _ = self._bound(output, x_start, x_t, t, clip_denoised=False)
            return {"loss": bound * self.num_timesteps if self.loss_type is LossType.RESCALED_KL else bound}
        m, _ = self._parts(output, x_t, t)
        target = noise if self.model_mean_type is ModelMeanType.EPSILON else x_start
        terms = {"mse": _per_image((target - m) ** 2)}
        if self.model_var_type in LEARNED:
            detached = torch.cat([m.detach(), output.chunk(2, dim=1)[1]], dim=1)
            bound, _ = self._bound(detached, x_start, x_t, t, clip_denoised=False)
            rescaled = self.loss_type is LossType.RESCALED_MSE
            terms["vb"] = bound * (self.num_timesteps / 1000.0) if rescaled else bound
        return {**terms, "loss": terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]}

    def _bound(
        self, output: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, *, clip_denoised: bool
    ) -> tuple[Tensor, Tensor]:
        """One term of the variational bound, (N,) in bits per dimension, and pred_xstart.

        KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)), at t = 0 -log p(x0 | x_1) of x0 in steps of 1/127.5.
        """
        mean, _, logvar = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self._moments(output, x_t, t, clip_denoised)
        kl = _per_image(_gaussian_kl(mean, logvar, out["mean"], out["log_variance"]))
        nll = -_per_image(_log_probability(x_start, out["mean"], 0.5 * out["log_variance"]))
        return torch.where(t == 0, nll, kl) / BITS, out["pred_xstart"]

    @torch.no_grad()
    def calc_bpd_loop(
        self, model: Fn, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """The whole bound: total_bpd and prior_bpd (N,), and per timestep, T'-1 first, vb, xstart_mse, mse (N, T')."""
        terms: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        for step in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((x_start.shape[0],), step, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            output = self._call(model, x_t, t, model_kwargs)
            bound, x0 = self._bound(output, x_start, x_t, t, clip_denoised=clip_denoised)
            terms["vb"].append(bound)
            terms["xstart_mse"].append(_per_image((x0 - x_start) ** 2))
            terms["mse"].append(_per_image((self._eps_from_x0(x_t, t, x0) - noise) ** 2))
        columns = {name: torch.stack(values, dim=1) for name, values in terms.items()}
        prior = self._prior(x_start)
        return {"total_bpd": columns["vb"].sum(dim=1) + prior, "prior_bpd": prior, **columns}

    def _prior(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x0) || N(0, 1)), (N,) in bits per dimension."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, logvar = self.q_mean_variance(x_start, t)
        nothing: Any = torch.zeros((), device=x_start.device)
        return _per_image(_gaussian_kl(mean, logvar, nothing, nothing)) / BITS


def _per_image(x: Tensor) -> Tensor:
    return x.flatten(1).mean(dim=1)


def _gaussian_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)), elementwise, in nats."""
    difference = logvar2 - logvar1
    return 0.5 * (difference - 1.0 + torch.exp(-difference) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def _log_probability(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the mass that N(mean, e^(2 log_scale)) has within 1/255 of x; the outermost values reach to infinity."""
    inverse = torch.exp(-log_scale)
    above, below = (_normal_cdf(inverse * (x - mean + side)) for side in (1.0 / 255.0, -1.0 / 255.0))
    inside = torch.where(x > 0.999, 1.0 - below, above - below)
    return torch.log(torch.where(x < -0.999, above, inside).clamp(min=1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    """The approximation 0.5 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) of OpenAI's losses."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
