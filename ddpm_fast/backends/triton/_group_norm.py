"""What both kernels of group_norm_silu share: tiles, coefficients, and how programs divide the groups.

A program has one or several whole groups and reads them again from the cache. Groups that are too large for that are
cut into parts, some places of a program each: one launch sums, torch merges the few sums, one launch applies.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout

from . import _math
from .launch import INTERPRETED, check_size, power_of_two

ELEMENTS = 1024
"""Elements of a tile on a GPU: 4 warps x 8, one 128-bit access of a half-width type a thread or two of float32."""

INTERPRETED_ELEMENTS = 1 << 17
"""In the interpreter, where a program costs the same whatever its size. Tests lower it."""

PART_ELEMENTS = 16384
"""Of a group, as many as the first cache holds for the programs of a processor."""

SEGMENT = 64
"""Bytes that a program reads at a place, at least, in channels_last: groups side by side until it has them."""


@triton.jit
def group_numbers(first_group, G: tl.constexpr, LAST: tl.constexpr):
    """The numbers of the G groups of a tile, along its axis of groups.

    A tile is G groups x C channels x P places: [G, C, P], or [P, G, C] in channels_last (``LAST``), so that its last
    axis is the fastest in memory.
    """
    g = first_group + tl.arange(0, G)
    return g[None, :, None] if LAST else g[:, None, None]


@triton.jit
def channels_of(g, c0, groups, group_channels, C: tl.constexpr, LAST: tl.constexpr):
    """The channels of a tile and whether they exist."""
    c = c0 + tl.arange(0, C)
    c = c[None, None, :] if LAST else c[None, :, None]
    return g * group_channels + c, (g < groups) & (c < group_channels)


@triton.jit
def places_of(channel, present, p0, channels, inner, P: tl.constexpr, LAST: tl.constexpr):
    """Where the elements of a tile lie in their sample, and whether they exist."""
    p = p0 + tl.arange(0, P)
    p = p[:, None, None] if LAST else p[None, None, :]
    place = p * channels + channel if LAST else channel * inner + p
    return place, present & (p < inner)


@triton.jit
def over_places(x, LAST: tl.constexpr):
    """The sums over the places of a tile, which keeps its three axes."""
    return tl.sum(x, axis=0)[None, :, :] if LAST else tl.sum(x, axis=2)[:, :, None]


@triton.jit
def over_channels(x, LAST: tl.constexpr):
    """The sums over the channels of groups."""
    return tl.sum(x, axis=2)[:, :, None] if LAST else tl.sum(x, axis=1)[:, None, :]


@triton.jit
def added_to(bias_ptr, temb_ptr, row, channel, present):
    """bias[c] + temb[n, c]; row: where temb of the sample begins."""
    added = tl.zeros(present.shape, tl.float32)
    if bias_ptr is not None:
        added = _math.load_image(bias_ptr + channel, present)
    if temb_ptr is not None:
        temb = _math.load_image(temb_ptr + row + channel, present)
        added = added + temb if bias_ptr is not None else temb
    return added


@triton.jit
def affine(weight_ptr, beta_ptr, row, channel, present, mean, rstd, added, W_ROWS: tl.constexpr, B_ROWS: tl.constexpr):
    """(offset, scale, beta) of u = (h - offset) scale + beta, and the weight"""
    weight = tl.full(present.shape, 1.0, tl.float32)
    if weight_ptr is not None:
        weight = _math.load_image(weight_ptr + (row + channel if W_ROWS else channel), present)
    beta = tl.full(present.shape, -0.0, tl.float32)
    if beta_ptr is not None:
        beta = _math.load_image(beta_ptr + (row + channel if B_ROWS else channel), present)
    return mean - added, rstd * weight, beta, weight


class Blocks:
    """How the groups of samples divide among programs: ``args`` and ``constants`` of both kernels, and their grid."""

    def __init__(self, layout: Layout, groups: int, itemsize: int) -> None:
        check_size(layout)
        inner, width = layout.inner, layout.channels // groups
        budget = INTERPRETED_ELEMENTS if INTERPRETED else ELEMENTS
        # Vectors (N, C) have one place: taken as channels_last, their channels are read in one run.
        last = layout.channels_last or inner == 1
        if last:
            block_c = min(budget, power_of_two(width), 64)
            side_by_side = -(-SEGMENT // (itemsize * block_c))
            block_g = min(budget // block_c, power_of_two(side_by_side), power_of_two(groups))
            block_p = min(budget // (block_c * block_g), power_of_two(inner))
        else:
            block_p = min(budget, power_of_two(inner))
            block_c = min(budget // block_p, power_of_two(width))
            block_g = 1
        block_g = min(max(block_g, budget // (block_c * block_p)), power_of_two(groups))
        places = max(PART_ELEMENTS // width, 1) if width * inner > PART_ELEMENTS else inner
        self.span = block_p * max(-(-places // block_p), -(-inner // (65535 * block_p)))
        self.parts = -(-inner // self.span)
        self.grid = (layout.n, -(-groups // block_g), self.parts)
        channel_unit, inner_unit = math.gcd(width, 16), math.gcd(inner, 16)
        self.args = (groups, width // channel_unit, inner // inner_unit)
        self.constants = {
            "SPAN": self.span,
            "WIDTH": -(-width // block_c) * block_c,
            "CHANNEL_UNIT": channel_unit,
            "INNER_UNIT": inner_unit,
            "BLOCK_G": block_g,
            "BLOCK_C": block_c,
            "BLOCK_P": block_p,
            "LAST": last,
        }


def parameters(*values: Tensor | None) -> tuple[list[Tensor | None], dict[str, bool]]:
    """bias, temb, weight and beta as the kernels take them, and which of the last two have a row for each sample."""
    flat = [None if value is None else value.contiguous() for value in values]
    w_rows, b_rows = (value is not None and value.dim() == 2 for value in values[2:])
    return flat, {"W_ROWS": w_rows, "B_ROWS": b_rows}
