"""The tables of OpenAI's diffusion classes, and one step of the process by formula: what is called step by step.

Whole loops run on `Sampler` (`_openai_diffusion`); these are for training, for guidance by functions, and for callers.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import ops
from ..nn import DDPMUNet
from ..schedule import Schedule

Fn = Callable[..., Any]
Kwargs = Mapping[str, Any] | None


class ModelMeanType(enum.Enum):
    """What the network predicts. PREVIOUS_X is not covered."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of a reverse step. LEARNED: its logarithm is the second half of the output; LEARNED_RANGE: where it
    lies between those of FIXED_SMALL (-1) and FIXED_LARGE (1) is.
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """MSE (with a variational term for a learned variance, in RESCALED_MSE times T / 1000) or that term alone (KL, in
    RESCALED_KL times T).
    """

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()


LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


class Process:
    """A diffusion process over some of the timesteps of another. Below, t counts the timesteps that are left, 0..T'-1.

    use_timesteps: those of 0..T-1 that are kept. betas: (T,) of the original process.
    rescale_timesteps: the network is told the original timestep times 1000 / T, float32, instead of itself, int64.
    Attributes: OpenAI's tables under their names, float64 of length T'; num_timesteps T'; timestep_map, the original
    timesteps, ascending; schedule, the original `Schedule`, and spaced, that of the kept ones.
    """

    def __init__(
        self,
        use_timesteps: Collection[int],
        *,
        betas: npt.ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType = LossType.MSE,
        rescale_timesteps: bool = False,
    ) -> None:
        for name, value, kind in (
            ("model_mean_type", model_mean_type, ModelMeanType),
            ("model_var_type", model_var_type, ModelVarType),
            ("loss_type", loss_type, LossType),
        ):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {value!r}")
        if model_mean_type is ModelMeanType.PREVIOUS_X:
            raise ValueError("model_mean_type PREVIOUS_X is not covered; covered are EPSILON and START_X")
        self.model_mean_type, self.model_var_type, self.loss_type = model_mean_type, model_var_type, loss_type
        self.rescale_timesteps = rescale_timesteps
        self.schedule = Schedule(betas)
        self.original_num_steps = self.schedule.num_timesteps
        self.use_timesteps = set(use_timesteps)
        descending = self.schedule.timesteps(sorted(self.use_timesteps, reverse=True))
        self.timestep_map = [int(t) for t in descending[::-1]]
        self.num_timesteps = len(self.timestep_map)
        kept = self.schedule.alphas_cumprod[self.timestep_map]
        whole = self.num_timesteps == self.original_num_steps
        self.spaced = self.schedule if whole else Schedule(1.0 - kept / np.append(1.0, kept[:-1]))
        self._make_tables()
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}

    def _make_tables(self) -> None:
        s = self.spaced
        A, P, noise = s.alphas_cumprod, s.alphas_cumprod_prev, s.one_minus_alphas_cumprod
        self.betas, self.alphas_cumprod, self.alphas_cumprod_prev = s.betas, A, P
        self.alphas_cumprod_next = np.append(A[1:], 0.0)
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = s.sqrt_alphas_cumprod, np.sqrt(noise)
        with np.errstate(divide="ignore"):  # a schedule may end without any signal
            self.log_one_minus_alphas_cumprod = np.log(noise)
            self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = 1.0 / np.sqrt(A), np.sqrt(noise / A)
        self.posterior_variance = s.betas * np.append(0.0, noise[:-1]) / noise
        # The first is 0, and its logarithm is never used with noise: it takes the next one's, as OpenAI's does.
        first = self.posterior_variance[1] if self.num_timesteps > 1 else s.betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = s.betas * np.sqrt(P) / noise
        self.posterior_mean_coef2 = np.append(0.0, noise[:-1]) * np.sqrt(s.alphas) / noise
        self._log_betas = np.log(s.betas)
        self._fixed_large = np.append(first, s.betas[1:])
        self._log_fixed_large = np.log(self._fixed_large)

    def _at(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        """The table's float32 values at t, (N, 1, ...) for images like x. A table goes to a device once."""
        key = (name, x.device)
        if key not in self._on_device:
            values = torch.tensor(np.asarray(getattr(self, name)), dtype=torch.float32)
            with torch.inference_mode(False):
                self._on_device[key] = values.to(x.device)
        return self._on_device[key][t].view(-1, *[1] * (x.dim() - 1))

    def _check_t(self, x: Tensor, t: Tensor) -> None:
        if t.shape != x.shape[:1] or t.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"t must be int64 or int32 of shape ({x.shape[0]},), got {t.dtype} {tuple(t.shape)}")
        if t.device.type == "cpu" and len(t) and not 0 <= int(t.min()) <= int(t.max()) < self.num_timesteps:
            raise ValueError(f"t must lie in 0..{self.num_timesteps - 1}, got {int(t.min())}..{int(t.max())}")

    def _told(self, t: Tensor) -> Tensor:
        """What the network is told as t."""
        original = torch.tensor(self.timestep_map, device=t.device)[t]
        return original.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else original

    def _call(self, model: Fn, x: Tensor, t: Tensor, model_kwargs: Kwargs) -> Tensor:
        """What the network returns; labels are called y here."""
        kwargs = dict(model_kwargs or {})
        if type(model) is DDPMUNet and "y" in kwargs:
            kwargs["labels"] = kwargs.pop("y")
        output: Tensor = model(x, self._told(t), **kwargs)
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}}

    # -- the forward process ----------------------------------------------------------------------------------------

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log variance of q(x_t | x0), each in the shape of x0."""
        self._check_t(x_start, t)
        root, logvar = (self._at(name, t, x_start) for name in ("sqrt_alphas_cumprod", "log_one_minus_alphas_cumprod"))
        return root * x_start, logvar.exp().expand_as(x_start), logvar.expand_as(x_start)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(A_t) x0 + sqrt(1 - A_t) noise (DDPM eq. 4), one fused pass; noise None is torch.randn_like."""
        self._check_t(x_start, t)
        noise = torch.randn_like(x_start) if noise is None else noise
        if x_start.dtype != torch.float64:
            noise = noise.float()
        return ops.q_sample(x_start, t, self.spaced.noising_table(x_start.device), noise=noise)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x0) (DDPM eq. 7)."""
        c1, c2 = (self._at(f"posterior_mean_coef{i}", t, x_t) for i in (1, 2))
        variance, logvar = (
            self._at(name, t, x_t).expand_as(x_t) for name in ("posterior_variance", "posterior_log_variance_clipped")
        )
        return c1 * x_start + c2 * x_t, variance, logvar

    # -- one reverse step -------------------------------------------------------------------------------------------

    def p_mean_variance(
        self,
        model: Fn,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Fn | None = None,
        model_kwargs: Kwargs = None,
    ) -> dict[str, Tensor]:
        """mean, variance and log_variance of p(x_{t-1} | x_t), and pred_xstart; each in the shape of x.

        denoised_fn is applied to the estimate of x0, before it is clipped to [-1, 1].
        """
        self._check_t(x, t)
        return self._moments(self._call(model, x, t, model_kwargs), x, t, clip_denoised, denoised_fn)

    def _moments(
        self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool, denoised_fn: Fn | None = None
    ) -> dict[str, Tensor]:
        """The same from what the network returned."""
        m, logvar = self._parts(output, x, t)
        x0 = m if self.model_mean_type is ModelMeanType.START_X else self._x0_from_eps(x, t, m)
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        if self.model_var_type is ModelVarType.FIXED_SMALL:  # whose first is 0, and its logarithm another's
            variance = self._at("posterior_variance", t, x).expand_as(x)
        else:
            variance = logvar.exp()
        mean = self.q_posterior_mean_variance(x0, x, t)[0]
        return {"mean": mean, "variance": variance, "log_variance": logvar, "pred_xstart": x0}

    def _parts(self, output: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction and the log variance, in the shape of x."""
        channels = x.shape[1] * (1 + (self.model_var_type in LEARNED))
        if output.shape != (x.shape[0], channels, *x.shape[2:]):
            expected, kind = (x.shape[0], channels, *x.shape[2:]), self.model_var_type.name
            raise ValueError(f"the model must return shape {expected} for {kind}, got {tuple(output.shape)}")
        if self.model_var_type not in LEARNED:
            large = self.model_var_type is ModelVarType.FIXED_LARGE
            name = "_log_fixed_large" if large else "posterior_log_variance_clipped"
            return output, self._at(name, t, x).expand_as(x)
        m, v = output.chunk(2, dim=1)
        if self.model_var_type is ModelVarType.LEARNED:
            return m, v
        low, high = (self._at(name, t, x) for name in ("posterior_log_variance_clipped", "_log_betas"))
        share = (v + 1) / 2
        return m, share * high + (1 - share) * low

    def _x0_from_eps(self, x: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        root, ratio = (self._at(f"sqrt_{name}_alphas_cumprod", t, x) for name in ("recip", "recipm1"))
        x0: Tensor = root * x - ratio * eps
        return x0

    def _eps_from_x0(self, x: Tensor, t: Tensor, x0: Tensor) -> Tensor:
        root, ratio = (self._at(f"sqrt_{name}_alphas_cumprod", t, x) for name in ("recip", "recipm1"))
        eps: Tensor = (root * x - x0) / ratio
        return eps

    def condition_mean(
        self, cond_fn: Fn, p_mean_var: Mapping[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> Tensor:
        """mean + variance * cond_fn(x, t): guidance of a DDPM step by the gradient of a log probability."""
        gradient = cond_fn(x, self._told(t), **(model_kwargs or {}))
        mean: Tensor = p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()
        return mean

    def condition_score(
        self, cond_fn: Fn, p_mean_var: Mapping[str, Tensor], x: Tensor, t: Tensor, model_kwargs: Kwargs = None
    ) -> dict[str, Tensor]:
        """What `p_mean_variance` would give had the network's eps been eps - sqrt(1 - A_t) cond_fn(x, t)."""
        gradient = cond_fn(x, self._told(t), **(model_kwargs or {}))
        eps = self._eps_from_x0(x, t, p_mean_var["pred_xstart"])
        eps = eps - self._at("sqrt_one_minus_alphas_cumprod", t, x) * gradient
        x0 = self._x0_from_eps(x, t, eps)
        return {**p_mean_var, "pred_xstart": x0, "mean": self.q_posterior_mean_variance(x0, x, t)[0]}

    def p_sample(
        self,
        model: Fn,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Fn | None = None,
        cond_fn: Fn | None = None,
        model_kwargs: Kwargs = None,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """sample, x_{t-1} drawn from p(x_{t-1} | x_t), and pred_xstart."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        mean = out["mean"] if cond_fn is None else self.condition_mean(cond_fn, out, x, t, model_kwargs)
        sample = mean + _some_noise(x, t, generator) * torch.exp(0.5 * out["log_variance"])
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self,
        model: Fn,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Fn | None = None,
        cond_fn: Fn | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
        *,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The same by DDIM (eq. 12); eps is derived anew from the estimate of x0."""
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        if cond_fn is not None:
            out = self.condition_score(cond_fn, out, x, t, model_kwargs)
        x0, eps = out["pred_xstart"], self._eps_from_x0(x, t, out["pred_xstart"])
        A, P = (self._at(name, t, x) for name in ("alphas_cumprod", "alphas_cumprod_prev"))
        sigma = eta * torch.sqrt((1 - P) / (1 - A)) * torch.sqrt(1 - A / P)
        mean = P.sqrt() * x0 + torch.sqrt(1 - P - sigma**2) * eps
        noise = _some_noise(x, t, generator) if eta else 0.0
        return {"sample": mean + sigma * noise, "pred_xstart": x0}

    def ddim_reverse_sample(
        self,
        model: Fn,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Fn | None = None,
        model_kwargs: Kwargs = None,
        eta: float = 0.0,
    ) -> dict[str, Tensor]:
        """sample, x_{t+1} by DDIM's equation run backwards (eta 0 only), and pred_xstart."""
        if eta != 0.0:
            raise ValueError(f"ddim_reverse_sample is deterministic: eta must be 0, got {eta}")
        x0 = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)["pred_xstart"]
        above = self._at("alphas_cumprod_next", t, x)
        return {"sample": above.sqrt() * x0 + (1 - above).sqrt() * self._eps_from_x0(x, t, x0), "pred_xstart": x0}


def _some_noise(x: Tensor, t: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normals, none for a sample that arrives at the data."""
    z = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    return z * (t != 0).view(-1, *[1] * (x.dim() - 1))
