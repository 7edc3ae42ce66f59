"""ddpm_step: one reverse step in place, x0 = clip(a x - b m), x <- c1 x0 + c2 x + c3 m [+ c4 x0_prev] [+ s z].

The row of the table, its timestep and the seed are read from device memory, so one captured launch serves every step.
"""

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _math, _noise, _tile
from .launch import Tiles, launch


@triton.jit
def table_row(table_ptr, row_ptr, steps):
    """The coefficients of the current row, NaN where it is outside the table; the row, and whether it is inside."""
    row = tl.load(row_ptr)
    known = (row >= 0) & (row < steps)
    pointer = table_ptr + row * 8
    a = tl.load(pointer, mask=known, other=float("nan"))
    b = tl.load(pointer + 1, mask=known, other=float("nan"))
    c1 = tl.load(pointer + 2, mask=known, other=float("nan"))
    c2 = tl.load(pointer + 3, mask=known, other=float("nan"))
    c3 = tl.load(pointer + 4, mask=known, other=float("nan"))
    c4 = tl.load(pointer + 5, mask=known, other=float("nan"))
    s = tl.load(pointer + 6, mask=known, other=float("nan"))
    bound = tl.load(pointer + 7, mask=known, other=float("nan"))
    return a, b, c1, c2, c3, c4, s, bound, row, known


@triton.jit
def _ddpm_step_kernel(
    x_ptr,
    m_ptr,
    table_ptr,
    t_of_row_ptr,
    row_ptr,
    steps,
    rng_ptr,
    noise_ptr,
    m_uncond_ptr,
    guidance_ptr,
    x0_prev_ptr,
    logvar_ptr,
    logvar_range_ptr,
    threshold_ptr,
    x0_out_ptr,
    copy_ptr,
    bad_row_ptr,
    n,
    channels,
    inner_units,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    COPY_CHANNELS_LAST: tl.constexpr,
):
    inner = inner_units * UNIT
    sample, present = _tile.rows_of_program(n, BLOCK_N)
    element, channel, pixel, inside = _tile.elements_of_program(channels, inner, BLOCK_Q, PIXELS)
    mask = present & inside
    start = sample * (channels * inner)
    place = start + _tile.place(element, channel, pixel, channels, CHANNELS_LAST)

    x = tl.load(x_ptr + place, mask=mask, other=0.0)
    # The compiler would give 8 elements of half-width m to a thread and 4 of float32 x, and exchange m through shared
    # memory. Told of runs of 4 only, it loads m 64 bits at a time, with no exchange.
    m_place = place
    if not CHANNELS_LAST:
        m_place = tl.max_contiguous(place, [1, 4])
    m = _math.load_image(m_ptr + m_place, mask)
    a, b, c1, c2, c3, c4, s, bound, row, known = table_row(table_ptr, row_ptr, steps)
    if m_uncond_ptr is not None:
        m_uncond = _math.load_image(m_uncond_ptr + m_place, mask)
        m = m_uncond + tl.load(guidance_ptr) * (m - m_uncond)

    x0 = a * x - b * m
    if threshold_ptr is not None:
        # Dynamic thresholding (Saharia et al. 2022): clip to the sample's own threshold, then divide by it.
        limit = tl.load(threshold_ptr + sample, mask=present, other=1.0)
        x0 = _math.clip(x0, _math.negated(limit), limit)
        x0 = tl.div_rn(x0, tl.broadcast_to(limit, x0.shape))
    else:
        x0 = _math.clip(x0, _math.negated(bound), bound)
    y = c1 * x0 + c2 * x + c3 * m
    if x0_prev_ptr is not None:
        y = y + c4 * tl.load(x0_prev_ptr + place, mask=mask, other=0.0)

    if noise_ptr is not None or rng_ptr is not None:
        # s = 0 (the last step, DDIM): the noise is neither drawn nor read. Then -0 takes its place, which leaves y as
        # it is, the sign of its zeros included, and saves a selection for every element.
        noisy = known & (s != 0.0)
        # The comparison changes nothing but the type that the interpreter of Triton 3.9 gives to a scalar bool.
        noisy_mask = (mask & noisy) != 0
        # From its bits, for tl.full makes +0 of -0.
        z = tl.full([BLOCK_N, 4 * BLOCK_Q], -(2**31), tl.int32).to(tl.float32, bitcast=True)
        if noise_ptr is not None:
            z = tl.load(noise_ptr + place, mask=noisy_mask, other=z)
        else:
            if noisy:
                stream = tl.load(t_of_row_ptr + row) + 1
                quad = _tile.quads_of_program(channels, inner, BLOCK_Q, PIXELS)
                z = _noise.normal_of_quads(rng_ptr, stream, sample, quad)
        sigma = tl.where(noisy, s, 0.0)
        if logvar_ptr is not None:
            logvar = _math.load_image(logvar_ptr + m_place, noisy_mask)
            if logvar_range_ptr is not None:
                # Between the row's limits by v in [-1, 1] (Nichol & Dhariwal 2021, eq. 15).
                low = tl.load(logvar_range_ptr + row * 2, mask=known, other=0.0)
                high = tl.load(logvar_range_ptr + row * 2 + 1, mask=known, other=0.0)
                f = 0.5 * (logvar + 1.0)
                logvar = f * high + (1.0 - f) * low
            sigma = _math.exp_f32(0.5 * logvar)
        y = y + sigma * z

    tl.store(x_ptr + place, y, mask=mask)
    if x0_out_ptr is not None:
        tl.store(x0_out_ptr + place, x0, mask=mask)
    if copy_ptr is not None:
        copy_place = start + _tile.place(element, channel, pixel, channels, COPY_CHANNELS_LAST)
        _math.store_image(copy_ptr + copy_place, y, mask)
    if bad_row_ptr is not None:
        # Every program of this launch would write the same row, so it does not matter which one does.
        first = tl.load(bad_row_ptr) < 0
        bits = tl.where(mask, y, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if first & (tl.max(bits) >= 0x7F800000):
            tl.store(bad_row_ptr, tl.maximum(row, 0).to(tl.int32))


def ddpm_step(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    t_of_row: Tensor,
    row: Tensor,
    rng: Tensor | None,
    noise: Tensor | None,
    m_uncond: Tensor | None,
    guidance: Tensor | None,
    x0_prev: Tensor | None,
    logvar: Tensor | None,
    logvar_range: Tensor | None,
    threshold: Tensor | None,
    x0_out: Tensor | None,
    copy_out: Tensor | None,
    bad_row: Tensor | None,
) -> None:
    """Replace ``x`` by the sample one step earlier; the arguments are those of ``ddpm_fast.ops.ddpm_step``."""
    layout = Layout.of(x)
    if layout.n == 0 or layout.elements == 0:
        return
    x_staged = Staged(x, layout, read=True)
    x0_staged = None if x0_out is None else Staged(x0_out, layout)
    copy_staged = None
    copy_channels_last = layout.channels_last
    if copy_out is not None:
        copy_layout = Layout.of(copy_out)
        copy_staged = Staged(copy_out, copy_layout)
        copy_channels_last = copy_layout.channels_last
    tiles = Tiles(layout, channels_last=copy_channels_last)
    launch(
        _ddpm_step_kernel,
        tiles.grid,
        x,
        x_staged.data,
        layout.dense(m),
        table,
        t_of_row,
        row,
        table.shape[0],
        None if noise is not None else rng,
        None if noise is None else layout.dense(noise),
        None if m_uncond is None else layout.dense(m_uncond),
        guidance,
        None if x0_prev is None else layout.dense(x0_prev),
        None if logvar is None else layout.dense(logvar),
        logvar_range,
        None if threshold is None else threshold.contiguous(),
        None if x0_staged is None else x0_staged.data,
        None if copy_staged is None else copy_staged.data,
        bad_row,
        *tiles.args,
        **tiles.constants,
        COPY_CHANNELS_LAST=copy_channels_last,
    )
    x_staged.commit()
    if x0_staged is not None:
        x0_staged.commit()
    if copy_staged is not None:
        copy_staged.commit()
