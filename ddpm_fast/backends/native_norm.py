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


class _Call:
    """What forward and backward pass to the extension alike, and the tensors that its addresses point into."""

    def __init__(
        self,
        h: Tensor,
        bias: Tensor | None,
        temb: Tensor | None,
        weight: Tensor | None,
        beta: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        num_groups: int,
        act: str,
        workspace: tuple[int, int],
    ) -> None:
        """``workspace``: floats for each part and besides, where there are several parts."""
        from ddpm_fast.backends import native  # not above, because native imports this module

        self.native = native
        where = native._target(h)
        layout = Layout.of(h)
        width = layout.channels // num_groups
        parts = 1
        if where[0] >= 0:
            if layout.channels_last and width > MAX_CHANNELS_ACROSS:
                layout = Layout(layout.n, layout.channels, layout.inner, False)
            parts = max(1, min(-(-width * layout.inner // ELEMENTS_OF_PART), layout.inner))
        scratch = h.new_empty(workspace[0] * parts + workspace[1] if parts > 1 else 0, dtype=torch.float32)
        bias, temb, weight, beta = (native._flat(value) for value in (bias, temb, weight, beta))
        self.layout, dense = layout, layout.dense(h)
        self.kept_alive = (dense, bias, temb, weight, beta, scratch)

        def array(value: Tensor | None) -> tuple[int, int]:
            return native._address(value), native._dtype(value)

        def affine(value: Tensor | None) -> tuple[int, int, bool]:
            return *array(value), value is not None and value.dim() == 2

        self.arguments: tuple[Any, ...] = (
            *where,
            *native._shape(layout),
            num_groups,
            *array(dense),
            *array(bias),
            *array(temb),
            *affine(weight),
            *affine(beta),
            act == "silu",
            native._address(mean),
            native._address(rstd),
            parts,
            native._address(scratch),
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
    n = h.shape[0]
    if h.numel() == 0:
        mean, rstd = (h.new_full((n, num_groups), float("nan"), dtype=torch.float32) for _ in range(2))
        return torch.empty_like(h), mean, rstd
    mean, rstd = (h.new_empty((n, num_groups), dtype=torch.float32) for _ in range(2))
    call = _Call(h, bias, temb, weight, beta, mean, rstd, num_groups, act, (2 * n * num_groups, 0))
    y = Staged(torch.empty_like(h), call.layout)
    call.native._C.group_norm_silu(*call.arguments, eps, call.native._address(y.data))
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
    n, channels = h.shape[:2]
    nothing = g.new_empty(0)
    # The last two are always computed, for g_h is made of them.
    sums = [h.new_zeros((n, channels), dtype=torch.float32) for _ in range(3)]
    g_h = torch.empty_like(h) if need_h else nothing
    if h.numel() > 0:
        call = _Call(h, bias, temb, weight, beta, mean, rstd, num_groups, act, (3 * n * channels, 2 * n * num_groups))
        address = call.native._address
        g_dense = call.layout.dense(g)
        staged = Staged(g_h, call.layout) if need_h else None
        call.native._C.group_norm_silu_backward(
            *call.arguments,
            address(g_dense),
            call.native._dtype(g_dense),
            address(staged.data) if staged is not None else 0,
            address(sums[0]) if need_sum else 0,
            address(sums[1]),
            address(sums[2]),
        )
        if staged is not None:
            staged.commit()
    needed = zip(sums, (need_sum, need_weight, need_beta), strict=True)
    g_sum, d_weight, d_beta = (value if wanted else nothing.clone() for value, wanted in needed)
    return g_h, g_sum, d_weight, d_beta
