"""q_sample: x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps (DDPM eq. 4) with its training target, and the gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _math, _noise, _tile
from .launch import Tiles, float_bits, int32, launch
from .normal import offset_values


@triton.jit(do_not_specialize=["stream", "strength_bits"])
def _q_sample_kernel(
    x0_ptr,
    t_ptr,
    table_ptr,
    steps,
    noise_ptr,
    rng_ptr,
    stream,
    offset_ptr,
    strength_bits,
    x_t_ptr,
    target_ptr,
    n,
    channels,
    inner_units,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TARGET: tl.constexpr,
):
    inner = inner_units * UNIT
    size = channels * inner
    row, present = _tile.rows_of_program(n, BLOCK_N)
    quad = _tile.quads_of_program(channels, inner, BLOCK_Q, PIXELS)
    element, channel, pixel, inside = _tile.elements_of_program(channels, inner, BLOCK_Q, PIXELS)
    place = _tile.place(element, channel, pixel, channels, CHANNELS_LAST)
    mask = present & inside
    x0 = _math.load_image(x0_ptr + row * size + place, mask)
    signal, noise = _math.noising_row(table_ptr, t_ptr, row, steps, present)
    eps = _noise.eps_of_tile(
        noise_ptr, rng_ptr, stream, offset_ptr, strength_bits, quad, row, place, size, channel, channels, mask
    )
    _math.store_image(x_t_ptr + row * size + place, signal * x0 + noise * eps, mask)
    if TARGET != "none":
        _math.store_image(target_ptr + row * size + place, _math.target_value(TARGET, signal, noise, x0, eps), mask)


@triton.jit
def _q_sample_backward_kernel(
    g_x_t_ptr,
    g_target_ptr,
    t_ptr,
    table_ptr,
    steps,
    g_x0_ptr,
    g_noise_ptr,
    n,
    channels,
    inner_units,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TARGET: tl.constexpr,
):
    inner = inner_units * UNIT
    row, present = _tile.rows_of_program(n, BLOCK_N)
    element, _, _, inside = _tile.elements_of_program(channels, inner, BLOCK_Q, PIXELS)
    place = row * (channels * inner) + element
    mask = present & inside
    signal, noise = _math.noising_row(table_ptr, t_ptr, row, steps, present)
    g_x_t = tl.zeros([BLOCK_N, 4 * BLOCK_Q], tl.float32)
    if g_x_t_ptr is not None:
        g_x_t = _math.load_image(g_x_t_ptr + place, mask)
    g_target = tl.zeros([BLOCK_N, 4 * BLOCK_Q], tl.float32)
    if g_target_ptr is not None:
        g_target = _math.load_image(g_target_ptr + place, mask)
    if g_x0_ptr is not None:
        g_x0 = signal * g_x_t
        if TARGET == "x0":
            g_x0 = g_x0 + g_target
        elif TARGET == "v":
            g_x0 = g_x0 - noise * g_target
        _math.store_image(g_x0_ptr + place, g_x0, mask)
    if g_noise_ptr is not None:
        g_noise = noise * g_x_t
        if TARGET == "eps":
            g_noise = g_noise + g_target
        elif TARGET == "v":
            g_noise = g_noise + signal * g_target
        _math.store_image(g_noise_ptr + place, g_noise, mask)


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x_t and the target (empty for "none"), both of ``dtype`` and in the memory format of ``x0``."""
    layout = Layout.of(x0)
    x_t = torch.empty_like(x0, dtype=dtype)
    target_out = torch.empty_like(x_t) if target != "none" else x_t.new_empty(0)
    if layout.n == 0 or layout.elements == 0:
        return x_t, target_out
    offset = offset_values(layout, rng, offset_noise)
    tiles = Tiles(layout, need_channel=offset is not None)
    x_t_staged = Staged(x_t, layout)
    target_staged = Staged(target_out, layout) if target != "none" else None
    launch(
        _q_sample_kernel,
        tiles.grid,
        x0,
        layout.dense(x0),
        t,
        table,
        table.shape[0],
        None if noise is None else layout.dense(noise),
        None if noise is not None else rng,
        int32(stream),
        offset,
        float_bits(offset_noise),
        x_t_staged.data,
        None if target_staged is None else target_staged.data,
        *tiles.args,
        **tiles.constants,
        TARGET=target,
    )
    if target_staged is not None:
        target_staged.commit()
    return x_t_staged.commit(), target_out


def q_sample_backward(
    g_x_t: Tensor | None,
    g_target: Tensor | None,
    t: Tensor,
    table: Tensor,
    target: str,
    dtype: torch.dtype,
    need_x0: bool,
    need_noise: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x_t and of the target (either may be None: zero) pulled back to x0 and, in float32, to the noise."""
    g = g_x_t if g_x_t is not None else g_target
    assert g is not None
    layout = Layout.of(g)
    g_x0 = torch.empty_like(g, dtype=dtype) if need_x0 else g.new_empty(0)
    g_noise = torch.empty_like(g, dtype=torch.float32) if need_noise else g.new_empty(0)
    if layout.n == 0 or layout.elements == 0:
        return g_x0, g_noise
    # Without noise the order of the elements does not matter: the samples are runs of memory in either format.
    tiles = Tiles(Layout(layout.n, 1, layout.elements, False))
    x0_staged = Staged(g_x0, layout) if need_x0 else None
    noise_staged = Staged(g_noise, layout) if need_noise else None
    launch(
        _q_sample_backward_kernel,
        tiles.grid,
        g,
        None if g_x_t is None else layout.dense(g_x_t),
        None if g_target is None else layout.dense(g_target),
        t,
        table,
        table.shape[0],
        None if x0_staged is None else x0_staged.data,
        None if noise_staged is None else noise_staged.data,
        *tiles.args,
        **tiles.constants,
        TARGET=target,
    )
    if x0_staged is not None:
        x0_staged.commit()
    if noise_staged is not None:
        noise_staged.commit()
    return g_x0, g_noise
