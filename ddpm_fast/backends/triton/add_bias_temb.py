"""add_bias_temb: y = act(h + bias[c]) + temb[n, c], act = identity or SiLU, and its gradients."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _math, _tile
from .launch import INTERPRETED, check_size, launch, long_axis, power_of_two

ELEMENTS = 1024
"""Elements per program on a GPU: 4 warps x 8, one 128-bit access of a half-width type a thread or two of float32.
More would take the registers of the SiLU (its division above all) from the number of warps that hide the memory's
latency."""

INTERPRETED_ELEMENTS = 1 << 17
"""In the interpreter, where a program costs the same whatever its size. Tests lower it."""

SUMMED_PIXELS = 1024
"""Pixels that the backward pass adds up in float32. Longer sums come in such parts, which torch adds in float64: more
programs for large images, and sums no further from the truth than eager PyTorch's."""


@triton.jit
def _add_bias_temb_kernel(
    h_ptr,
    bias_ptr,
    temb_ptr,
    y_ptr,
    rows,
    period,
    width_units,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    COUNT: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    """h as [rows, width]: a row is a channel (contiguous) or a pixel (channels_last), ``period`` of them a sample."""
    width = width_units * UNIT
    row = (tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    column = (_tile.program_on_long_axis().to(tl.int32) * BLOCK_W + tl.arange(0, BLOCK_W))[None, :]
    present = row < rows
    inside = column < width
    mask = present & inside
    place = row * width + column
    y = _math.load_image(h_ptr + place, mask)
    # COUNT is int32 wherever it can be: a 64-bit division costs more than the rest of the kernel.
    if CHANNELS_LAST:
        if bias_ptr is not None:
            y = y + _math.load_image(bias_ptr + column, inside)
    elif bias_ptr is not None:
        channel = row.to(COUNT) % period
        y = y + _math.load_image(bias_ptr + channel, present)
    if SILU:
        y = _math.silu(y)
    if temb_ptr is not None:
        if CHANNELS_LAST:
            sample = (row.to(COUNT) // period).to(tl.int64)
            y = y + _math.load_image(temb_ptr + sample * width + column, mask)
        else:
            y = y + _math.load_image(temb_ptr + row, present)
    _math.store_image(y_ptr + place, y, mask)


@triton.jit
def _add_bias_temb_backward_kernel(
    g_ptr,
    h_ptr,
    bias_ptr,
    g_h_ptr,
    gh_sum_ptr,
    g_sum_ptr,
    n,
    channel_units,
    inner_units,
    CHANNEL_UNIT: tl.constexpr,
    INNER_UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SPAN: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SILU: tl.constexpr,
):
    """BLOCK_C channels of one sample over SPAN pixels; the sums are those of this span, [spans, n, channels]."""
    channels = channel_units * CHANNEL_UNIT
    inner = inner_units * INNER_UNIT
    sample = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    present = channel < channels
    start = sample * channels * inner
    if bias_ptr is not None:
        bias = _math.load_image(bias_ptr + channel, present)
    gh_sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    g_sums = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    first = tl.program_id(2) * SPAN
    for offset in range(0, SPAN, BLOCK_P):
        pixel = (first + offset + tl.arange(0, BLOCK_P))[None, :]
        mask = present & (pixel < inner)
        if CHANNELS_LAST:
            place = start + pixel.to(tl.int64) * channels + channel
        else:
            place = start + channel.to(tl.int64) * inner + pixel
        g = _math.load_image(g_ptr + place, mask)
        g_h = g
        if SILU:
            v = _math.load_image(h_ptr + place, mask)
            if bias_ptr is not None:
                v = v + bias
            g_h = g * _math.silu_grad(v)
        if g_h_ptr is not None:
            _math.store_image(g_h_ptr + place, g_h, mask)
        gh_sums = gh_sums + tl.where(mask, g_h, 0.0)
        g_sums = g_sums + g
    sums_place = (tl.program_id(2) * n + sample) * channels + channel
    if g_sum_ptr is not None or not SILU:
        g_sum = _math.sum_over_columns(g_sums)
    if g_sum_ptr is not None:
        tl.store(g_sum_ptr + sums_place, g_sum, mask=present)
    if gh_sum_ptr is not None:
        gh_sum = _math.sum_over_columns(gh_sums) if SILU else g_sum
        tl.store(gh_sum_ptr + sums_place, gh_sum, mask=present)


def _budget() -> int:
    return INTERPRETED_ELEMENTS if INTERPRETED else ELEMENTS


def _total(parts: Tensor) -> Tensor:
    """[spans, N, C] -> [N, C]"""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0, dtype=torch.float64).to(parts.dtype)


def add_bias_temb(h: Tensor, bias: Tensor | None, temb: Tensor | None, act: str) -> Tensor:
    """y in the dtype and memory format of ``h`` (N, C, ...); ``bias`` [C] and ``temb`` [N, C] of any float dtype."""
    layout = Layout.of(h)
    check_size(layout)
    y = torch.empty_like(h)
    if h.numel() == 0:
        return y
    # A vector (N, C) is one pixel: taken as channels_last, its channels are read in one run.
    channels_last = layout.channels_last or layout.inner == 1
    period, width = (layout.inner, layout.channels) if channels_last else (layout.channels, layout.inner)
    rows = layout.n * period
    unit = math.gcd(width, 16)
    block_w = min(_budget(), power_of_two(width))
    block_r = min(_budget() // block_w, power_of_two(rows))
    staged = Staged(y, layout)
    launch(
        _add_bias_temb_kernel,
        (-(-rows // block_r), *long_axis(-(-width // block_w))),
        h,
        layout.dense(h),
        None if bias is None else bias.contiguous(),
        None if temb is None else temb.contiguous(),
        staged.data,
        rows,
        period,
        width // unit,
        UNIT=unit,
        BLOCK_R=block_r,
        BLOCK_W=block_w,
        COUNT=tl.int32 if rows < 2**31 else tl.int64,
        CHANNELS_LAST=channels_last,
        SILU=act == "silu",
    )
    return staged.commit()


def add_bias_temb_backward(
    g: Tensor, h: Tensor | None, bias: Tensor | None, act: str, need_h: bool, need_bias: bool, need_temb: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """g_h = g act'(h + bias) and, float32 [N, C], the sums over the pixels of g_h and of g; empty where not needed."""
    like = h if h is not None else g
    layout = Layout.of(like)
    check_size(layout)
    nothing = g.new_empty(0)
    g_h = torch.empty_like(like) if need_h else nothing
    inner, channels = layout.inner, layout.channels
    # At most 32768 spans, for the third axis of a grid ends at 65535.
    span = min(power_of_two(inner), max(SUMMED_PIXELS, power_of_two(inner) // 32768))
    if layout.channels_last:
        block_c = min(_budget(), 64, power_of_two(channels))
        block_p = min(_budget() // block_c, span)
    else:
        block_p = min(_budget(), span)
        block_c = min(_budget() // block_p, power_of_two(channels))
    spans = -(-inner // span)
    sums = [
        g.new_empty((spans, layout.n, channels), dtype=torch.float32) if needed else None
        for needed in (need_bias, need_temb)
    ]
    if g.numel() > 0:
        staged = Staged(g_h, layout) if need_h else None
        channel_unit, inner_unit = math.gcd(channels, 16), math.gcd(inner, 16)
        silu = act == "silu"
        launch(
            _add_bias_temb_backward_kernel,
            (layout.n, -(-channels // block_c), spans),
            g,
            layout.dense(g),
            layout.dense(h) if silu and h is not None else None,
            bias.contiguous() if silu and bias is not None else None,
            None if staged is None else staged.data,
            *sums,
            layout.n,
            channels // channel_unit,
            inner // inner_unit,
            CHANNEL_UNIT=channel_unit,
            INNER_UNIT=inner_unit,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            SPAN=span,
            CHANNELS_LAST=layout.channels_last,
            SILU=silu,
        )
        if staged is not None:
            staged.commit()
    gh_sum, g_sum = (nothing if parts is None else _total(parts) for parts in sums)
    return g_h, gh_sum, g_sum
