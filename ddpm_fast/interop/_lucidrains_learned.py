"""lucidrains' two variants of GaussianDiffusion: a learned variance, and a network that predicts both eps and x0."""

from __future__ import annotations

import math
from collections import namedtuple
from typing import Any

import torch
from torch import Tensor, nn

from ._lucidrains_diffusion import GaussianDiffusion, reduced
from ._lucidrains_process import ModelPrediction, extract

LearnedPrediction = namedtuple("LearnedPrediction", ["pred_noise", "pred_x_start", "pred_variance"])


class LearnedGaussianDiffusion(GaussianDiffusion):
    """The network says the variance too, between the posterior's and beta (Nichol and Dhariwal 2021, eq. 15 and 16).

    model: out_dim is twice its channels: eps, then v in [-1, 1], the place between the two log variances.
    vb_loss_weight: lambda, how much of the variational bound (in bits per dimension) is added to the loss on eps.
    arguments: those of `GaussianDiffusion`. The objective is "pred_noise" and no other; no self-conditioning.
    With sampling_timesteps < timesteps DDIM runs, which does not use the variance.
    """

    def __init__(self, model: nn.Module, vb_loss_weight: float = 0.001, **arguments: Any) -> None:
        if arguments.setdefault("objective", "pred_noise") != "pred_noise":
            raise ValueError(
                f'objective must be "pred_noise" with a learned variance, got {arguments["objective"]!r}; leave it out'
            )
        super().__init__(model, **arguments)
        _refuse_self_condition(self)
        self.vb_loss_weight = vb_loss_weight

    def _check_out_dim(self, channels: int, out_dim: int) -> None:
        if out_dim != 2 * channels:
            raise ValueError(
                f"model.out_dim must be twice model.channels, {2 * channels}, got {out_dim}; "
                "build the Unet with learned_variance=True"
            )

    def _sampled(self) -> tuple[Any, dict[str, Any]]:
        return self.model, {"prediction": "eps", "variance": "learned_range"}

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> Any:
        """LearnedPrediction(pred_noise, pred_x_start, pred_variance); pred_variance is v as the network gave it."""
        eps, v = self.model(x, t).chunk(2, dim=1)
        x_start = self.predict_start_from_noise(x, t, eps)
        if clip_x_start:
            x_start = x_start.clamp(-1.0, 1.0)
            eps = self.predict_noise_from_start(x, t, x_start) if rederive_pred_noise else eps
        return LearnedPrediction(eps, x_start, v)

    def p_mean_variance(  # type: ignore[override]
        self, *, x: Tensor, t: Tensor, clip_denoised: bool, model_output: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, ...]:
        """(mean, variance, log variance, x0), all like x. model_output: what the network gave at x, if it is known."""
        eps, v = (self.model(x, t) if model_output is None else model_output).chunk(2, dim=1)
        low, high = extract(self.posterior_log_variance_clipped, t, x), extract(torch.log(self.betas), t, x)
        f = (v + 1) * 0.5
        log_variance = f * high + (1 - f) * low
        x_start = self.predict_start_from_noise(x, t, eps)
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        return self.q_posterior(x_start, x, t)[0], log_variance.exp(), log_variance, x_start

    def p_losses(  # type: ignore[override]
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        clip_denoised: bool = False,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """L_hybrid = L_simple + lambda L_vlb; the bound's gradient goes to the variance alone, not to the mean."""
        noise = self._training_noise(x_start, noise, None)
        x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
        output = self.model(x_t, t)
        simple = self._distance(output.chunk(2, dim=1)[0], noise) * self.loss_weight.gather(-1, t)

        true_mean, _, true_log_variance = self.q_posterior(x_start=x_start, x_t=x_t, t=t)
        mean, _, log_variance, _ = self.p_mean_variance(x=x_t, t=t, clip_denoised=clip_denoised, model_output=output)
        mean = mean.detach()
        kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
        nll = -discretized_log_likelihood(x_start, mean, 0.5 * log_variance)
        bound = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2.0)
        return reduced(simple + self.vb_loss_weight * bound, loss_reduction)


class WeightedObjectiveGaussianDiffusion(GaussianDiffusion):
    """The network predicts eps and x0, and how much each estimate of x0 counts, by pixel.

    model: out_dim is twice its channels and 2: eps, x0, and two logits. No self-conditioning.
    pred_noise_loss_weight, pred_x_start_loss_weight: of the losses on eps and on x0, beside that on the mixture.
    arguments: those of `GaussianDiffusion`; objective has no effect, and there are no min-SNR weights.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        pred_noise_loss_weight: float = 0.1,
        pred_x_start_loss_weight: float = 0.1,
        **arguments: Any,
    ) -> None:
        if arguments.get("min_snr_loss_weight"):
            raise ValueError("min_snr_loss_weight is for one objective, and this class has several; leave it out")
        super().__init__(model, **arguments)
        _refuse_self_condition(self)
        self.split_dims = (self.channels, self.channels, 2)
        self.pred_noise_loss_weight = pred_noise_loss_weight
        self.pred_x_start_loss_weight = pred_x_start_loss_weight

    def _check_out_dim(self, channels: int, out_dim: int) -> None:
        if out_dim != 2 * channels + 2:
            raise ValueError(
                f"model.out_dim must be twice model.channels and 2, {2 * channels + 2}, for eps, x0 and two weights, "
                f"got {out_dim}; build the Unet with out_dim={2 * channels + 2}"
            )

    def _sampled(self) -> tuple[Any, dict[str, Any]]:
        return self._x0, {"prediction": "x0"}

    def _x0(self, x: Tensor, t: Tensor) -> Tensor:
        """The network as one that predicts x0."""
        return self._mixed(x, t, self.model(x, t))[0]

    def _mixed(self, x: Tensor, t: Tensor, output: Tensor, clip: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The mixture of the two estimates of x0, the network's eps and its x0. clip: bound on the estimate by eps."""
        eps, x_start, logits = output.split(self.split_dims, dim=1)
        by_eps = self.predict_start_from_noise(x, t, eps)
        if clip is not None:
            by_eps = by_eps.clamp(-clip, clip)
        share = logits.softmax(dim=1)
        return share[:, :1] * by_eps + share[:, 1:] * x_start, eps, x_start

    def model_predictions(
        self,
        x: Tensor,
        t: Tensor,
        x_self_cond: Tensor | None = None,
        clip_x_start: bool = False,
        rederive_pred_noise: bool = False,
    ) -> Any:
        """ModelPrediction(pred_noise, pred_x_start): the mixture, and the eps that goes with it."""
        x_start = self._x0(x, t)
        if clip_x_start:
            x_start = x_start.clamp(-1.0, 1.0)
        return ModelPrediction(self.predict_noise_from_start(x, t, x_start), x_start)

    def p_mean_variance(  # type: ignore[override]
        self, *, x: Tensor, t: Tensor, clip_denoised: bool, model_output: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, ...]:
        """(mean, variance, log variance, x0). model_output: what the network gave at x, if it is known."""
        x_start = self._mixed(x, t, self.model(x, t) if model_output is None else model_output)[0]
        if clip_denoised:
            x_start = x_start.clamp(-1.0, 1.0)
        return *self.q_posterior(x_start, x, t), x_start

    def p_losses(  # type: ignore[override]
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        clip_denoised: bool = False,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """Loss of the mixture (its estimate by eps within [-2, 2]), of x0 and of eps."""
        noise = self._training_noise(x_start, noise, None)
        x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
        mixture, eps, x0 = self._mixed(x_t, t, self.model(x_t, t), clip=2.0)
        each = self._distance(mixture, x_start)
        each = each + self.pred_x_start_loss_weight * self._distance(x0, x_start)
        return reduced(each + self.pred_noise_loss_weight * self._distance(eps, noise), loss_reduction)


def _refuse_self_condition(diffusion: GaussianDiffusion) -> None:
    if diffusion.self_condition:
        raise ValueError(
            f"{type(diffusion).__name__} does not serve a self-conditioned model; build it with self_condition=False"
        )


def normal_kl(mean1: Tensor, logvar1: Tensor, mean2: Tensor, logvar2: Tensor) -> Tensor:
    """KL(N(mean1, e^logvar1) || N(mean2, e^logvar2)), elementwise, in nats."""
    return 0.5 * (logvar2 - logvar1 - 1.0 + (logvar1 - logvar2).exp() + (mean1 - mean2) ** 2 * (-logvar2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the normal's mass on the 1/127.5 wide bin around x, one of 256 levels in [-1, 1]; the outer bins are open
    (DDPM eq. 13), with the tanh approximation of the normal's distribution function that the authors' code has.
    """
    scale = (-log_scale).exp()
    upper, lower = (_normal_cdf(scale * (x - mean + side / 255.0)) for side in (1.0, -1.0))
    inside = torch.where(x > 0.999, 1.0 - lower, upper - lower)
    return torch.where(x < -0.999, upper, inside).clamp(min=1e-15).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
