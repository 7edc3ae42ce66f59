"""group_norm_silu: y = act(GroupNorm(h + bias[c] + temb[n, c])), act = identity or SiLU."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _group_norm, _math
from .launch import float_bits, launch


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
    channels = groups * group_channels
    sample, p_begin = tl.program_id(0).to(tl.int64), tl.program_id(2) * SPAN
    row = sample * channels
    h_ptr += row * inner
    g = _group_norm.group_numbers(tl.program_id(1) * BLOCK_G, BLOCK_G, LAST)
    statistics = (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + sample) * groups + g
    if PHASE == "apply":
        statistics = sample * groups + g
        mean = tl.load(mean_ptr + statistics, mask=g < groups, other=0.0)
        rstd = tl.load(rstd_ptr + statistics, mask=g < groups, other=0.0)
    else:
        # First the mean, then the squares about it, each relative to a value of the group, so that nothing cancels.
        c_first = g * group_channels
        p_first = p_begin * channels + c_first if LAST else c_first * inner + p_begin
        first = _math.load_image(h_ptr + p_first, g < groups)
        first = first + _group_norm.added_to(bias_ptr, temb_ptr, row, c_first, g < groups)
        count = tl.full(first.shape, 1.0, tl.float32) * (group_channels * tl.minimum(SPAN, inner - p_begin))
        shift = tl.zeros(first.shape, tl.float32)
        for reading in tl.static_range(2):
            total = tl.zeros([BLOCK_P, BLOCK_G, BLOCK_C] if LAST else [BLOCK_G, BLOCK_C, BLOCK_P], tl.float32)
            for c0 in range(0, WIDTH, BLOCK_C):
                channel, present = _group_norm.channels_of(g, c0, groups, group_channels, BLOCK_C, LAST)
                added = _group_norm.added_to(bias_ptr, temb_ptr, row, channel, present)
                for offset in range(0, SPAN, BLOCK_P):
                    place, mask = _group_norm.places_of(
                        channel, present, p_begin + offset, channels, inner, BLOCK_P, LAST
                    )
                    d = ((_math.load_image(h_ptr + place, mask) + added) - first) - shift
                    d = tl.where(mask, d, 0.0)
                    total = total + (d if reading == 0 else d * d)
            total = _group_norm.over_channels(_group_norm.over_places(total, LAST), LAST)
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
        y_ptr += row * inner
        for c0 in range(0, WIDTH, BLOCK_C):
            channel, present = _group_norm.channels_of(g, c0, groups, group_channels, BLOCK_C, LAST)
            added = _group_norm.added_to(bias_ptr, temb_ptr, row, channel, present)
            shifted, scale, beta, _ = _group_norm.affine(
                weight_ptr, beta_ptr, row, channel, present, mean, rstd, added, W_ROWS, B_ROWS
            )
            for offset in range(0, SPAN, BLOCK_P):
                place, mask = _group_norm.places_of(channel, present, p_begin + offset, channels, inner, BLOCK_P, LAST)
                u = (_math.load_image(h_ptr + place, mask) - shifted) * scale + beta
                _math.store_image(y_ptr + place, _math.silu(u) if SILU else u, mask)


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
    blocks = _group_norm.Blocks(layout, num_groups, h.element_size())
    parameters, rows = _group_norm.parameters(bias, temb, weight, beta)
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
    means: Tensor, squares: Tensor, blocks: _group_norm.Blocks, layout: Layout, eps: float, mean: Tensor, rstd: Tensor
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
