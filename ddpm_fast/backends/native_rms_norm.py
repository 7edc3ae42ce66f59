"""rms_norm_silu by the compiled extension; ``native`` has the functions of this module among its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

PLACES_OF_PART, ELEMENTS_OF_PART, MAX_PARTS = 32, 4096, 1024
"""CUDA, backward: the sums over places are taken in parts, a block each: of so many places, or in channels_last of
about so many elements; of more where the parts would become too many."""


def _parts(layout: Layout) -> int:
    places = PLACES_OF_PART
    if layout.channels_last:
        places = max(1, ELEMENTS_OF_PART // layout.channels)
    return min(-(-layout.inner // places), MAX_PARTS)


def _arguments(
    where: tuple[int, int], layout: Layout, h: Tensor, weight: Tensor | None, beta: Tensor | None, eps: float, act: str
) -> tuple[Any, ...]:
    """What forward and backward pass to the extension alike. All tensors must live until the call."""
    from ddpm_fast.backends import native  # not above, because native imports this module

    address, dtype = native._address, native._dtype
    return (
        *where,
        *native._shape(layout),
        address(h),
        dtype(h),
        address(weight),
        dtype(weight),
        weight is not None and weight.dim() == 2,
        address(beta),
        dtype(beta),
        beta is not None and beta.dim() == 2,
        eps,
        act == "silu",
    )


def rms_norm_silu(
    h: Tensor, weight: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float, act: str
) -> Tensor:
    """y = act(h sqrt(C) / max(|h|, eps) weight + beta) + residual"""
    from ddpm_fast.backends import native

    y = torch.empty_like(h)
    if h.numel() == 0:
        return y
    layout = Layout.of(h)
    x, added, out = layout.dense(h), native._optional(residual, layout), Staged(y, layout)
    weight, beta = native._flat(weight), native._flat(beta)
    native._C.rms_norm_silu(
        *_arguments(native._target(h), layout, x, weight, beta, eps, act), native._address(added), out.data.data_ptr()
    )
    return out.commit()


def rms_norm_silu_backward(
    g: Tensor,
    h: Tensor,
    weight: Tensor | None,
    beta: Tensor | None,
    eps: float,
    act: str,
    need_h: bool,
    need_weight: bool,
    need_beta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """g_h, and the sums [N, C] over all but (n, c) of g act'(u) xhat and of g act'(u)"""
    from ddpm_fast.backends import native

    n, channels = h.shape[:2]
    nothing = g.new_empty(0)
    g_h = torch.empty_like(h) if need_h else nothing
    # The two sums come together or not at all.
    summed = need_weight or need_beta
    d_weight, d_beta = (
        h.new_zeros((n, channels), dtype=torch.float32) if summed else nothing.clone() for _ in range(2)
    )
    if h.numel() > 0:
        layout = Layout.of(h)
        where = native._target(h)
        parts = _parts(layout) if summed and where[0] >= 0 else 1
        workspace = None if parts == 1 else h.new_empty(2 * n * channels * parts, dtype=torch.float32)
        x, g_y, out = layout.dense(h), layout.dense(g), Staged(g_h, layout) if need_h else None
        weight, beta = native._flat(weight), native._flat(beta)
        native._C.rms_norm_silu_backward(
            *_arguments(where, layout, x, weight, beta, eps, act),
            g_y.data_ptr(),
            native._dtype(g_y),
            out.data.data_ptr() if out is not None else 0,
            d_weight.data_ptr() if summed else 0,
            d_beta.data_ptr() if summed else 0,
            parts,
            native._address(workspace),
        )
        if out is not None:
            out.commit()
    return g_h, d_weight if need_weight else nothing.clone(), d_beta if need_beta else nothing.clone()
