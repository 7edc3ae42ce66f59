"""The gradients of batch_norm_silu."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _batch_norm, _math, _rms_norm
from .launch import launch


@triton.jit
def _gradients(g_ptr, h_ptr, place, mask, mean, scale, beta, SILU: tl.constexpr):
    """g, g_u = g act'(u) and d = h - mean, which is 0 in no place that is not there."""
    g = _math.load_image(g_ptr + place, mask)
    d = _math.load_image(h_ptr + place, mask) - mean
    return g, (g * _math.silu_grad(d * scale + beta) if SILU else g), d


@triton.jit(do_not_specialize=["n", "eps_bits"])
def _batch_norm_silu_backward_sums_kernel(
    g_ptr,
    h_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
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
    SILU: tl.constexpr,
):
    """sums_ptr [3, n, parts, channels]: the sums of g_u, g_u d and g over the places of each part."""
    channels, inner = channel_units * CHANNEL_UNIT, inner_units * INNER_UNIT
    sample, row, first, c = _batch_norm.place_of_program(parts, channel_blocks, channels, SPAN, BLOCK_C, LAST)
    g_ptr += sample * channels * inner
    h_ptr += sample * channels * inner
    mean, scale, beta = _batch_norm.affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps_bits, c, channels)
    of_gu = tl.zeros([BLOCK_P, BLOCK_C] if LAST else [BLOCK_C, BLOCK_P], tl.float32)
    of_gd, of_g = of_gu, of_gu
    for offset in range(0, SPAN, BLOCK_P):
        p = _rms_norm.places_of(first + offset, BLOCK_P, LAST)
        place, mask = _rms_norm.offsets_of(c, p, channels, inner, LAST), (c < channels) & (p < inner)
        g, g_u, d = _gradients(g_ptr, h_ptr, place, mask, mean, scale, beta, SILU)
        # A mean that is not finite would make NaN of places that are not there, in other channels too.
        of_gu, of_gd, of_g = of_gu + g_u, of_gd + tl.where(mask, g_u * d, 0.0), of_g + g
    to = sums_ptr + row * channels + c
    every = n.to(tl.int64) * parts * channels
    tl.store(to, _rms_norm.over_places(of_gu, LAST), mask=c < channels)
    tl.store(to + every, _rms_norm.over_places(of_gd, LAST), mask=c < channels)
    tl.store(to + 2 * every, _rms_norm.over_places(of_g, LAST), mask=c < channels)


@triton.jit(do_not_specialize=["eps_bits"])
def _batch_norm_silu_backward_kernel(
    g_ptr,
    h_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    var_ptr,
    pull_ptr,
    g_h_ptr,
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
    """g_h = g_u scale - (base + d slope); pull_ptr [2, channels]: base and slope, or None for 0."""
    channels, inner = channel_units * CHANNEL_UNIT, inner_units * INNER_UNIT
    sample, _row, first, c = _batch_norm.place_of_program(parts, channel_blocks, channels, SPAN, BLOCK_C, LAST)
    g_ptr += sample * channels * inner
    h_ptr += sample * channels * inner
    g_h_ptr += sample * channels * inner
    mean, scale, beta = _batch_norm.affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps_bits, c, channels)
    if pull_ptr is not None:
        base = tl.load(pull_ptr + c, mask=c < channels, other=0.0)
        slope = tl.load(pull_ptr + channels + c, mask=c < channels, other=0.0)
    for offset in range(0, SPAN, BLOCK_P):
        p = _rms_norm.places_of(first + offset, BLOCK_P, LAST)
        place, mask = _rms_norm.offsets_of(c, p, channels, inner, LAST), (c < channels) & (p < inner)
        _g, g_u, d = _gradients(g_ptr, h_ptr, place, mask, mean, scale, beta, SILU)
        g_h = g_u * scale
        if pull_ptr is not None:
            g_h = g_h - (base + d * slope)
        _math.store_image(g_h_ptr + place, g_h, mask)


def batch_norm_silu_backward(
    g: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    of_batch: bool,
    eps: float,
    act: str,
    need_h: bool,
    need_temb: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g_h, float32 [N, C] the sums of g, and float32 [C] those of g_u xhat and of g_u; the first two where needed."""
    layout = Layout.of(h)
    g_h = torch.empty_like(h) if need_h else g.new_empty(0)
    if h.numel() == 0:
        g_temb = h.new_zeros(h.shape[:2] if need_temb else (0,), dtype=torch.float32)
        zeros = h.new_zeros(h.shape[1:2], dtype=torch.float32)
        return g_h, g_temb, zeros, zeros.clone()
    blocks = _batch_norm.Blocks(layout, eps)
    sums = h.new_empty(blocks.sums_shape, dtype=torch.float32)
    given = (layout.dense(g), layout.dense(h), *_batch_norm.flat(weight, bias, mean, var))
    constants = {**blocks.constants, "SILU": act == "silu"}
    launch(_batch_norm_silu_backward_sums_kernel, blocks.grid, h, *given, sums, layout.n, *blocks.args, **constants)
    of_g, of_gd = sums[:2].sum((1, 2), dtype=torch.float64)
    rstd = 1 / (var.double() + eps).sqrt()
    of_gx = rstd * of_gd
    if need_h:
        pull = None
        if of_batch:
            scale = rstd if weight is None else rstd * weight.double()
            pull = (torch.stack((scale * of_g, scale * rstd * of_gx)) / (layout.n * layout.inner)).float()
        staged = Staged(g_h, layout)
        launch(_batch_norm_silu_backward_kernel, blocks.grid, h, *given, pull, staged.data, *blocks.args, **constants)
        staged.commit()
    g_temb = sums[2].sum(1, dtype=torch.float64).float() if need_temb else g.new_empty(0)
    return g_h, g_temb, of_gx.float(), of_g.float()
