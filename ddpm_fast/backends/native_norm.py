"""group_norm_silu by the compiled extension; ``native`` has the functions of this module among its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

ELEMENTS_OF_PART = 16384
"""CUDA: a block reads a group of so many elements again from the first cache; larger groups are cut into parts."""

MAX_CHANNELS_ACROSS = 1024
"""CUDA, channels_last: channels of a group whose sums a block holds side by side."""


def _layout(h: Tensor, num_groups: int, on_gpu: bool) -> tuple[Layout, int]:
    """The layout in which the kernels run, and into how many parts they cut a group."""
    layout = Layout.of(h)
    if not on_gpu:
        return layout, 1
    width = layout.channels // num_groups
    if layout.channels_last and width > MAX_CHANNELS_ACROSS:
        layout = Layout(layout.n, layout.channels, layout.inner, False)
    return layout, max(1, min(-(-width * layout.inner // ELEMENTS_OF_PART), layout.inner))


def _arguments(
    where: tuple[int, int],
    layout: Layout,
    num_groups: int,
    h: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    weight: Tensor | None,
    beta: Tensor | None,
    act: str,
    mean: Tensor,
    rstd: Tensor,
    parts: int,
    workspace: Tensor | None,
) -> tuple[Any, ...]:
    """What forward and backward pass to the extension alike. All tensors must live until the call."""
    from ddpm_fast.backends import native  # not above, because native imports this module

    address, dtype = native._address, native._dtype
    return (
        *where,
        *native._shape(layout),
        num_groups,
        address(h),
        dtype(h),
        address(bias),
        dtype(bias),
        address(temb),
        dtype(temb),
        address(weight),
        dtype(weight),
        weight is not None and weight.dim() == 2,
        address(beta),
        dtype(beta),
        beta is not None and beta.dim() == 2,
        act == "silu",
        address(mean),
        address(rstd),
        parts,
        address(workspace),
    )


def group_norm_silu(
    h: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    weight: Tensor | None,
    beta: Tensor | None,
    num_groups: int,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act(GroupNorm(h + bias + temb)), and mean and rstd of every group"""
    from ddpm_fast.backends import native

    mean = h.new_empty((h.shape[0], num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if h.numel() == 0:
        return torch.empty_like(h), mean.fill_(float("nan")), rstd.fill_(float("nan"))
    where = native._target(h)
    layout, parts = _layout(h, num_groups, where[0] >= 0)
    workspace = None if parts == 1 else mean.new_empty(2 * mean.numel() * parts)
    x, y = layout.dense(h), Staged(torch.empty_like(h), layout)
    bias, temb, weight, beta = (native._flat(value) for value in (bias, temb, weight, beta))
    native._C.group_norm_silu(
        *_arguments(where, layout, num_groups, x, bias, temb, weight, beta, act, mean, rstd, parts, workspace),
        eps,
        y.data.data_ptr(),
    )
    return y.commit(), mean, rstd


def group_norm_silu_backward(
    g: Tensor,
    h: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    weight: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    act: str,
    need_h: bool,
    need_sum: bool,
    need_weight: bool,
    need_beta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g_h and its sums [N, C] over all but (n, c), with those of g act'(u) xhat and of g act'(u)"""
    from ddpm_fast.backends import native

    n, channels = h.shape[:2]
    nothing = g.new_empty(0)
    # The last two are always computed, for g_h is made of them.
    g_sum, d_weight, d_beta = (h.new_zeros((n, channels), dtype=torch.float32) for _ in range(3))
    g_h = torch.empty_like(h) if need_h else nothing
    if h.numel() > 0:
        where = native._target(h)
        layout, parts = _layout(h, num_groups, where[0] >= 0)
        size = 3 * n * channels * parts + 2 * n * num_groups
        workspace = None if parts == 1 else h.new_empty(size, dtype=torch.float32)
        x, g_y, out = layout.dense(h), layout.dense(g), Staged(g_h, layout) if need_h else None
        bias, temb, weight, beta = (native._flat(value) for value in (bias, temb, weight, beta))
        native._C.group_norm_silu_backward(
            *_arguments(where, layout, num_groups, x, bias, temb, weight, beta, act, mean, rstd, parts, workspace),
            g_y.data_ptr(),
            native._dtype(g_y),
            out.data.data_ptr() if out is not None else 0,
            g_sum.data_ptr() if need_sum else 0,
            d_weight.data_ptr(),
            d_beta.data_ptr(),
        )
        if out is not None:
            out.commit()
    return (
        g_h,
        g_sum if need_sum else nothing.clone(),
        d_weight if need_weight else nothing.clone(),
        d_beta if need_beta else nothing.clone(),
    )
