"""normal: z = normal(seed, sample, stream, element), and random_bits, the uint32 under it (DESIGN section 4)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout, Staged
from ddpm_fast.noise import STREAM_OFFSET_NOISE

from . import _math, _noise, _tile
from .launch import Tiles, int32, launch


@triton.jit(do_not_specialize=["stream"])
def _normal_kernel(
    out_ptr,
    rng_ptr,
    stream,
    n,
    channels,
    inner_units,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BITS: tl.constexpr,
):
    inner = inner_units * UNIT
    row, present = _tile.rows_of_program(n, BLOCK_N)
    quad = _tile.quads_of_program(channels, inner, BLOCK_Q, PIXELS)
    element, channel, pixel, inside = _tile.elements_of_program(channels, inner, BLOCK_Q, PIXELS)
    pointers = out_ptr + row * (channels * inner) + _tile.place(element, channel, pixel, channels, CHANNELS_LAST)
    if BITS:
        r0, r1, r2, r3 = _noise.bits_of_quads(rng_ptr, stream, row, quad)
        tl.store(pointers, _noise.interleaved(r0, r1, r2, r3).to(tl.int64), mask=present & inside)
    else:
        z = _noise.normal_of_quads(rng_ptr, stream, row, quad)
        _math.store_image(pointers, z, present & inside)


def _fill(out: Tensor, rng: Tensor, stream: int, bits: bool) -> None:
    layout = Layout.of(out)
    if layout.n == 0 or layout.elements == 0:
        return
    tiles = Tiles(layout)
    staged = Staged(out, layout)
    launch(_normal_kernel, tiles.grid, out, staged.data, rng, int32(stream), *tiles.args, **tiles.constants, BITS=bits)
    staged.commit()


def normal(out: Tensor, rng: Tensor, stream: int) -> None:
    """Fill ``out`` (N, ...) of any float dtype with the normals of samples rng[1] ... rng[1] + N - 1."""
    _fill(out, rng, stream, bits=False)


def random_bits(out: Tensor, rng: Tensor, stream: int) -> None:
    """Fill ``out`` (N, ...), int64, with the uint32 from which ``normal`` makes its values."""
    _fill(out, rng, stream, bits=True)


def offset_values(layout: Layout, rng: Tensor | None, strength: float) -> Tensor | None:
    """The normals of the offset noise, float32 [n, channels], or None without it.

    One value serves a whole channel, so they are drawn once here, not once per element in the kernel.
    """
    if strength == 0.0:
        return None
    assert rng is not None
    values = torch.empty(layout.n, layout.channels, device=rng.device)
    normal(values, rng, STREAM_OFFSET_NOISE)
    return values
