"""rms_norm_silu: y = act(h sqrt(C) / max(|h|, eps) weight + beta) + residual, |h| over the channels of a place."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _math, _rms_norm
from .launch import launch

OF_THREAD = 16
"""Elements: two 128-bit accesses of a half-width type, or four of float32."""


@triton.jit
def _finish(h, factor, weight, beta, residual_ptr, y_ptr, place, mask, SILU: tl.constexpr):
    """Store act(h factor weight + beta) + residual."""
    y = (h * factor) * weight + beta
    if SILU:
        y = _math.silu(y)
    if residual_ptr is not None:
        y = y + _math.load_image(residual_ptr + place, mask)
    _math.store_image(y_ptr + place, y, mask)


@triton.jit(do_not_specialize=["root_bits", "eps_bits"])
def _rms_norm_silu_kernel(
    h_ptr,
    weight_ptr,
    beta_ptr,
    residual_ptr,
    y_ptr,
    parts,
    channel_units,
    inner_units,
    root_bits,
    eps_bits,
    SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNEL_UNIT: tl.constexpr,
    INNER_UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    LAST: tl.constexpr,
    W_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    SILU: tl.constexpr,
):
    channels, inner = channel_units * CHANNEL_UNIT, inner_units * INNER_UNIT
    sample = tl.program_id(0) // parts
    p = _rms_norm.places_of((tl.program_id(0) - sample * parts) * SPAN, BLOCK_P, LAST)
    row = sample.to(tl.int64) * channels
    h_ptr += row * inner
    y_ptr += row * inner
    if residual_ptr is not None:
        residual_ptr += row * inner
    if WIDTH == BLOCK_C:
        c = _rms_norm.channels_of(0, BLOCK_C, LAST)
        place, mask = _rms_norm.offsets_of(c, p, channels, inner, LAST), (c < channels) & (p < inner)
        h = _math.load_image(h_ptr + place, mask)
        squares = _rms_norm.over_channels(h * h, LAST)
        factor, _ = _rms_norm.factors_of(squares, p < inner, root_bits, eps_bits)
        weight, beta = _rms_norm.affine(weight_ptr, beta_ptr, row, c, channels, W_ROWS, B_ROWS)
        _finish(h, factor, weight, beta, residual_ptr, y_ptr, place, mask, SILU)
    else:
        total = tl.zeros([BLOCK_P, BLOCK_C] if LAST else [BLOCK_C, BLOCK_P], tl.float32)
        for c0 in range(0, WIDTH, BLOCK_C):
            c = _rms_norm.channels_of(c0, BLOCK_C, LAST)
            place, mask = _rms_norm.offsets_of(c, p, channels, inner, LAST), (c < channels) & (p < inner)
            h = _math.load_image(h_ptr + place, mask)
            total += h * h
        squares = _rms_norm.over_channels(total, LAST)
        factor, _ = _rms_norm.factors_of(squares, p < inner, root_bits, eps_bits)
        for c0 in range(0, WIDTH, BLOCK_C):
            c = _rms_norm.channels_of(c0, BLOCK_C, LAST)
            place, mask = _rms_norm.offsets_of(c, p, channels, inner, LAST), (c < channels) & (p < inner)
            h = _math.load_image(h_ptr + place, mask)
            weight, beta = _rms_norm.affine(weight_ptr, beta_ptr, row, c, channels, W_ROWS, B_ROWS)
            _finish(h, factor, weight, beta, residual_ptr, y_ptr, place, mask, SILU)


def rms_norm_silu(
    h: Tensor, weight: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float, act: str
) -> Tensor:
    """y in the dtype and memory format of ``h`` (N, C, ...)."""
    layout = Layout.of(h)
    y = torch.empty_like(h)
    if h.numel() == 0:
        return y
    blocks = _rms_norm.Blocks(layout, OF_THREAD, eps)
    parameters, rows = _rms_norm.parameters(weight, beta)
    staged = Staged(y, layout)
    launch(
        _rms_norm_silu_kernel,
        blocks.grid,
        h,
        layout.dense(h),
        *parameters,
        None if residual is None else layout.dense(residual),
        staged.data,
        *blocks.args,
        **blocks.constants,
        **rows,
        SILU=act == "silu",
    )
    return staged.commit()
