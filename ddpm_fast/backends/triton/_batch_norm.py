"""What the kernels of batch_norm_silu share: coefficients, how programs divide the batch, how their sums are merged.

A program has some channels of one part of a sample, in tiles of C channels x P places as in ``_rms_norm``. One launch
sums over the places of the parts, torch adds the few sums up in float64, one launch has all that an element needs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddpm_fast.backends.layout import Layout

from . import _math, _rms_norm
from .launch import INTERPRETED, check_size, float_bits, power_of_two

ELEMENTS = 1024
"""Elements of a tile on a GPU: 4 warps x 8, one 128-bit access of a half-width type a thread or two of float32."""

INTERPRETED_ELEMENTS = 1 << 17
"""In the interpreter, where a program costs the same whatever its size. Tests lower it."""

SIDE_BY_SIDE = 64
"""Channels of a tile in channels_last, at most; at least a sector of memory where there are so many."""

PART_ELEMENTS, MAX_PARTS = 8192, 8192
"""A program has about so many elements; more where the batch would have more than so many parts. It depends on the
shape alone, and so do the sums."""


@triton.jit
def place_of_program(parts, channel_blocks, channels, SPAN: tl.constexpr, BLOCK_C: tl.constexpr, LAST: tl.constexpr):
    """The sample, the part, the part's first place and the channels of a program."""
    row = tl.program_id(0) // channel_blocks
    sample = row // parts
    part = row - sample * parts
    c = _rms_norm.channels_of((tl.program_id(0) - row * channel_blocks) * BLOCK_C, BLOCK_C, LAST)
    return sample.to(tl.int64), row.to(tl.int64), part * SPAN, c


@triton.jit
def affine(mean_ptr, var_ptr, weight_ptr, bias_ptr, eps_bits, c, channels):
    """(mean, scale, beta) of u = (h - mean) scale + beta"""
    inside = c < channels
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
    variance = tl.load(var_ptr + c, mask=inside, other=1.0) + _math.float_of_bits(eps_bits)
    scale = tl.div_rn(tl.full(c.shape, 1.0, tl.float32), tl.sqrt_rn(variance))
    if weight_ptr is not None:
        scale = scale * _math.load_image(weight_ptr + c, inside)
    beta = tl.full(c.shape, -0.0, tl.float32)
    if bias_ptr is not None:
        beta = _math.load_image(bias_ptr + c, inside)
    return mean, scale, beta


class Blocks:
    """How the batch divides among programs: ``args``, ``constants`` and ``grid`` of all kernels, and the shape of what
    is kept of the parts. eps: added to the variance."""

    def __init__(self, layout: Layout, eps: float) -> None:
        check_size(layout)
        self.n, channels, inner = layout.n, layout.channels, layout.inner
        # Vectors (N, C) have one place: taken as channels_last, their channels are read in one run.
        last = layout.channels_last or inner == 1
        budget = INTERPRETED_ELEMENTS if INTERPRETED else ELEMENTS
        if last:
            block_c = min(budget, power_of_two(channels), budget if INTERPRETED else SIDE_BY_SIDE)
            block_p = min(budget // block_c, power_of_two(inner))
            block_c = min(budget // block_p, power_of_two(channels))
        else:
            block_p = min(budget, power_of_two(inner))
            block_c = min(budget // block_p, power_of_two(channels))
        tiles, together = -(-inner // block_p), max(1, PART_ELEMENTS // (block_c * block_p))
        together = min(tiles, max(together, -(-tiles // max(1, MAX_PARTS // layout.n))))
        self.inner, self.span = inner, block_p * together
        self.parts = -(-inner // self.span)
        blocks = -(-channels // block_c)
        self.grid = (layout.n * self.parts * blocks,)
        channel_unit, inner_unit = math.gcd(channels, 16), math.gcd(inner, 16)
        self.args = (self.parts, blocks, channels // channel_unit, inner // inner_unit, float_bits(eps))
        self.sums_shape = (3, layout.n, self.parts, channels)
        self.constants: dict[str, Any] = {
            "SPAN": self.span,
            "CHANNEL_UNIT": channel_unit,
            "INNER_UNIT": inner_unit,
            "BLOCK_C": block_c,
            "BLOCK_P": block_p,
            "LAST": last,
        }

    def moments(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [C]: mean and variance of the batch from those of its parts (Chan, Golub & LeVeque 1979)."""
        near, off, squares = sums.double()
        share = torch.full((self.parts, 1), self.span / self.inner, dtype=torch.float64, device=sums.device)
        share[-1] = (self.inner - (self.parts - 1) * self.span) / self.inner
        of_part = near + off
        mean = (of_part * share).sum((0, 1)) / self.n
        apart = of_part - mean
        var = (squares / self.inner + apart * apart * share).sum((0, 1)) / self.n
        return mean.float(), var.float()


def flat(*values: Tensor | None) -> list[Tensor | None]:
    """Coefficients as the kernels take them."""
    return [None if value is None else value.contiguous() for value in values]
