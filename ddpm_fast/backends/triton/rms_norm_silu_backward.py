"""The gradients of rms_norm_silu."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _math, _rms_norm
from .launch import launch

OF_THREAD = 8
"""Elements, of h and g each, beside as many of both sums."""


@triton.jit
def _gradients(g_ptr, h, place, mask, factor, weight, beta, SILU: tl.constexpr):
    """xhat = h factor and g_u = g act'(xhat weight + beta)"""
    xhat = h * factor
    g = _math.load_image(g_ptr + place, mask)
    return xhat, (g * _math.silu_grad(xhat * weight + beta) if SILU else g)


@triton.jit
def _store_sums(d_weight_ptr, d_beta_ptr, row, c, channels, of_gx, of_g, LAST: tl.constexpr):
    """Store the sums over the places of a tile."""
    if d_weight_ptr is not None:
        tl.store(d_weight_ptr + row + c, _rms_norm.over_places(of_gx, LAST), mask=c < channels)
    if d_beta_ptr is not None:
        tl.store(d_beta_ptr + row + c, _rms_norm.over_places(of_g, LAST), mask=c < channels)


@triton.jit(do_not_specialize=["root_bits", "eps_bits"])
def _rms_norm_silu_backward_kernel(
    g_ptr,
    h_ptr,
    weight_ptr,
    beta_ptr,
    g_h_ptr,
    d_weight_ptr,
    d_beta_ptr,
    n,
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
    """d_weight_ptr, d_beta_ptr [parts, n, channels]: the sums of g_u xhat and of g_u over the places of each part."""
    channels, inner = channel_units * CHANNEL_UNIT, inner_units * INNER_UNIT
    sample = tl.program_id(0) // parts
    part = tl.program_id(0) - sample * parts
    row = sample.to(tl.int64) * channels
    sums_row = part.to(tl.int64) * n * channels + row
    g_ptr += row * inner
    h_ptr += row * inner
    if g_h_ptr is not None:
        g_h_ptr += row * inner
    share = tl.div_rn(1.0, channels.to(tl.float32))
    zeros = tl.zeros([BLOCK_P, BLOCK_C] if LAST else [BLOCK_C, BLOCK_P], tl.float32)
    if WIDTH == BLOCK_C:
        c = _rms_norm.channels_of(0, BLOCK_C, LAST)
        weight, beta = _rms_norm.affine(weight_ptr, beta_ptr, row, c, channels, W_ROWS, B_ROWS)
        of_gx, of_g = zeros, zeros
        for offset in range(0, SPAN, BLOCK_P):
            p = _rms_norm.places_of(part * SPAN + offset, BLOCK_P, LAST)
            place, mask = _rms_norm.offsets_of(c, p, channels, inner, LAST), (c < channels) & (p < inner)
            h = _math.load_image(h_ptr + place, mask)
            squares = _rms_norm.over_channels(h * h, LAST)
            factor, above = _rms_norm.factors_of(squares, p < inner, root_bits, eps_bits)
            xhat, g_u = _gradients(g_ptr, h, place, mask, factor, weight, beta, SILU)
            of_gx, of_g = of_gx + g_u * xhat, of_g + g_u
            if g_h_ptr is not None:
                g_x = g_u * weight
                mean = _rms_norm.over_channels(g_x * xhat, LAST) * share * above
                _math.store_image(g_h_ptr + place, factor * (g_x - xhat * mean), mask)
        _store_sums(d_weight_ptr, d_beta_ptr, sums_row, c, channels, of_gx, of_g, LAST)
    else:
        p = _rms_norm.places_of(part * SPAN, BLOCK_P, LAST)
        total = zeros
        for c0 in range(0, WIDTH, BLOCK_C):
            c = _rms_norm.channels_of(c0, BLOCK_C, LAST)
            place, mask = _rms_norm.offsets_of(c, p, channels, inner, LAST), (c < channels) & (p < inner)
            h = _math.load_image(h_ptr + place, mask)
            total += h * h
        squares = _rms_norm.over_channels(total, LAST)
        factor, above = _rms_norm.factors_of(squares, p < inner, root_bits, eps_bits)
        total = zeros
        for c0 in range(0, WIDTH, BLOCK_C):
            c = _rms_norm.channels_of(c0, BLOCK_C, LAST)
            place, mask = _rms_norm.offsets_of(c, p, channels, inner, LAST), (c < channels) & (p < inner)
            weight, beta = _rms_norm.affine(weight_ptr, beta_ptr, row, c, channels, W_ROWS, B_ROWS)
            h = _math.load_image(h_ptr + place, mask)
            xhat, g_u = _gradients(g_ptr, h, place, mask, factor, weight, beta, SILU)
            _store_sums(d_weight_ptr, d_beta_ptr, sums_row, c, channels, g_u * xhat, g_u, LAST)
            total += g_u * weight * xhat
        if g_h_ptr is not None:
            mean = _rms_norm.over_channels(total, LAST) * share * above
            for c0 in range(0, WIDTH, BLOCK_C):
                c = _rms_norm.channels_of(c0, BLOCK_C, LAST)
                place, mask = _rms_norm.offsets_of(c, p, channels, inner, LAST), (c < channels) & (p < inner)
                weight, beta = _rms_norm.affine(weight_ptr, beta_ptr, row, c, channels, W_ROWS, B_ROWS)
                h = _math.load_image(h_ptr + place, mask)
                xhat, g_u = _gradients(g_ptr, h, place, mask, factor, weight, beta, SILU)
                _math.store_image(g_h_ptr + place, factor * (g_u * weight - xhat * mean), mask)


def rms_norm_silu_backward(
    g: Tensor,
    h: Tensor,
    weight: Tensor | None,
    beta: Tensor | None,
    eps: float,
    act: str,
    need_h: bool,
    need_weight: bool,
    need_beta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """g_h and, float32 [N, C], the sums over the places of g_u xhat and g_u; empty where not needed."""
    layout = Layout.of(h)
    n, channels = layout.n, layout.channels
    g_h = torch.empty_like(h) if need_h else g.new_empty(0)
    if h.numel() == 0:
        d_weight, d_beta = (
            h.new_zeros((n, channels), dtype=torch.float32) if needed else g.new_empty(0)
            for needed in (need_weight, need_beta)
        )
        return g_h, d_weight, d_beta
    sums = need_weight or need_beta
    blocks = _rms_norm.Blocks(layout, OF_THREAD, eps, sums=sums)
    parameters, rows = _rms_norm.parameters(weight, beta)
    staged = Staged(g_h, layout) if need_h else None
    parts = [
        h.new_empty((blocks.parts, n, channels), dtype=torch.float32) if needed else None
        for needed in (need_weight, need_beta)
    ]
    launch(
        _rms_norm_silu_backward_kernel,
        blocks.grid,
        h,
        layout.dense(g),
        layout.dense(h),
        *parameters,
        None if staged is None else staged.data,
        *parts,
        n,
        *blocks.args,
        **blocks.constants,
        **rows,
        SILU=act == "silu",
    )
    if staged is not None:
        staged.commit()
    d_weight, d_beta = (g.new_empty(0) if part is None else _merged(part) for part in parts)
    return g_h, d_weight, d_beta


def _merged(parts: Tensor) -> Tensor:
    """[parts, N, C] -> [N, C]: the sums over the parts, in float64"""
    return parts[0] if len(parts) == 1 else parts.sum(0, dtype=torch.float64).to(torch.float32)
