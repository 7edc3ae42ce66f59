"""The public function of the op rms_norm_silu."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.ops import _checks as check
from ddpm_fast.ops import _schema as _schema  # declares the op
from ddpm_fast.ops._group_norm import conditioned

_rms_norm_silu = torch.ops.ddpm_fast.rms_norm_silu.default


def rms_norm_silu(
    h: Tensor,
    weight: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-12,
    act: Literal["silu"] | None = "silu",
) -> Tensor:
    """y = act(RMSNorm(h) (1 + scale) + shift) + residual: norm over channels, conditioning, activation, sum in one op.

    At each place of each sample, with |h| the Euclidean norm over its C channels (lucidrains' RMSNorm, whose division
    is ``torch.nn.functional.normalize(h, dim=1, eps=eps)``):

        y = act(h / max(|h|, eps) sqrt(C) weight[c] (1 + scale[n, c]) + shift[n, c]) + residual

    Args:
        h: (N, C, ...).
        weight: (C,), the norm's gain, optional.
        scale, shift: (N, C), scale-shift conditioning, applied before act; each optional.
        residual: like h in shape, dtype and device; added last, optional.
        eps: finite, >= 0. With 0, a place whose channels are all 0 gives NaN.
        act: "silu" (a few ulp of float64 where the result is above 1e-36) or None (identity).

    Returns:
        Like h, in its dtype and memory format. Differentiable in all tensors; below eps the norm counts as constant.
        weight, scale and shift may have other float dtypes than h; everything is computed in float32 (the sum of
        squares in float64 or compensated) and rounded once.

    Raises:
        TypeError: an argument is not a tensor, or of another dtype. ValueError: a shape, device, eps or act is wrong.
    """
    images = check.Images("h", h)
    floats = check.FLOATS if h.dtype == torch.float64 else check.STORED
    if weight is not None:
        images.with_device("weight", weight, images.shape[1:2], floats)
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            images.with_device(name, value, images.shape[:2], floats)
    images.like("residual", residual, (h.dtype,))
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number >= 0, got {eps}")
    check.choice("act", act, (None, "silu"))
    beta = None
    if scale is not None or shift is not None:
        weight, beta = conditioned(h, weight, None, scale, shift)
    y: Tensor = _rms_norm_silu(h, weight, beta, residual, float(eps), act or "none")
    return y
