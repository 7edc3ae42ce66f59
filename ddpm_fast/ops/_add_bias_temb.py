"""The public function of the op add_bias_temb."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ddpm_fast.ops import _checks as check
from ddpm_fast.ops import _schema as _schema  # declares the op

_add_bias_temb = torch.ops.ddpm_fast.add_bias_temb.default


def add_bias_temb(
    h: Tensor, bias: Tensor | None = None, temb: Tensor | None = None, *, act: Literal["silu"] | None = None
) -> Tensor:
    """y = act(h + bias[c]) + temb[n, c]: convolution bias, activation and time embedding in one pass.

    Args:
        h: (N, C, ...).
        bias: (C,), optional.
        temb: (N, C), optional.
        act: None (identity) or "silu" (within 3 ulp of float64).

    Returns:
        Like h, in its dtype and memory format. Differentiable in h, bias and temb. bias and temb may have other float
        dtypes than h; the sum is float32 and rounded once.
    """
    images = check.Images("h", h)
    floats = check.FLOATS if h.dtype == torch.float64 else check.STORED
    if bias is not None:
        images.with_device("bias", bias, images.shape[1:2], floats)
    if temb is not None:
        images.with_device("temb", temb, images.shape[:2], floats)
    check.choice("act", act, (None, "silu"))
    y: Tensor = _add_bias_temb(h, bias, temb, act or "none")
    return y
