"""batch_norm_silu by the compiled extension; ``native`` has the functions of this module among its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

PLACES_OF_PART, ELEMENTS_OF_PART, CHANNELS_OF_BLOCK, MAX_PARTS = 4096, 8192, 256, 8192
"""CUDA: sums are taken in parts of a sample: of so many places, or in channels_last of about so many elements of so
many channels; of more where the batch would have too many parts. It depends on the shape alone, and so do the sums."""


def _parts(layout: Layout) -> int:
    places = PLACES_OF_PART
    if layout.channels_last:
        places = max(1, ELEMENTS_OF_PART // min(layout.channels, CHANNELS_OF_BLOCK))
    return min(-(-layout.inner // places), max(1, MAX_PARTS // layout.n))


def _workspace(where: tuple[int, int], layout: Layout, h: Tensor) -> tuple[int, Tensor | None]:
    """parts and the memory for their sums, which the CPU does without"""
    if where[0] < 0:
        return 1, None
    parts = _parts(layout)
    return parts, h.new_empty(layout.channels * (3 * layout.n * parts + 2), dtype=torch.float32)


def _arguments(
    where: tuple[int, int],
    layout: Layout,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    of_batch: bool,
    eps: float,
    act: str,
    parts: int,
    workspace: Tensor | None,
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
        address(bias),
        dtype(bias),
        address(mean),
        address(var),
        of_batch,
        eps,
        act == "silu",
        parts,
        address(workspace),
    )


def batch_norm_silu(
    h: Tensor,
    temb: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act((h - mean) rstd weight + bias) + temb; mean and var [C], the batch's unless the running ones are given"""
    from ddpm_fast.backends import native

    of_batch = running_mean is None or running_var is None
    mean = h.new_empty(h.shape[1:2], dtype=torch.float32)
    var = torch.empty_like(mean)
    if running_mean is not None and running_var is not None:
        mean.copy_(running_mean)
        var.copy_(running_var)
    elif h.numel() == 0:
        mean.fill_(float("nan"))
        var.fill_(float("nan"))
    y = torch.empty_like(h)
    if h.numel() == 0:
        return y, mean, var
    layout, where = Layout.of(h), native._target(h)
    work = _workspace(where, layout, h)
    x, out = layout.dense(h), Staged(y, layout)
    temb, weight, bias = (native._flat(value) for value in (temb, weight, bias))
    native._C.batch_norm_silu(
        *_arguments(where, layout, x, weight, bias, mean, var, of_batch, eps, act, *work),
        native._address(temb),
        native._dtype(temb),
        out.data.data_ptr(),
    )
    return out.commit(), mean, var


def batch_norm_silu_backward(
    g: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    of_batch: bool,
    eps: float,
    act: str,
    need_h: bool,
    need_temb: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g_h, the sums [N, C] of g over all but (n, c), and those [C] of g act'(u) xhat and of g act'(u)"""
    from ddpm_fast.backends import native

    nothing = g.new_empty(0)
    d_weight, d_bias = (h.new_zeros(h.shape[1:2], dtype=torch.float32) for _ in range(2))
    g_temb = h.new_zeros(h.shape[:2], dtype=torch.float32) if need_temb else nothing
    g_h = torch.empty_like(h) if need_h else nothing.clone()
    if h.numel() > 0:
        layout, where = Layout.of(h), native._target(h)
        work = _workspace(where, layout, h)
        x, g_y, out = layout.dense(h), layout.dense(g), Staged(g_h, layout) if need_h else None
        weight, bias = native._flat(weight), native._flat(bias)
        native._C.batch_norm_silu_backward(
            *_arguments(where, layout, x, weight, bias, mean, var, of_batch, eps, act, *work),
            g_y.data_ptr(),
            native._dtype(g_y),
            out.data.data_ptr() if out is not None else 0,
            g_temb.data_ptr() if need_temb else 0,
            d_weight.data_ptr(),
            d_bias.data_ptr(),
        )
        if out is not None:
            out.commit()
    return g_h, g_temb, d_weight, d_bias
