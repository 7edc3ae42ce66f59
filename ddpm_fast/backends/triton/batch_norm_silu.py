"""batch_norm_silu: y = act((h - mean) rstd weight + bias) + temb[n, c], the statistics being the batch's or given."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _batch_norm, _math, _rms_norm
from .launch import launch


@triton.jit(do_not_specialize=["n", "eps_bits"])
def _batch_norm_silu_sums_kernel(
    h_ptr,
    sums_ptr,
    n,
    parts,
    channel_blocks,
    channel_units,
    inner_units,
    eps_bits,
    SPAN: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    INNER_UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
):
    """sums_ptr [3, n, parts, channels]: of each part the mean of its first tile, how much that is short of the part's
    mean, and the squares about the latter. Of P places and a tile of K, the squares of d = h - near are at most
    1 + P / K times those, however large the mean is."""
    channels, inner = channel_units * CHANNEL_UNIT, inner_units * INNER_UNIT
    sample, row, first, c = _batch_norm.place_of_program(parts, channel_blocks, channels, SPAN, BLOCK_C, LAST)
    h_ptr += sample * channels * inner
    count = tl.minimum(inner - first, SPAN)
    one = tl.full(c.shape, 1.0, tl.float32)
    p = _rms_norm.places_of(first, BLOCK_P, LAST)
    mask = (c < channels) & (p < inner)
    h = _math.load_image(h_ptr + _rms_norm.offsets_of(c, p, channels, inner, LAST), mask)
    near = tl.div_rn(_rms_norm.over_places(h, LAST), one * tl.minimum(count, BLOCK_P).to(tl.float32))
    total = tl.zeros([BLOCK_P, BLOCK_C] if LAST else [BLOCK_C, BLOCK_P], tl.float32)
    squares = total
    for offset in range(0, SPAN, BLOCK_P):
        p = _rms_norm.places_of(first + offset, BLOCK_P, LAST)
        mask = (c < channels) & (p < inner)
        h = _math.load_image(h_ptr + _rms_norm.offsets_of(c, p, channels, inner, LAST), mask)
        d = tl.where(mask, h - near, 0.0)
        total += d
        squares += d * d
    sum_d = _rms_norm.over_places(total, LAST)
    off = tl.div_rn(sum_d, one * count.to(tl.float32))
    about = _rms_norm.over_places(squares, LAST) - off * sum_d
    to = sums_ptr + row * channels + c
    every = n.to(tl.int64) * parts * channels
    tl.store(to, near, mask=c < channels)
    tl.store(to + every, off, mask=c < channels)
    tl.store(to + 2 * every, tl.where(about < 0.0, 0.0, about), mask=c < channels)


@triton.jit(do_not_specialize=["eps_bits"])
def _batch_norm_silu_kernel(
    h_ptr,
    temb_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    y_ptr,
    parts,
    channel_blocks,
    channel_units,
    inner_units,
    eps_bits,
    SPAN: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    INNER_UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    channels, inner = channel_units * CHANNEL_UNIT, inner_units * INNER_UNIT
    sample, _, first, c = _batch_norm.place_of_program(parts, channel_blocks, channels, SPAN, BLOCK_C, LAST)
    h_ptr += sample * channels * inner
    y_ptr += sample * channels * inner
    mean, scale, beta = _batch_norm.affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps_bits, c, channels)
    if temb_ptr is not None:
        temb = _math.load_image(temb_ptr + sample * channels + c, c < channels)
    for offset in range(0, SPAN, BLOCK_P):
        p = _rms_norm.places_of(first + offset, BLOCK_P, LAST)
        place, mask = _rms_norm.offsets_of(c, p, channels, inner, LAST), (c < channels) & (p < inner)
        y = (_math.load_image(h_ptr + place, mask) - mean) * scale + beta
        if SILU:
            y = _math.silu(y)
        if temb_ptr is not None:
            y = y + temb
        _math.store_image(y_ptr + place, y, mask)


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
    """y in the dtype and memory format of ``h`` (N, C, ...), and float32 mean and variance [C]."""
    layout = Layout.of(h)
    y = torch.empty_like(h)
    if running_mean is not None and running_var is not None:
        mean, var = (value.to(torch.float32, copy=True) for value in (running_mean, running_var))
    elif h.numel() == 0:
        mean, var = (h.new_full(h.shape[1:2], float("nan"), dtype=torch.float32) for _ in range(2))
    if h.numel() == 0:
        return y, mean, var
    blocks = _batch_norm.Blocks(layout, eps)
    x = layout.dense(h)
    if running_mean is None or running_var is None:
        sums = h.new_empty(blocks.sums_shape, dtype=torch.float32)
        launch(_batch_norm_silu_sums_kernel, blocks.grid, h, x, sums, layout.n, *blocks.args, **blocks.constants)
        mean, var = blocks.moments(sums)
    staged = Staged(y, layout)
    launch(
        _batch_norm_silu_kernel,
        blocks.grid,
        h,
        x,
        *_batch_norm.flat(temb, weight, bias),
        mean,
        var,
        staged.data,
        *blocks.args,
        **blocks.constants,
        SILU=act == "silu",
    )
    return staged.commit(), mean, var
