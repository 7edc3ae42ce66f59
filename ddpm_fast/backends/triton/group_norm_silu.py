"""group_norm_silu: y = act(GroupNorm(h + bias[c] + temb[n, c])), act = identity or SiLU, and its gradients.

A program has one or several whole groups and reads them again from the cache. Groups that are too large for that are cut
into parts, some places of a program each: one launch sums, torch merges the few sums, one launch applies.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _math
from .launch import INTERPRETED, check_size, float_bits, launch, power_of_two

ELEMENTS = 1024
"""Elements of a tile on a GPU: 4 warps x 8, one 128-bit access of a half-width type a thread or two of float32."""

INTERPRETED_ELEMENTS = 1 << 17
"""In the interpreter, where a program costs the same whatever its size. Tests lower it."""

PART_ELEMENTS = 16384
"""Of a group, as many as the first cache holds for the programs of a processor."""

SEGMENT = 64
"""Bytes that a program reads at a place, at least, in channels_last: groups side by side until it has them."""


@triton.jit
def _tile(first_group, c0, p0, groups, group_channels, inner, G: tl.constexpr, C: tl.constexpr, P: tl.constexpr, LAST):
    """Channel, whether it exists, place in the sample and whether it exists, for G groups x C channels x P places: [G, C,
    P], and [P, G, C] in channels_last, so that the last axis is the fastest in memory."""
    g, c, p = first_group + tl.arange(0, G), c0 + tl.arange(0, C), p0 + tl.arange(0, P)
    if LAST:
        g, c, p = g[None, :, None], c[None, None, :], p[:, None, None]
    else:
        g, c, p = g[:, None, None], c[None, :, None], p[None, None, :]
    channel = g * group_channels + c
    present = (g < groups) & (c < group_channels)
    place = p * (groups * group_channels) + channel if LAST else channel * inner + p
    return channel, present, place, present & (p < inner)


@triton.jit
def _groups(first_group, G: tl.constexpr, LAST: tl.constexpr):
    """The numbers of the groups, along the axis of groups of a tile."""
    g = first_group + tl.arange(0, G)
    return g[None, :, None] if LAST else g[:, None, None]


@triton.jit
def _over_places(x, LAST: tl.constexpr):
    """The sums over the places of a tile, which keeps its three axes."""
    return tl.sum(x, axis=0)[None, :, :] if LAST else tl.sum(x, axis=2)[:, :, None]


@triton.jit
def _over_channels(x, LAST: tl.constexpr):
    """The sums over the channels of groups."""
    return tl.sum(x, axis=2)[:, :, None] if LAST else tl.sum(x, axis=1)[:, None, :]


@triton.jit
def _added(bias_ptr, temb_ptr, row, channel, present):
    """bias[c] + temb[n, c]; row: where temb of the sample begins."""
    added = tl.zeros(present.shape, tl.float32)
    if bias_ptr is not None:
        added = _math.load_image(bias_ptr + channel, present)
    if temb_ptr is not None:
        temb = _math.load_image(temb_ptr + row + channel, present)
        added = added + temb if bias_ptr is not None else temb
    return added


@triton.jit
def _affine(weight_ptr, beta_ptr, row, channel, present, mean, rstd, added, W_ROWS: tl.constexpr, B_ROWS: tl.constexpr):
    """(offset, scale, beta) of u = (h - offset) scale + beta, and the weight"""
    weight = tl.full(present.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        weight = _math.load_image(weight_ptr + (row + channel if W_ROWS else channel), present)
    beta = tl.full(present.shape, -0.0, tl.float32)
    if beta_ptr is not None:
        beta = _math.load_image(beta_ptr + (row + channel if B_ROWS else channel), present)
    return mean - added, rstd * weight, beta, weight


@triton.jit(do_not_specialize=["eps_bits"])
def _group_norm_silu_kernel(
    h_ptr,
    bias_ptr,
    temb_ptr,
    weight_ptr,
    beta_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    eps_bits,
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
    """PHASE "sums": the mean and the squares about it of each part, into mean_ptr and rstd_ptr [parts, n, groups];
    "apply": y from mean and rstd [n, groups]; "whole": both, of groups in one part."""
    group_channels, inner = channel_units * CHANNEL_UNIT, inner_units * INNER_UNIT
    sample = tl.program_id(0).to(tl.int64)
    first_group, p_begin = tl.program_id(1) * BLOCK_G, tl.program_id(2) * SPAN
    h_ptr += sample * groups * group_channels * inner
    row = sample * groups * group_channels
    g = _groups(first_group, BLOCK_G, LAST)
    statistics = (tl.program_id(2) * tl.num_programs(0) + sample) * groups + g
    if PHASE == "apply":
        statistics = sample * groups + g
        mean = tl.load(mean_ptr + statistics, mask=g < groups, other=0.0)
        rstd = tl.load(rstd_ptr + statistics, mask=g < groups, other=0.0)
    else:
        # First the mean, then the squares about it, each relative to a value of the group, so that nothing cancels.
        c_first = g * group_channels
        p_first = p_begin * (groups * group_channels) + c_first if LAST else c_first * inner + p_begin
        first = _math.load_image(h_ptr + p_first, g < groups)
        first = first + _added(bias_ptr, temb_ptr, row, c_first, g < groups)
        count = tl.full(first.shape, 1.0, tl.float32) * (group_channels * tl.minimum(SPAN, inner - p_begin))
        shift = tl.zeros(first.shape, tl.float32)
        for reading in tl.static_range(2):
            total = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_C] if LAST else [BLOCK_G, BLOCK_C, BLOCK_P], tl.float32)
            for c0 in range(0, WIDTH, BLOCK_C):
                channel, present, _, _ = _tile(
                    first_group, c0, 0, groups, group_channels, inner, BLOCK_G, BLOCK_C, BLOCK_P, LAST
                )
                added = _added(bias_ptr, temb_ptr, row, channel, present)
                for offset in range(0, SPAN, BLOCK_P):
                    _, _, place, mask = _tile(
                        first_group, c0, p_begin + offset, groups, group_channels, inner, BLOCK_G, BLOCK_C, BLOCK_P, LAST
                    )
                    d = ((_math.load_image(h_ptr + place, mask) + added) - first) - shift
                    d = tl.where(mask, d, 0.0)
                    total = total + (d if reading == 0 else d * d)
            total = _over_channels(_over_places(total, LAST), LAST)
            if reading == 0:
                shift = tl.div_rn(total, count)
        mean = first + shift
        if PHASE == "sums":
            rstd = total
        else:
            deviation = tl.sqrt_rn(tl.div_rn(total, count) + _math.float_of_bits(eps_bits))
            rstd = tl.div_rn(tl.full(total.shape, 1.0, tl.float32), deviation)
        tl.store(mean_ptr + statistics, mean, mask=g < groups)
        tl.store(rstd_ptr + statistics, rstd, mask=g < groups)
    if PHASE != "sums":
        y_ptr += sample * groups * group_channels * inner
        for c0 in range(0, WIDTH, BLOCK_C):
            channel, present, _, _ = _tile(
                first_group, c0, 0, groups, group_channels, inner, BLOCK_G, BLOCK_C, BLOCK_P, LAST
            )
            added = _added(bias_ptr, temb_ptr, row, channel, present)
            shifted, scale, beta, _ = _affine(
                weight_ptr, beta_ptr, row, channel, present, mean, rstd, added, W_ROWS, B_ROWS
            )
            for offset in range(0, SPAN, BLOCK_P):
                _, _, place, mask = _tile(
                    first_group, c0, p_begin + offset, groups, group_channels, inner, BLOCK_G, BLOCK_C, BLOCK_P, LAST
                )
                u = (_math.load_image(h_ptr + place, mask) - shifted) * scale + beta
                _math.store_image(y_ptr + place, _math.silu(u) if SILU else u, mask)


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
    """PHASE "sums": of each channel the sums of d, g_u xhat and g_u over the part, sums_ptr [parts, 3, n, channels];
    "apply": g_h from base and slope, means_ptr [2, n, groups]; "whole": both, and base and slope are stored."""
    group_channels, inner = channel_units * CHANNEL_UNIT, inner_units * INNER_UNIT
    channels = groups * group_channels
    sample = tl.program_id(0).to(tl.int64)
    first_group, p_begin = tl.program_id(1) * BLOCK_G, tl.program_id(2) * SPAN
    row = sample * channels
    g_ptr += row * inner
    h_ptr += row * inner
    g = _groups(first_group, BLOCK_G, LAST)
    at = sample * groups + g
    mean = tl.load(mean_ptr + at, mask=g < groups, other=0.0)
    rstd = tl.load(rstd_ptr + at, mask=g < groups, other=0.0)
    if PHASE == "apply":
        base = tl.load(means_ptr + at, mask=g < groups, other=0.0)
        slope = tl.load(means_ptr + n.to(tl.int64) * groups + at, mask=g < groups, other=0.0)
    else:
        of_g, of_gx = tl.zeros(g.shape, tl.float32), tl.zeros(g.shape, tl.float32)
        for c0 in range(0, WIDTH, BLOCK_C):
            channel, present, _, _ = _tile(
                first_group, c0, 0, groups, group_channels, inner, BLOCK_G, BLOCK_C, BLOCK_P, LAST
            )
            added = _added(bias_ptr, temb_ptr, row, channel, present)
            shifted, scale, beta, weight = _affine(
                weight_ptr, beta_ptr, row, channel, present, mean, rstd, added, W_ROWS, B_ROWS
            )
            sum_g = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_C] if LAST else [BLOCK_G, BLOCK_C, BLOCK_P], tl.float32)
            sum_gd, sum_d = sum_g, sum_g
            for offset in range(0, SPAN, BLOCK_P):
                _, _, place, mask = _tile(
                    first_group, c0, p_begin + offset, groups, group_channels, inner, BLOCK_G, BLOCK_C, BLOCK_P, LAST
                )
                g_u, d = _gradients(g_ptr, h_ptr, place, mask, shifted, scale, beta, SILU)
                sum_g, sum_gd, sum_d = sum_g + g_u, sum_gd + g_u * d, sum_d + d
            d_beta, d_weight = _over_places(sum_g, LAST), rstd * _over_places(sum_gd, LAST)
            to = sums_ptr + tl.program_id(2).to(tl.int64) * 3 * n * channels + row + channel
            tl.store(to, _over_places(sum_d, LAST), mask=present)
            tl.store(to + n.to(tl.int64) * channels, d_weight, mask=present)
            tl.store(to + 2 * n.to(tl.int64) * channels, d_beta, mask=present)
            of_g = of_g + _over_channels(tl.where(present, weight * d_beta, 0.0), LAST)
            of_gx = of_gx + _over_channels(tl.where(present, weight * d_weight, 0.0), LAST)
        if PHASE == "whole":
            count = tl.full(g.shape, 1.0, tl.float32) * (group_channels * inner)
            base, slope = rstd * tl.div_rn(of_g, count), rstd * rstd * tl.div_rn(of_gx, count)
            tl.store(means_ptr + at, base, mask=g < groups)
            tl.store(means_ptr + n.to(tl.int64) * groups + at, slope, mask=g < groups)
    if PHASE != "sums" and g_h_ptr is not None:
        g_h_ptr += row * inner
        for c0 in range(0, WIDTH, BLOCK_C):
            channel, present, _, _ = _tile(
                first_group, c0, 0, groups, group_channels, inner, BLOCK_G, BLOCK_C, BLOCK_P, LAST
            )
            added = _added(bias_ptr, temb_ptr, row, channel, present)
            shifted, scale, beta, _ = _affine(
                weight_ptr, beta_ptr, row, channel, present, mean, rstd, added, W_ROWS, B_ROWS
            )
            for offset in range(0, SPAN, BLOCK_P):
                _, _, place, mask = _tile(
                    first_group, c0, p_begin + offset, groups, group_channels, inner, BLOCK_G, BLOCK_C, BLOCK_P, LAST
                )
                g_u, d = _gradients(g_ptr, h_ptr, place, mask, shifted, scale, beta, SILU)
                _math.store_image(g_h_ptr + place, g_u * scale - (base + d * slope), mask)


class _Blocks:
    """How the groups of samples divide among programs: ``args`` and ``constants`` of both kernels, and their grid."""

    def __init__(self, layout: Layout, groups: int, itemsize: int) -> None:
        check_size(layout)
        inner, width = layout.inner, layout.channels // groups
        budget = INTERPRETED_ELEMENTS if INTERPRETED else ELEMENTS
        # Vectors (N, C) have one place: taken as channels_last, their channels are read in one run.
        last = layout.channels_last or inner == 1
        if last:
            block_c = min(budget, power_of_two(width), 64)
            side_by_side = -(-SEGMENT // (itemsize * block_c))
            block_g = min(budget // block_c, power_of_two(side_by_side), power_of_two(groups))
            block_p = min(budget // (block_c * block_g), power_of_two(inner))
        else:
            block_p = min(budget, power_of_two(inner))
            block_c = min(budget // block_p, power_of_two(width))
            block_g = 1
        block_g = min(max(block_g, budget // (block_c * block_p)), power_of_two(groups))
        places = max(PART_ELEMENTS // width, 1) if width * inner > PART_ELEMENTS else inner
        self.span = block_p * max(-(-places // block_p), -(-inner // (65535 * block_p)))
        self.parts = -(-inner // self.span)
        self.grid = (layout.n, -(-groups // block_g), self.parts)
        channel_unit, inner_unit = math.gcd(width, 16), math.gcd(inner, 16)
        self.args = (groups, width // channel_unit, inner // inner_unit)
        self.constants = {
            "SPAN": self.span,
            "WIDTH": -(-width // block_c) * block_c,
            "CHANNEL_UNIT": channel_unit,
            "INNER_UNIT": inner_unit,
            "BLOCK_G": block_g,
            "BLOCK_C": block_c,
            "BLOCK_P": block_p,
            "LAST": last,
        }


def _parameters(*values: Tensor | None) -> tuple[list[Tensor | None], dict[str, bool]]:
    """bias, temb, weight and beta as the kernels take them, and which of the last two have a row for each sample."""
    flat = [None if value is None else value.contiguous() for value in values]
    w_rows, b_rows = (value is not None and value.dim() == 2 for value in values[2:])
    return flat, {"W_ROWS": w_rows, "B_ROWS": b_rows}


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
    """y in the dtype and memory format of ``h`` (N, C, ...); mean and rstd of every group, float32 [N, G]."""
    layout = Layout.of(h)
    y = torch.empty_like(h)
    shape = (layout.n, num_groups)
    if h.numel() == 0:
        mean, rstd = (h.new_full(shape, float("nan"), dtype=torch.float32) for _ in range(2))
        return y, mean, rstd
    mean, rstd = (h.new_empty(shape, dtype=torch.float32) for _ in range(2))
    blocks = _Blocks(layout, num_groups, h.element_size())
    parameters, rows = _parameters(bias, temb, weight, beta)
    dense, staged = layout.dense(h), Staged(y, layout)

    def run(phase: str, mean: Tensor, rstd: Tensor) -> None:
        written = None if phase == "sums" else staged.data
        launch(
            _group_norm_silu_kernel,
            blocks.grid,
            h,
            dense,
            *parameters,
            written,
            mean,
            rstd,
            float_bits(eps),
            *blocks.args,
            **blocks.constants,
            **rows,
            SILU=act == "silu",
            PHASE=phase,
        )

    if blocks.parts == 1:
        run("whole", mean, rstd)
    else:
        means, squares = (h.new_empty((blocks.parts, *shape), dtype=torch.float32) for _ in range(2))
        run("sums", means, squares)
        _merge(means, squares, blocks, layout, eps, mean, rstd)
        run("apply", mean, rstd)
    return staged.commit(), mean, rstd


def _merge(
    means: Tensor, squares: Tensor, blocks: _Blocks, layout: Layout, eps: float, mean: Tensor, rstd: Tensor
) -> None:
    """Means and squares of parts [parts, N, G] -> mean and rstd (Chan, Golub & LeVeque 1979), in float64."""
    width = layout.channels // mean.shape[1]
    first = torch.arange(blocks.parts, device=means.device) * blocks.span
    share = ((layout.inner - first).clamp(max=blocks.span).double() / layout.inner)[:, None, None]
    whole = (share * means).sum(0)
    distance = means - whole
    variance = squares.double().sum(0) / (width * layout.inner) + (share * distance * distance).sum(0)
    mean.copy_(whole)
    rstd.copy_(1 / (variance + eps).sqrt())


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
    g_h = torch.empty_like(h) if need_h else g.new_empty(0)
    if h.numel() == 0:
        sums = h.new_zeros((3, n, channels), dtype=torch.float32)
        means = h.new_zeros((2, n, groups), dtype=torch.float32)
    else:
        blocks = _Blocks(layout, groups, h.element_size())
        parameters, rows = _parameters(bias, temb, weight, beta)
        g_dense, dense, staged = layout.dense(g), layout.dense(h), Staged(g_h, layout) if need_h else None
        parts = h.new_empty((blocks.parts, 3, n, channels), dtype=torch.float32)
        means = h.new_empty((2, n, groups), dtype=torch.float32)

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
            )

        run("whole" if blocks.parts == 1 else "sums")
        sums = parts[0] if blocks.parts == 1 else parts.sum(0, dtype=torch.float64).to(torch.float32)
        if blocks.parts > 1:
            weighted = sums[1:] if weight is None else sums[1:] * weight.to(torch.float32)
            of_gx, of_g = weighted.reshape(2, n, groups, -1).double().sum(3) / (channels // groups * layout.inner)
            means[0].copy_(rstd * of_g)
            means[1].copy_(rstd * rstd * of_gx)
            if staged is not None:
                run("apply")
        if staged is not None:
            staged.commit()
    nothing = g.new_empty(0)
    return (
        g_h,
        _sum_of_g_h(sums, means, rstd, weight, layout.inner) if need_sum else nothing.clone(),
        sums[1].clone() if need_weight else nothing.clone(),
        sums[2].clone() if need_beta else nothing.clone(),
    )


def _sum_of_g_h(sums: Tensor, means: Tensor, rstd: Tensor, weight: Tensor | None, inner: int) -> Tensor:
    """[N, C]: the sums over the places of g_h = g_u scale - (base + d slope)"""
    groups = rstd.shape[1]
    base, slope, rstd = (x.double().repeat_interleave(sums.shape[2] // groups, 1) for x in (*means, rstd))
    scale = rstd if weight is None else rstd * weight
    return (scale * sums[2] - (inner * base + slope * sums[0])).to(torch.float32)
