"""RMSNorm of a fused network: y = act(x / max(|x|, eps) weight[c] (1 + scale[n, c]) + shift[n, c]) + residual.

``ops.rms_norm_silu`` wants dense tensors and returns a new one; here x, residual and y are channels of wider buffers,
and scale and shift are read from the table of all timesteps. A program has some pixels of one image with all their
channels, which it reads once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _math, _tile
from .conv_call import NO_TABLES, tables_of
from .conv_epilogue import embedding, fast_silu, nan_outside
from .launch import float_bits, launch_overlapping, long_axis, power_of_two
from .norm import MAX_OFFSET

MAX_CHANNELS = 4096
"""Of a pixel, which lies in the registers of one program."""


@triton.jit(do_not_specialize=["time_count", "label_count", "n", "pixels", "eps"])
def _rms_norm_kernel(
    source_ptr,
    target_ptr,
    weight_ptr,
    residual_ptr,
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
    residual_stride,
    table_stride,
    first_column,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SILU: tl.constexpr,
    EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Axis 0 of the grid: BLOCK_P pixels each; axes 1 and 2: images. Strides are per pixel."""
    _tile.await_previous(OVERLAP)
    image = _tile.program_on_long_axis()
    if image < n:
        p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
        c = tl.arange(0, BLOCK_C)[None, :]
        inside = tl.full([1, BLOCK_C], 1, tl.int1) if EVEN else c < channels
        present = inside & (p < pixels)
        v = _math.load_image(source_ptr + image * pixels * source_stride + (p * source_stride + c), present)
        norm, least = tl.sqrt_rn(tl.sum(v * v, axis=1)[:, None]), _math.float_of_bits(eps)
        # 1 for a pixel that is not there, which with eps 0 would be divided by 0.
        divisor = tl.where(p < pixels, tl.where(norm < least, least, norm), 1.0)
        factor = tl.load(weight_ptr + c, mask=inside, other=0.0)
        offset = tl.full([1, BLOCK_C], -0.0, tl.float32)
        if time_ptr is not None:
            tables = (time_ptr, time_row_ptr, time_count, label_ptr, label_row_ptr, label_count, table_stride)
            whose = image + tl.zeros([1, 1], tl.int64)
            exists = whose >= 0
            factor *= 1.0 + embedding(*tables, whose, exists, first_column + c, inside)
            offset = embedding(*tables, whose, exists, first_column + channels + c, inside)
            offset += nan_outside(time_row_ptr, time_count, label_ptr, label_row_ptr, label_count, whose, exists)
        y = (v * tl.div_rn(tl.full(divisor.shape, 1.0, tl.float32), divisor)) * factor + offset
        if SILU:
            y = _math.silu(y) if target_ptr.dtype.element_ty == tl.float32 else fast_silu(y)
        if residual_ptr is not None:
            place = image * pixels * residual_stride + (p * residual_stride + c)
            y += _math.load_image(residual_ptr + place, present)
        _math.store_image(target_ptr + image * pixels * target_stride + (p * target_stride + c), y, present)


class RMSNorm:
    """One RMSNorm at one place, ready to launch.

    source, target, residual: [n, h, w, channels] views of channels-last buffers; the target's memory is its own.
    weight: float32 [channels]. pixels, warps: of a program; pixels is a power of two. first_column: of the tables'
    2 x channels [scale | shift], or None for neither. ValueError for what it cannot serve.
    """

    def __init__(
        self,
        source: Tensor,
        weight: Tensor,
        target: Tensor,
        eps: float,
        pixels: int,
        warps: int,
        *,
        silu: bool = True,
        first_column: int | None = None,
        residual: Tensor | None = None,
    ) -> None:
        n, h, w, channels = source.shape
        if channels > MAX_CHANNELS:
            raise ValueError(f"a pixel can have at most {MAX_CHANNELS} channels, got {channels}")
        strides = tuple(0 if view is None else view.stride(2) for view in (source, target, residual))
        if h * w * max(strides) > MAX_OFFSET:
            raise ValueError(f"an image can have at most {MAX_OFFSET} elements, got {h * w} pixels of {max(strides)}")
        block_c = power_of_two(channels)
        self._on = target
        self._embedded = first_column is not None
        self._grid = (-(-h * w // pixels), *long_axis(n))
        self._args = (source, target, weight, residual)
        self._sizes = (n, h * w, channels, *strides)
        self._last = (first_column or 0, float_bits(eps))
        self._constants = {
            "BLOCK_P": pixels,
            "BLOCK_C": block_c,
            "SILU": silu,
            "EVEN": channels == block_c,
            "num_warps": warps,
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
        launch_overlapping(_rms_norm_kernel, self._grid, self._on, *arguments, **self._constants)
