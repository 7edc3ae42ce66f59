"""`GaussianDiffusion` of denoising_diffusion_pytorch 2.3, made of fused ops; and how it is trained."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import ops
from ..sampling.inputs import whole
from ._lucidrains_process import assignment, identity, normalize_to_neg_one_to_one, unnormalize_to_zero_to_one
from ._lucidrains_sampling import Sampling
from ._lucidrains_schedule import OBJECTIVES, loss_weight, schedule_of

LOSSES = {"l2": "mse", "l1": "l1", "huber": "huber"}
REDUCTIONS = ("mean", "none")
EAGER = {"l2": nn.functional.mse_loss, "l1": nn.functional.l1_loss, "huber": nn.functional.smooth_l1_loss}


class GaussianDiffusion(Sampling):
    """lucidrains' GaussianDiffusion: `diffusion(images)` is the training loss, `diffusion.sample()` draws images.

    model: a Module called as model(x, t), or model(x, t, x_self_cond) if model.self_condition, with the attributes
        channels, out_dim (as many) and self_condition.
    image_size: H = W, or (H, W); multiples of model.downsample_factor where it has one.
    timesteps: T. sampling_timesteps: fewer than T makes `sample` a DDIM of that many steps, ddim_sampling_eta its eta.
    objective: "pred_v", "pred_noise" or "pred_x0".
    beta_schedule: "sigmoid", "cosine" or "linear" (scaled by 1000 / T). schedule_fn_kwargs: start, end, tau; s; none.
    auto_normalize: images are in [0, 1] (or uint8) outside; False: in the model's range, [-1, 1].
    offset_noise_strength: how much of one normal per channel is added to the noise in training.
    min_snr_loss_weight, min_snr_gamma: weight the loss by c/snr for eps, c for x0, c/(snr + 1) for v, with
        c = min(snr, gamma).
    immiscible: assign the noise to the images of a batch so that they lie close. Needs scipy.
    loss_type: "l2", "l1" or "huber" (quadratic below 1), as the package's older versions had.

    Buffers and state-dict keys are the package's; where loaded betas are not the constructor's, the schedule follows
    them. Noise of training is torch's, drawn in the package's order. Right where the package is not: `interpolate`,
    the target under immiscible, tables from float64 throughout, offset noise that leaves the caller's tensor alone.
    Raises ValueError or TypeError for what does not fit, at once.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int],
        timesteps: int = 1000,
        sampling_timesteps: int | None = None,
        objective: str = "pred_v",
        beta_schedule: str = "sigmoid",
        schedule_fn_kwargs: Mapping[str, Any] | None = None,
        ddim_sampling_eta: float = 0.0,
        auto_normalize: bool = True,
        offset_noise_strength: float = 0.0,
        min_snr_loss_weight: bool = False,
        min_snr_gamma: float = 5,
        immiscible: bool = False,
        loss_type: str = "l2",
    ) -> None:
        super().__init__()
        self._check_model(model)
        self.model = network = cast(Any, model)
        self.channels, self.self_condition = network.channels, bool(network.self_condition)
        self.image_size = _sides(image_size, getattr(model, "downsample_factor", 1))
        self.objective = _one_of("objective", objective, OBJECTIVES)
        self.loss_type = _one_of("loss_type", loss_type, LOSSES)

        T = self.num_timesteps = whole("timesteps", timesteps, 1)
        self.sampling_timesteps = (
            T if sampling_timesteps is None else whole("sampling_timesteps", sampling_timesteps, 1)
        )
        if self.sampling_timesteps > T:
            raise ValueError(f"sampling_timesteps must be at most timesteps = {T}, got {sampling_timesteps}")
        self.is_ddim_sampling = self.sampling_timesteps < T
        self.ddim_sampling_eta = _at_least_zero("ddim_sampling_eta", ddim_sampling_eta)
        self.offset_noise_strength = _at_least_zero("offset_noise_strength", offset_noise_strength)

        self.immiscible = immiscible
        if immiscible:
            assignment()
        self._samplers = OrderedDict()
        self._use(schedule_of(beta_schedule, T, schedule_fn_kwargs or {}))
        if min_snr_loss_weight and not _at_least_zero("min_snr_gamma", min_snr_gamma):
            raise ValueError("min_snr_gamma must be above 0, or every loss is 0")
        weight = loss_weight(self.schedule.snr, objective, min_snr_gamma if min_snr_loss_weight else None)
        self.register_buffer("loss_weight", torch.tensor(weight, dtype=torch.float32))

        self.normalize = normalize_to_neg_one_to_one if auto_normalize else identity
        self.unnormalize = unnormalize_to_zero_to_one if auto_normalize else identity

    def _check_model(self, model: Any) -> None:
        missing = [name for name in ("channels", "out_dim", "self_condition") if not hasattr(model, name)]
        if missing:
            raise TypeError(
                f"model must have the attributes channels, out_dim and self_condition, as lucidrains' Unet has; "
                f"{type(model).__name__} has no {', '.join(missing)}"
            )
        if getattr(model, "random_or_learned_sinusoidal_cond", False):
            raise ValueError(
                "model must not have random or learned sinusoidal time features, which are for continuous time; "
                "build it with learned_sinusoidal_cond=False, random_fourier_features=False"
            )
        self._check_out_dim(model.channels, model.out_dim)

    def _check_out_dim(self, channels: int, out_dim: int) -> None:
        if out_dim != channels:
            hint = (
                "; LearnedGaussianDiffusion is for networks with a learned variance" if out_dim == 2 * channels else ""
            )
            raise ValueError(f"model.out_dim must be model.channels = {channels}, got {out_dim}{hint}")

    # -- training -----------------------------------------------------------------------------------------------------

    def random_times(self, batch_size: int) -> Tensor:
        """int64 (B,), uniform in 0..T-1, from torch's generator."""
        return torch.randint(0, self.num_timesteps, (batch_size,), device=self.device)

    def forward(
        self, img: Tensor, *args: Any, times: Tensor | None = None, loss_reduction: str = "mean", **kwargs: Any
    ) -> Tensor:
        """The loss of a batch, a scalar or with loss_reduction="none" (B,).

        img: (B, C, H, W) float in [0, 1], or uint8; in the model's range with auto_normalize=False. times: int64 (B,),
        default random. Other arguments go to `p_losses`.
        """
        expected = (self.channels, *self.image_size)
        if img.dim() != 4 or img.shape[1:] != expected:
            raise ValueError(f"img must have shape (B, {', '.join(map(str, expected))}), got {tuple(img.shape)}")
        if not img.is_floating_point() and (img.dtype != torch.uint8 or self.normalize is identity):
            allowed = "float" if self.normalize is identity else "float in [0, 1] or uint8"
            raise TypeError(f"img must be {allowed}, got {img.dtype}")
        if times is None:
            times = self.random_times(img.shape[0])
        kwargs["loss_reduction"] = loss_reduction
        return self.p_losses(self.normalize(img), times, *args, **kwargs)

    def p_losses(
        self,
        x_start: Tensor,
        t: Tensor,
        noise: Tensor | None = None,
        offset_noise_strength: float | None = None,
        loss_reduction: str = "mean",
    ) -> Tensor:
        """The weighted loss at timesteps t of images in the model's range; see `forward`.

        noise: eps, like x_start; default torch.randn_like. Under immiscible it is assigned to the images.
        """
        _one_of("loss_reduction", loss_reduction, REDUCTIONS)
        _one_of("objective", self.objective, OBJECTIVES)
        noise = self._training_noise(x_start, noise, offset_noise_strength)
        if self.objective == "pred_v" and not self._altered(("q_sample", "predict_v")):
            x, target = self._noised(x_start, t, noise, target="v")
        else:
            x = self.q_sample(x_start=x_start, t=t, noise=noise)
            if self.objective == "pred_v":
                target = self.predict_v(x_start, t, noise)
            else:
                target = noise if self.objective == "pred_noise" else x_start
        x_self_cond = None
        if self.self_condition and random.random() < 0.5:  # the package's coin, from the package's generator
            with torch.no_grad():
                x_self_cond = self.model_predictions(x, t).pred_x_start
        each = self._distance(self._call(x, t, x_self_cond), target)
        return reduced(each * self.loss_weight.gather(-1, t), loss_reduction)

    def _training_noise(self, x_start: Tensor, noise: Tensor | None, offset_noise_strength: float | None) -> Tensor:
        """eps of a batch: given or drawn, with the offset, and as immiscible assigns it."""
        if noise is None:
            noise = torch.randn_like(x_start)
        strength = self.offset_noise_strength if offset_noise_strength is None else offset_noise_strength
        if strength > 0:
            offset = torch.randn(x_start.shape[:2], device=self.device)
            noise = noise + strength * offset[:, :, None, None]
        return self._assigned(x_start, noise)

    def _distance(self, m: Tensor, target: Tensor) -> Tensor:
        """(B,): the mean over each image of loss_type(m - target), in one pass, forward and backward."""
        if m.shape != target.shape:
            raise ValueError(f"the model must return shape {tuple(target.shape)}, got {tuple(m.shape)}")
        if target.requires_grad:  # images or noise that are learned themselves; the op takes its target as constant
            each = EAGER[self.loss_type](m, target, reduction="none")
            return each.flatten(1).mean(1)
        return ops.noise_mse(m, target="x0", x0=target, loss=LOSSES[self.loss_type], reduction="none")  # type: ignore[arg-type]


def reduced(each: Tensor, loss_reduction: str) -> Tensor:
    """(B,) as it is for "none", its mean for "mean"."""
    _one_of("loss_reduction", loss_reduction, REDUCTIONS)
    return each if loss_reduction == "none" else each.mean()


def _one_of(name: str, value: Any, known: Any) -> str:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    return str(value)


def _at_least_zero(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    return value


def _sides(image_size: int | Sequence[int], factor: int) -> tuple[int, int]:
    """(H, W), both multiples of factor; TypeError or ValueError otherwise."""
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    if not isinstance(sides, (tuple, list)) or len(sides) != 2:
        raise TypeError(f"image_size must be an int or (H, W), got {image_size!r}")
    h, w = (whole("image_size", side, 1) for side in sides)
    if h % factor or w % factor:
        fit = tuple(-(-side // factor) * factor for side in (h, w))
        raise ValueError(
            f"image_size must be made of multiples of {factor}, the model's downsample_factor, got ({h}, {w}); "
            f"the next that fits is {fit}"
        )
    return h, w
