"""GroupNorm of a fused network: y = act(GroupNorm(x) (1 + scale[n, c]) + shift[n, c]), put where it belongs.

``ops.group_norm_silu`` wants dense tensors and returns a new one; here x and y are channels of wider buffers, and scale
and shift are read from the table of all timesteps. A program has a few whole groups of one image, side by side so that
it reads whole sectors of memory: all pixels for mean and variance, and again, by then from a cache, for the result.

Sums are taken in float32 of x less the mean of its first BLOCK_P pixels, channel by channel. Of P pixels that mean is
at most sqrt(P / BLOCK_P) standard deviations off, so however large the mean is, the variance keeps its digits. Nor is
the group's mean rounded to as few as a large number has: it is subtracted in two steps, a middle first, then the rest.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _math, _tile
from .conv import loop_bound
from .conv_call import NO_TABLES, tables_of
from .conv_epilogue import embedding, fast_silu, nan_outside
from .launch import float_bits, launch_overlapping, long_axis, power_of_two

MAX_SPAN = 64
"""Channels of a program: sums over groups are made in a square of them."""

ELEMENTS_OF_THREAD, FEWEST = 16, 8
"""Of a block: two 128-bit accesses of a half-width type, one where there are no more."""

MAX_OFFSET = 2**31 - 2**24
"""Elements from the first to the last of an image that int32 can number, the rounding up to a block included."""


@triton.jit
def group_sum(value, WIDTH: tl.constexpr):
    """To every channel of value, [1, channels], the sum over the WIDTH channels of its group."""
    c = tl.arange(0, value.shape[1])
    same = c[:, None] // WIDTH == c[None, :] // WIDTH
    return tl.sum(tl.where(same, value, 0.0), axis=1)[None, :]


@triton.jit(do_not_specialize=["time_count", "label_count", "n", "pixels", "eps"])
def _norm_kernel(
    source_ptr,
    target_ptr,
    weight_ptr,
    bias_ptr,
    time_ptr,
    time_row_ptr,
    time_count,
    label_ptr,
    label_row_ptr,
    label_count,
    n,
    pixels,
    channels,
    source_stride,
    target_stride,
    table_stride,
    first_column,
    eps,
    WIDTH: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Axis 0 of the grid: SPAN channels each, whole groups of WIDTH; axes 1 and 2: images. Strides are per pixel."""
    _tile.await_previous(OVERLAP)
    image = _tile.program_on_long_axis()
    if image < n:
        p = tl.arange(0, BLOCK_P)[:, None]
        c = tl.arange(0, BLOCK_C)[None, :]
        channel = tl.program_id(0) * SPAN + c
        inside = tl.full([1, BLOCK_C], 1, tl.int1) if EVEN else (c < SPAN) & (channel < channels)
        source_ptrs = source_ptr + image * pixels * source_stride + (p * source_stride + channel)
        target_ptrs = target_ptr + image * pixels * target_stride + (p * target_stride + channel)

        one = tl.full([1, 1], 1.0, tl.float32)
        v = _math.load_image(source_ptrs, inside & (p < pixels))
        about = tl.sum(v, axis=0)[None, :] * tl.div_rn(one, one * tl.minimum(pixels, BLOCK_P).to(tl.float32))
        total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for first in range(0, loop_bound(pixels), BLOCK_P):
            present = inside & (first + p < pixels)
            v = _math.load_image(source_ptrs + first * source_stride, present)
            d = tl.where(present, v - about, 0.0)
            total += d
            squares += d * d
        # Of every channel, then of its group (Chan et al. 1983), whose mean is middle + off.
        each = tl.div_rn(one, one * pixels.to(tl.float32))
        off_channel = tl.sum(total, axis=0)[None, :] * each
        variance_channel = tl.sum(squares, axis=0)[None, :] * each - off_channel * off_channel
        variance_channel = tl.where(variance_channel < 0.0, 0.0, variance_channel)
        middle = group_sum(about, WIDTH) * (1.0 / WIDTH)
        off_channel += about - middle
        off = group_sum(off_channel, WIDTH) * (1.0 / WIDTH)
        apart = off_channel - off
        variance = group_sum(variance_channel + apart * apart, WIDTH) * (1.0 / WIDTH)
        rstd = tl.div_rn(one, tl.sqrt_rn(variance + _math.float_of_bits(eps)))

        factor = tl.load(weight_ptr + channel, mask=inside, other=0.0)
        offset = tl.load(bias_ptr + channel, mask=inside, other=0.0)
        if time_ptr is not None:
            tables = (time_ptr, time_row_ptr, time_count, label_ptr, label_row_ptr, label_count, table_stride)
            whose = image + tl.zeros([1, 1], tl.int64)
            exists = whose >= 0
            scale = 1.0 + embedding(*tables, whose, exists, first_column + channel, inside)
            shift = embedding(*tables, whose, exists, first_column + channels + channel, inside)
            shift += nan_outside(time_row_ptr, time_count, label_ptr, label_row_ptr, label_count, whose, exists)
            factor = factor * scale
            offset = offset * scale + shift
        factor = factor * rstd
        for first in range(0, loop_bound(pixels), BLOCK_P):
            present = inside & (first + p < pixels)
            v = _math.load_image(source_ptrs + first * source_stride, present)
            y = (v - middle - off) * factor + offset
            if SILU:
                y = _math.silu(y) if target_ptr.dtype.element_ty == tl.float32 else fast_silu(y)
            _math.store_image(target_ptrs + first * target_stride, y, present)


class Norm:
    """One GroupNorm at one place, ready to launch.

    source, target: [n, h, w, channels] views of channels-last buffers, not the same memory. weight, bias: float32
    [channels]. span: channels of a program, whole groups; warps: of a program, or fewer where the image is small.
    first_column: of the tables' 2 x channels [scale | shift], or None for neither. ValueError for what it cannot serve.
    """

    def __init__(
        self,
        source: Tensor,
        weight: Tensor,
        bias: Tensor,
        target: Tensor,
        groups: int,
        eps: float,
        span: int,
        warps: int,
        *,
        silu: bool = True,
        first_column: int | None = None,
    ) -> None:
        n, h, w, channels = source.shape
        width = channels // groups
        if span > MAX_SPAN or span % width:
            raise ValueError(f"span must be groups of {width} channels, at most {MAX_SPAN} channels, got {span}")
        strides = (source.stride(2), target.stride(2))
        if h * w * max(strides) > MAX_OFFSET:
            raise ValueError(f"an image can have at most {MAX_OFFSET} elements, got {h * w} pixels of {max(strides)}")
        block_c = power_of_two(span)
        block_p = min(max(1, 32 * warps * ELEMENTS_OF_THREAD // block_c), power_of_two(h * w))
        self._on = target
        self._embedded = first_column is not None
        self._grid = (-(-channels // span), *long_axis(n))
        self._args = (source, target, weight, bias)
        self._sizes = (n, h * w, channels, *strides)
        self._last = (first_column or 0, float_bits(eps))
        self._constants = {
            "WIDTH": width,
            "SPAN": span,
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
            "SILU": silu,
            "EVEN": span == block_c and channels % span == 0,
            "num_warps": max(1, min(warps, block_p * block_c // (32 * FEWEST))),
        }

    def __call__(
        self,
        time_table: Tensor | None = None,
        time_rows: Tensor | None = None,
        label_table: Tensor | None = None,
        label_rows: Tensor | None = None,
    ) -> None:
        """Launch. Tables: float32 [entries, columns] contiguous; rows: int64 [n]."""
        tables, stride = (NO_TABLES, 0)
        if self._embedded and time_table is not None:
            tables, stride = tables_of(time_table, time_rows, label_table, label_rows)
        arguments = (*self._args, *tables, *self._sizes, stride, *self._last)
        launch_overlapping(_norm_kernel, self._grid, self._on, *arguments, **self._constants)
