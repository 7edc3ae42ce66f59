"""What both kernels of rms_norm_silu share: tiles, coefficients, and how programs divide the places.

A program has all channels of some places of one sample. Where they fit into its registers they are read once; else in
runs of channels, once for the norms and again, by then from a cache, for what is made of them.
"""

from __future__ import annotations

import math
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout

from . import _math
from .launch import check_size, float_bits, power_of_two

INTERPRETED = _math.INTERPRETED

ELEMENTS, MAX_WARPS = 2048, 16
"""Elements of a tile on a GPU where they suffice for the channels, and warps of a program where they do not."""

INTERPRETED_ELEMENTS = 1 << 17
"""In the interpreter, where a program costs the same whatever its size. Tests lower it."""

LEAST_PLACES = 8
"""Contiguous: places side by side in a tile, at least, for fewer are less than a sector of memory."""

RUN_PLACES, RUN_OF_THREAD = 32, 8
"""Where channels come in runs: contiguous places of a tile, and elements of a thread; with more, registers spill."""

PARTS, MAX_TILES = 64, 8
"""Backward: a program has several tiles, up to so many, where each sample still makes so many programs, for a program's
sums are written and read again. It does not depend on the batch, and so neither do the sums."""


@triton.jit
def channels_of(c0, C: tl.constexpr, LAST: tl.constexpr):
    """The channels of a tile. A tile is C channels x P places: [C, P], or [P, C] in channels_last (``LAST``), so that
    its last axis is the fastest in memory."""
    c = c0 + tl.arange(0, C)
    return c[None, :] if LAST else c[:, None]


@triton.jit
def places_of(p0, P: tl.constexpr, LAST: tl.constexpr):
    """The places of a tile."""
    p = p0 + tl.arange(0, P)
    return p[:, None] if LAST else p[None, :]


@triton.jit
def offsets_of(c, p, channels, inner, LAST: tl.constexpr):
    """Where the elements of a tile lie in their sample."""
    return p * channels + c if LAST else c * inner + p


@triton.jit
def over_channels(x, LAST: tl.constexpr):
    """The sums over the channels of a tile, which keeps its axes."""
    return tl.sum(x, axis=1)[:, None] if LAST else tl.sum(x, axis=0)[None, :]


@triton.jit
def over_places(x, LAST: tl.constexpr):
    """The sums over the places of a tile, which keeps its axes."""
    if LAST and INTERPRETED and x.shape[0] >= 32:
        # NumPy adds rows one after the other, where the threads of a GPU add them as a tree.
        x = tl.sum(tl.reshape(x, [x.shape[0] // 16, 16, x.shape[1]]), axis=1)
    return tl.sum(x, axis=0)[None, :] if LAST else tl.sum(x, axis=1)[:, None]


@triton.jit
def factors_of(squares, present, root_bits, eps_bits):
    """(sqrt(C) / max(|h|, eps), whether |h| >= eps) of places from their sums of squares."""
    norm, eps = tl.sqrt_rn(squares), _math.float_of_bits(eps_bits)
    small = norm < eps
    # A place that is not there has squares 0, which with eps 0 would divide 0 by 0.
    divisor = tl.where(present, tl.where(small, eps, norm), 1.0)
    root = tl.full(norm.shape, 1.0, tl.float32) * _math.float_of_bits(root_bits)
    return tl.div_rn(root, divisor), tl.where(small, 0.0, 1.0)


@triton.jit
def affine(weight_ptr, beta_ptr, row, c, channels, W_ROWS: tl.constexpr, B_ROWS: tl.constexpr):
    """weight and beta of channels; row: where those of the sample begin."""
    weight = tl.full(c.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        weight = _math.load_image(weight_ptr + (row + c if W_ROWS else c), c < channels)
    beta = tl.full(c.shape, -0.0, tl.float32)
    if beta_ptr is not None:
        beta = _math.load_image(beta_ptr + (row + c if B_ROWS else c), c < channels)
    return weight, beta


class Blocks:
    """How the places of samples divide among programs: ``args``, ``constants`` and ``grid`` of both kernels.

    of_thread: elements that a thread's registers have room for; sums: programs write sums.
    """

    def __init__(self, layout: Layout, of_thread: int, eps: float, *, sums: bool = False) -> None:
        check_size(layout)
        channels, inner = layout.channels, layout.inner
        # Vectors (N, C) have one place: taken as channels_last, their channels are read in one run.
        last = layout.channels_last or inner == 1
        usual, largest = ELEMENTS, 32 * MAX_WARPS * of_thread
        if INTERPRETED.value:
            usual = largest = INTERPRETED_ELEMENTS
        width, places = power_of_two(channels), power_of_two(inner)
        least = 1 if last else min(LEAST_PLACES, places)
        if width * least <= largest:
            block_c, block_p = width, min(max(usual // width, least), places)
        else:
            block_p = min(1 if last else RUN_PLACES, places, usual)
            block_c = usual // block_p
            of_thread = RUN_OF_THREAD
        tiles = -(-inner // block_p)
        # The sums of channels that come in runs are not kept from tile to tile.
        together = max(1, min(MAX_TILES, tiles // PARTS)) if sums and block_c == width else 1
        self.parts = -(-tiles // together)
        self.grid = (layout.n * self.parts,)
        channel_unit, inner_unit = math.gcd(channels, 16), math.gcd(inner, 16)
        self.args = (
            *(self.parts, channels // channel_unit, inner // inner_unit),
            *(float_bits(math.sqrt(channels)), float_bits(eps)),
        )
        self.constants = {
            "SPAN": block_p * together,
            "WIDTH": -(-channels // block_c) * block_c,
            "CHANNEL_UNIT": channel_unit,
            "INNER_UNIT": inner_unit,
            "BLOCK_C": block_c,
            "BLOCK_P": block_p,
            "LAST": last,
            "num_warps": max(1, min(MAX_WARPS, block_c * block_p // (32 * of_thread))),
        }


def parameters(weight: Tensor | None, beta: Tensor | None) -> tuple[list[Tensor | None], dict[str, Any]]:
    """weight and beta as the kernels take them, and whether they have a row for each sample."""
    flat = [None if value is None else value.contiguous() for value in (weight, beta)]
    w_rows, b_rows = (value is not None and value.dim() == 2 for value in (weight, beta))
    return flat, {"W_ROWS": w_rows, "B_ROWS": b_rows}
