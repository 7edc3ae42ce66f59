"""noise_mse: the mean over each sample of loss(pred - target); the noise of the target is drawn again, not stored."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged

from . import _math, _noise, _tile
from .launch import Tiles, float_bits, int32, launch
from .normal import offset_values


@triton.jit(do_not_specialize=["stream", "strength_bits", "delta_bits"])
def _noise_mse_kernel(
    pred_ptr,
    x0_ptr,
    t_ptr,
    table_ptr,
    steps,
    noise_ptr,
    rng_ptr,
    stream,
    offset_ptr,
    strength_bits,
    delta_bits,
    partial_ptr,
    g_ptr,
    g_pred_ptr,
    n,
    channels,
    inner_units,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    TARGET: tl.constexpr,
    LOSS: tl.constexpr,
):
    """Forward (partial_ptr: [n, programs of a sample] sums) or backward (g_ptr [n] and g_pred_ptr)."""
    inner = inner_units * UNIT
    size = channels * inner
    row, present = _tile.rows_of_program(n, BLOCK_N)
    quad = _tile.quads_of_program(channels, inner, BLOCK_Q, PIXELS)
    element, channel, pixel, inside = _tile.elements_of_program(channels, inner, BLOCK_Q, PIXELS)
    place = _tile.place(element, channel, pixel, channels, CHANNELS_LAST)
    mask = present & inside
    pred = _math.load_image(pred_ptr + row * size + place, mask)
    if TARGET == "x0":
        target = _math.load_image(x0_ptr + row * size + place, mask)
    else:
        target = _noise.eps_of_tile(
            noise_ptr, rng_ptr, stream, offset_ptr, strength_bits, quad, row, place, size, channel, channels, mask
        )
        if TARGET == "v":
            x0 = _math.load_image(x0_ptr + row * size + place, mask)
            signal, noise = _math.noising_row(table_ptr, t_ptr, row, steps, present)
            target = _math.target_value(TARGET, signal, noise, x0, target)
    d = pred - target
    delta = _math.float_of_bits(delta_bits)
    if partial_ptr is not None:
        values = tl.where(mask, _math.loss_value(LOSS, d, delta), 0.0)
        sums = tl.sum(values, axis=1)[:, None]
        tl.store(partial_ptr + row * tl.num_programs(0) + tl.program_id(0), sums, mask=present)
    else:
        count = tl.full([1, 1], 1, tl.float32) * size
        scale = tl.div_rn(tl.load(g_ptr + row, mask=present, other=0.0), count)
        _math.store_image(g_pred_ptr + row * size + place, scale * _math.loss_grad(LOSS, d, delta), mask)


def _launch(
    tiles: Tiles,
    pred: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    loss: str,
    huber_delta: float,
    partial: Tensor | None = None,
    g: Tensor | None = None,
    g_pred: Tensor | None = None,
) -> None:
    """Forward when ``partial`` is given, else backward. What the target does not use is not passed on."""
    layout = tiles.layout
    draws = target != "x0"
    launch(
        _noise_mse_kernel,
        tiles.grid,
        pred,
        layout.dense(pred),
        None if x0 is None or target == "eps" else layout.dense(x0),
        t if target == "v" else None,
        table if target == "v" else None,
        table.shape[0] if table is not None else 0,
        layout.dense(noise) if draws and noise is not None else None,
        rng if draws and noise is None else None,
        int32(stream),
        offset_values(layout, rng, offset_noise) if draws else None,
        float_bits(offset_noise),
        float_bits(huber_delta),
        partial,
        g,
        g_pred,
        *tiles.args,
        **tiles.constants,
        TARGET=target,
        LOSS=loss,
    )


def _needs_channel(target: str, offset_noise: float) -> bool:
    return target != "x0" and offset_noise != 0.0


def noise_mse(
    pred: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    loss: str,
    huber_delta: float,
) -> Tensor:
    """Mean loss of each sample, float32 [N]. Two stages in a fixed order, so the result is the same every time."""
    layout = Layout.of(pred)
    if layout.n == 0 or layout.elements == 0:
        return pred.new_full((layout.n,), float("nan"), dtype=torch.float32)
    # One block size for every n: the order of summation, and so the loss of a sample, must not depend on its batch.
    tiles = Tiles(layout, need_channel=_needs_channel(target, offset_noise), program_quads=256)
    partial = pred.new_empty((layout.n, tiles.quad_blocks), dtype=torch.float32)
    spec = (x0, t, table, noise, rng, stream, offset_noise, target, loss, huber_delta)
    _launch(tiles, pred, *spec, partial=partial)
    return (partial.sum(1, dtype=torch.float64) / layout.elements).to(torch.float32)


def noise_mse_backward(
    g: Tensor,
    pred: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    loss: str,
    huber_delta: float,
) -> Tensor:
    """g[n] / E times the derivative of the loss, in the dtype and memory format of ``pred``."""
    layout = Layout.of(pred)
    g_pred = torch.empty_like(pred)
    if layout.n == 0 or layout.elements == 0:
        return g_pred
    staged = Staged(g_pred, layout)
    spec = (x0, t, table, noise, rng, stream, offset_noise, target, loss, huber_delta)
    tiles = Tiles(layout, need_channel=_needs_channel(target, offset_noise))
    _launch(tiles, pred, *spec, g=g.contiguous(), g_pred=staged.data)
    return staged.commit()
