"""The last layer of a network, m = 1x1 or 3x3 convolution in float32; a 1x1 also with the reverse step that uses m.

Together, m never goes to memory: x <- c1 x0 + c2 x + c3 m + s z with x0 = clip(a x - b m), see ddpm_step.py. Both
kernels add up the products of a pixel in the same tiles, and the update is that of ``ops.ddpm_step`` operation by
operation, so the result has the same bits either way.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _math, _noise, _tile
from .ddpm_step import table_row
from .launch import launch_overlapping, long_axis, power_of_two

MAX_BLOCK_C = 64
"""Channels that are multiplied at a time, at most: eight threads with 128 bits each of a half-width type."""

PRODUCTS, PRODUCTS_OF_NINE_TAPS = 8192, 4096
"""Pixels x channels of a program: 64 in each of 128 threads. Programs with several taps take that many times longer, so
there are more of them."""

MAX_OUTPUTS = 8
"""Output channels: each costs the program a pass over its pixels' channels."""


@triton.jit
def output_tile(
    source_ptr,
    source_stride,
    weight_ptr,
    bias_ptr,
    image,
    pixel,
    inner,
    w,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """m, float32 [BLOCK_O, pixels], of pixels [pixels] of one image; with the output channels [BLOCK_O, 1].

    TAPS: 1, or 9 of images w pixels wide. weight: [OUTPUTS, TAPS, CHANNELS]."""
    output = tl.arange(0, BLOCK_O)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    source_ptrs = source_ptr + ((image * inner + pixel) * source_stride)[:, None] + c
    weight_ptrs = weight_ptr + c
    m = tl.zeros([BLOCK_O, pixel.shape[0]], tl.float32)
    for tap in range(TAPS):
        tap_ptrs = source_ptrs
        inside = pixel < inner
        if TAPS == 9:
            dy = tap // 3 - 1
            dx = tap % 3 - 1
            x = pixel % w + dx
            tap_ptrs += (dy * w + dx) * source_stride
            inside = inside & (pixel + dy * w >= 0) & (pixel + dy * w < inner) & (x >= 0) & (x < w)
        for first in tl.static_range(0, CHANNELS, BLOCK_C):
            h = _math.load_image(tap_ptrs + first, inside[:, None])
            for o in tl.static_range(OUTPUTS):
                weight = tl.load(weight_ptrs + o * TAPS * CHANNELS + first)
                m = tl.where(output == o, m + tl.sum(h * weight, axis=1)[None, :], m)
        weight_ptrs += CHANNELS
    bias = tl.load(bias_ptr + output, mask=output < OUTPUTS, other=0.0)
    return m + bias, output


@triton.jit
def _output_kernel(
    source_ptr,
    out_ptr,
    weight_ptr,
    bias_ptr,
    n,
    inner,
    w,
    source_stride,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """m to out, float32 [n, outputs, inner]. Axis 0 of the grid: blocks of pixels; axes 1 and 2: images."""
    _tile.await_previous(OVERLAP)
    image = _tile.program_on_long_axis()
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    if image < n:
        m, output = output_tile(
            source_ptr,
            source_stride,
            weight_ptr,
            bias_ptr,
            image,
            pixel,
            inner,
            w,
            TAPS,
            CHANNELS,
            OUTPUTS,
            BLOCK_O,
            BLOCK_C,
        )
        place = (image * OUTPUTS + output) * inner + pixel[None, :]
        tl.store(out_ptr + place, m, mask=(output < OUTPUTS) & (pixel < inner)[None, :])


@triton.jit
def _output_step_kernel(
    source_ptr,
    weight_ptr,
    bias_ptr,
    x_ptr,
    table_ptr,
    t_of_row_ptr,
    row_ptr,
    steps,
    rng_ptr,
    x0_out_ptr,
    bad_row_ptr,
    n,
    inner_units,
    source_stride,
    UNIT: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """The same, and the reverse step of x, float32 [n, outputs, inner], in place. inner is a multiple of 4."""
    _tile.await_previous(OVERLAP)
    image = _tile.program_on_long_axis()
    inner = inner_units * UNIT
    pixel = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    if image < n:
        m, output = output_tile(
            source_ptr,
            source_stride,
            weight_ptr,
            bias_ptr,
            image,
            pixel,
            inner,
            inner,
            1,
            CHANNELS,
            OUTPUTS,
            BLOCK_O,
            BLOCK_C,
        )
        mask = (output < OUTPUTS) & (pixel < inner)[None, :]
        place = (image * OUTPUTS + output) * inner + pixel[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0)
        a, b, c1, c2, c3, _, s, bound, row, known = table_row(table_ptr, row_ptr, steps)

        x0 = _math.clip(a * x - b * m, _math.negated(bound), bound)
        y = c1 * x0 + c2 * x + c3 * m
        # Without noise -0 takes its place, from its bits: see ddpm_step.py.
        noisy = known & (s != 0.0)
        z = tl.full([BLOCK_O, BLOCK_P], -(2**31), tl.int32).to(tl.float32, bitcast=True)
        if noisy:
            stream = tl.load(t_of_row_ptr + row) + 1
            # Quads of four elements in contiguous order: four pixels of one channel.
            quad = output * (inner // 4) + (tl.program_id(0) * (BLOCK_P // 4) + tl.arange(0, BLOCK_P // 4))[None, :]
            z = _noise.normal_of_quads(rng_ptr, stream, image + tl.zeros([1, 1], tl.int64), quad)
        y = y + tl.where(noisy, s, 0.0) * z

        tl.store(x_ptr + place, y, mask=mask)
        if x0_out_ptr is not None:
            tl.store(x0_out_ptr + place, x0, mask=mask)
        first = tl.load(bad_row_ptr) < 0
        bits = tl.where(mask, y, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if first & (tl.max(bits) >= 0x7F800000):
            tl.store(bad_row_ptr, tl.maximum(row, 0).to(tl.int32))


class Output:
    """The last layer at one place, ready to launch.

    source: [n, h, w, channels] view of a channels-last buffer, channels a multiple of 16. weight: float32 [outputs,
    channels, k, k], channels last, k = 1 or 3 (padding 1); bias: float32 [outputs], contiguous. At most 8 outputs.
    ValueError for what it cannot serve.
    """

    def __init__(self, source: Tensor, weight: Tensor, bias: Tensor) -> None:
        n, h, w, channels = source.shape
        outputs = weight.shape[0]
        if channels % 16:
            raise ValueError(f"channels must be a multiple of 16, got {channels}")
        if outputs > MAX_OUTPUTS:
            raise ValueError(f"at most {MAX_OUTPUTS} output channels are served, got {outputs}")
        if not weight.is_contiguous(memory_format=torch.channels_last):
            raise ValueError(f"weight must be channels_last, got strides {weight.stride()}")
        block_c = math.gcd(channels, MAX_BLOCK_C)
        self._taps = weight.shape[2] * weight.shape[3]
        block_p = (PRODUCTS if self._taps == 1 else PRODUCTS_OF_NINE_TAPS) // MAX_BLOCK_C
        self._source, self._weights = source, (weight, bias)
        self._grid = (-(-h * w // block_p), *long_axis(n))
        self._sizes = (n, h * w, w, source.stride(2))
        self._constants = {
            "CHANNELS": channels,
            "OUTPUTS": outputs,
            "BLOCK_O": power_of_two(outputs),
            "BLOCK_P": block_p,
            "BLOCK_C": block_c,
        }

    def __call__(self, out: Tensor) -> None:
        """m to out, float32 (n, outputs, h, w) contiguous."""
        arguments = (self._source, out, *self._weights, *self._sizes)
        launch_overlapping(_output_kernel, self._grid, out, *arguments, TAPS=self._taps, **self._constants)

    def step(
        self,
        x: Tensor,
        table: Tensor,
        t_of_row: Tensor,
        row: Tensor,
        rng: Tensor,
        bad_row: Tensor,
        x0_out: Tensor | None = None,
    ) -> None:
        """m and at once ``ops.ddpm_step(x, m, table, t_of_row, row, rng, x0_out=x0_out, bad_row=bad_row)``.

        x: float32 (n, outputs, h, w) contiguous, changed in place; the rest as there. For a step without guidance,
        given noise, thresholding, learned variance and x0_prev. ValueError where h w is not a multiple of 4, and of a
        3x3 layer.
        """
        n, inner, _, stride = self._sizes
        if self._taps != 1:
            raise ValueError(f"only a 1x1 layer and the step are one pass, got {self._taps} taps")
        if inner % 4:
            raise ValueError(f"h x w must be a multiple of 4 for a step in one pass, got {inner}")
        if x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"x must be contiguous float32, got {x.dtype} with strides {x.stride()}")
        unit = 16 if inner % 16 == 0 else 4
        launch_overlapping(
            _output_step_kernel,
            self._grid,
            x,
            self._source,
            *self._weights,
            x,
            table,
            t_of_row,
            row,
            table.shape[0],
            rng,
            x0_out,
            bad_row,
            n,
            inner // unit,
            stride,
            UNIT=unit,
            **self._constants,
        )
