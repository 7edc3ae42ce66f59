"""The gradients of group_norm_silu."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _group_norm, _math
from .launch import NUM_WARPS, launch

WARPS_ACROSS = 8
"""In channels_last, instead of 4: the sums and coefficients of four elements a thread find room in its registers."""


@triton.jit
def _gradients(g_ptr, h_ptr, place, mask, offset, scale, beta, SILU: tl.constexpr):
    """g_u = g act'(u) and d = h - offset"""
    g = _math.load_image(g_ptr + place, mask)
    d = tl.where(mask, _math.load_image(h_ptr + place, mask) - offset, 0.0)
    return (g * _math.silu_grad(d * scale + beta) if SILU else g), d


@triton.jit
def _group_norm_silu_backward_kernel(
    g_ptr,
    h_ptr,
    bias_ptr,
    temb_ptr,
    weight_ptr,
    beta_ptr,
    mean_ptr,
    rstd_ptr,
    g_h_ptr,
    sums_ptr,
    means_ptr,
    n,
    groups,
    channel_units,
    inner_units,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    INNER_UNIT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    W_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    SILU: tl.constexpr,
    PHASE: tl.constexpr,
):
    """PHASE "sums": of each channel the sums of d, g_u xhat and g_u over the part, sums_ptr [parts, n, 3, channels];
    "apply": g_h from base and slope, means_ptr [n, 2, groups]; "whole": both, and base and slope are stored."""
    group_channels, inner = channel_units * CHANNEL_UNIT, inner_units * INNER_UNIT
    channels = groups * group_channels
    sample, p_begin = tl.program_id(0).to(tl.int64), tl.program_id(2) * SPAN
    row = sample * channels
    g_ptr += row * inner
    h_ptr += row * inner
    g = _group_norm.group_numbers(tl.program_id(1) * BLOCK_G, BLOCK_G, LAST)
    mean = tl.load(mean_ptr + sample * groups + g, mask=g < groups, other=0.0)
    rstd = tl.load(rstd_ptr + sample * groups + g, mask=g < groups, other=0.0)
    base_at = means_ptr + 2 * sample * groups + g
    if PHASE == "apply":
        base = tl.load(base_at, mask=g < groups, other=0.0)
        slope = tl.load(base_at + groups, mask=g < groups, other=0.0)
    else:
        of_g, of_gx = tl.zeros(g.shape, tl.float32), tl.zeros(g.shape, tl.float32)
        for c0 in range(0, WIDTH, BLOCK_C):
            channel, present = _group_norm.channels_of(g, c0, groups, group_channels, BLOCK_C, LAST)
            added = _group_norm.added_to(bias_ptr, temb_ptr, row, channel, present)
            shifted, scale, beta, weight = _group_norm.affine(
                weight_ptr, beta_ptr, row, channel, present, mean, rstd, added, W_ROWS, B_ROWS
            )
            sum_g = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_C] if LAST else [BLOCK_G, BLOCK_C, BLOCK_P], tl.float32)
            sum_gd, sum_d = sum_g, sum_g
            for offset in range(0, SPAN, BLOCK_P):
                place, mask = _group_norm.places_of(channel, present, p_begin + offset, channels, inner, BLOCK_P, LAST)
                g_u, d = _gradients(g_ptr, h_ptr, place, mask, shifted, scale, beta, SILU)
                sum_g, sum_gd, sum_d = sum_g + g_u, sum_gd + g_u * d, sum_d + d
            d_beta, d_weight = _group_norm.over_places(sum_g, LAST), rstd * _group_norm.over_places(sum_gd, LAST)
            to = sums_ptr + 3 * (tl.program_id(2).to(tl.int64) * n + sample) * channels + channel
            tl.store(to, _group_norm.over_places(sum_d, LAST), mask=present)
            tl.store(to + channels, d_weight, mask=present)
            tl.store(to + 2 * channels, d_beta, mask=present)
            of_g = of_g + _group_norm.over_channels(tl.where(present, weight * d_beta, 0.0), LAST)
            of_gx = of_gx + _group_norm.over_channels(tl.where(present, weight * d_weight, 0.0), LAST)
        if PHASE == "whole":
            count = tl.full(g.shape, 1.0, tl.float32) * (group_channels * inner)
            base, slope = rstd * tl.div_rn(of_g, count), rstd * rstd * tl.div_rn(of_gx, count)
            tl.store(base_at, base, mask=g < groups)
            tl.store(base_at + groups, slope, mask=g < groups)
    if PHASE != "sums" and g_h_ptr is not None:
        g_h_ptr += row * inner
        for c0 in range(0, WIDTH, BLOCK_C):
            channel, present = _group_norm.channels_of(g, c0, groups, group_channels, BLOCK_C, LAST)
            added = _group_norm.added_to(bias_ptr, temb_ptr, row, channel, present)
            shifted, scale, beta, _ = _group_norm.affine(
                weight_ptr, beta_ptr, row, channel, present, mean, rstd, added, W_ROWS, B_ROWS
            )
            for offset in range(0, SPAN, BLOCK_P):
                place, mask = _group_norm.places_of(channel, present, p_begin + offset, channels, inner, BLOCK_P, LAST)
                g_u, d = _gradients(g_ptr, h_ptr, place, mask, shifted, scale, beta, SILU)
                _math.store_image(g_h_ptr + place, g_u * scale - (base + d * slope), mask)


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
    """g_h and, float32 [N, C], the sums over the places of g_h, g_u xhat and g_u; empty where not needed."""
    layout = Layout.of(h)
    n, channels, groups = layout.n, layout.channels, num_groups
    nothing = g.new_empty(0)
    g_h = torch.empty_like(h) if need_h else nothing
    if h.numel() == 0:
        zeros = (h.new_zeros((n, channels), dtype=torch.float32) for _ in range(3))
        needed = zip(zeros, (need_sum, need_weight, need_beta), strict=True)
        g_sum, d_weight, d_beta = (value if wanted else nothing.clone() for value, wanted in needed)
        return g_h, g_sum, d_weight, d_beta
    blocks = _group_norm.Blocks(layout, groups, h.element_size())
    parameters, rows = _group_norm.parameters(bias, temb, weight, beta)
    g_dense, dense, staged = layout.dense(g), layout.dense(h), Staged(g_h, layout) if need_h else None
    parts = h.new_empty((blocks.parts, n, 3, channels), dtype=torch.float32)
    means = h.new_empty((n, 2, groups), dtype=torch.float32)

    def run(phase: str) -> None:
        launch(
            _group_norm_silu_backward_kernel,
            blocks.grid,
            h,
            g_dense,
            dense,
            *parameters,
            mean,
            rstd,
            None if staged is None else staged.data,
            parts,
            means,
            n,
            *blocks.args,
            **blocks.constants,
            **rows,
            SILU=act == "silu",
            PHASE=phase,
            num_warps=WARPS_ACROSS if blocks.constants["LAST"] else NUM_WARPS,
        )

    run("whole" if blocks.parts == 1 else "sums")
    sums = parts[0] if blocks.parts == 1 else parts.sum(0, dtype=torch.float64).to(torch.float32)
    if blocks.parts > 1:
        of_gx, of_g = (_group_sums(sums[:, k], weight, groups) / (channels // groups * layout.inner) for k in (1, 2))
        means.copy_(torch.stack([rstd * of_g, rstd * rstd * of_gx], 1))
        if staged is not None:
            run("apply")
    if staged is not None:
        staged.commit()
    return (
        g_h,
        _sum_of_g_h(sums, means, rstd, weight, layout.inner) if need_sum else nothing.clone(),
        sums[:, 1].contiguous() if need_weight else nothing.clone(),
        sums[:, 2].contiguous() if need_beta else nothing.clone(),
    )


def _group_sums(sums: Tensor, weight: Tensor | None, groups: int) -> Tensor:
    """[N, C] -> float64 [N, G]: the sums over the channels of groups, weighted"""
    weighted = sums.double() if weight is None else sums.double() * weight
    return weighted.reshape(sums.shape[0], groups, -1).sum(2)


def _sum_of_g_h(sums: Tensor, means: Tensor, rstd: Tensor, weight: Tensor | None, inner: int) -> Tensor:
    """[N, C]: the sums over the places of g_h = g_u scale - (base + d slope)"""
    width = sums.shape[2] // rstd.shape[1]
    base, slope, scale = (x.double().repeat_interleave(width, 1) for x in (means[:, 0], means[:, 1], rstd))
    if weight is not None:
        scale = scale * weight
    return (scale * sums[:, 2] - (inner * base + slope * sums[:, 0])).to(torch.float32)
