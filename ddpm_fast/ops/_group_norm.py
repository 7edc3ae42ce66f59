"""The public function of the op group_norm_silu."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.ops import _checks as check
from ddpm_fast.ops import _schema as _schema  # declares the op

_group_norm_silu = torch.ops.ddpm_fast.group_norm_silu.default


def group_norm_silu(
    h: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temb: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    act: Literal["silu"] | None = "silu",
) -> Tensor:
    """y = act(GroupNorm(h + bias[c] + temb[n, c])): convolution bias, time embedding, norm and activation in one op.

    With v = h + bias + temb, and mean and (biased) variance over the C / num_groups channels of a group and all places:

        y = act(((v - mean) / sqrt(variance + eps) weight + beta) (1 + scale) + shift)

    Args:
        h: (N, C, ...).
        num_groups: G, divides C.
        weight, beta: (C,), the norm's affine map, as ``torch.nn.GroupNorm``'s weight and bias; each optional.
        bias: (C,), optional: that of the convolution before.
        temb: (N, C), optional.
        scale, shift: (N, C), scale-shift conditioning (Dhariwal & Nichol 2021), applied before act; each optional.
        eps: finite, >= 0.
        act: "silu" (a few ulp of float64 where the result is above 1e-36) or None (identity).

    Returns:
        Like h, in its dtype and memory format. Differentiable in all tensors. They may have other float dtypes than h;
        everything is computed in float32 (the statistics in float64 or compensated) and rounded once.
    """
    images = check.Images("h", h)
    channels = images.shape[1]
    if isinstance(num_groups, bool) or not isinstance(num_groups, int) or num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups must be an integer >= 1 that divides the {channels} channels, got {num_groups!r}")
    floats = check.FLOATS if h.dtype == torch.float64 else check.STORED
    for name, value in (("weight", weight), ("beta", beta), ("bias", bias)):
        if value is not None:
            images.with_device(name, value, images.shape[1:2], floats)
    for name, value in (("temb", temb), ("scale", scale), ("shift", shift)):
        if value is not None:
            images.with_device(name, value, images.shape[:2], floats)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    check.choice("act", act, (None, "silu"))
    if scale is not None or shift is not None:
        weight, beta = conditioned(h, weight, beta, scale, shift)
    y: Tensor = _group_norm_silu(h, bias, temb, weight, beta, num_groups, float(eps), act or "none")[0]
    return y


def conditioned(
    h: Tensor, weight: Tensor | None, beta: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """weight (1 + scale) and beta (1 + scale) + shift, float32 (N, C), or as they were where nothing changes them."""
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    if scale is not None:
        factor = scale.to(dtype) + 1
        weight = factor if weight is None else factor * weight  # in float32, which factor is
        beta = None if beta is None else factor * beta
    if shift is not None:
        beta = shift if beta is None else beta.to(dtype) + shift
    return weight, beta
