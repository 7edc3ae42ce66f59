"""The public function of the op batch_norm_silu."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.ops import _checks as check
from ddpm_fast.ops import _schema as _schema  # declares the op

_batch_norm_silu = torch.ops.ddpm_fast.batch_norm_silu.default


def batch_norm_silu(
    h: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    temb: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    act: Literal["silu"] | None = "silu",
) -> Tensor:
    """y = act(BatchNorm(h)) + temb[n, c]: norm over the batch, activation and time embedding in one op.

    With mean and (biased) variance of each channel over all samples and places (Ioffe & Szegedy 2015, algorithm 1):

        y = act((h - mean) / sqrt(variance + eps) weight + bias) + temb

    For the backward pass h and 2 C numbers are kept, not the normalised tensor nor what goes into SiLU.

    Args:
        h: (N, C, ...).
        weight, bias: (C,), the affine map, as ``torch.nn.BatchNorm2d``'s; each optional.
        running_mean, running_var: (C,), both or neither. In training they are written in place:
            running <- (1 - momentum) running + momentum batch's, the batch's variance being the unbiased one.
            Otherwise they are the statistics, and constants of the gradient.
        temb: (N, C), optional; added after act.
        training: statistics of the batch; at least 2 values per channel.
        momentum: 0..1.
        eps: finite, >= 0.
        act: "silu" (a few ulp of float64 where the result is above 1e-36) or None (identity).

    Returns:
        Like h, in its dtype and memory format. Differentiable in h, weight, bias and temb, which may have other float
        dtypes than h; everything is computed in float32 (sums in float64 or in short runs) and rounded once.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype. ValueError: a shape, device or number is wrong.
    """
    images = check.Images("h", h)
    channels = images.shape[1:2]
    floats = check.FLOATS if h.dtype == torch.float64 else check.STORED
    running = (("running_mean", running_mean), ("running_var", running_var))
    for name, value in (("weight", weight), ("bias", bias), *running):
        if value is not None:
            images.with_device(name, value, channels, floats)
    if temb is not None:
        images.with_device("temb", temb, images.shape[:2], floats)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var belong together: pass both or neither")
    for name, value in running:
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} is no variable of the gradient; pass {name}.detach()")
    if not isinstance(momentum, (int, float)):  # None, torch.nn.BatchNorm2d's cumulative average, would need a count
        raise TypeError(f"momentum must be a number in 0..1, got {momentum!r}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must be a number in 0..1, got {momentum}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    check.choice("act", act, (None, "silu"))
    if not training:
        if running_mean is None:
            raise ValueError("training=False needs running_mean and running_var, the statistics to use")
        y: Tensor = _batch_norm_silu(h, temb, weight, bias, running_mean, running_var, float(eps), act or "none")[0]
        return y
    count = images.shape[0] * images.shape[2:].numel()
    if count < 2:
        raise ValueError(
            f"training needs at least 2 values per channel for its statistics, got h of shape {tuple(images.shape)}"
        )
    y, mean, var = _batch_norm_silu(h, temb, weight, bias, None, None, float(eps), act or "none")
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return y
