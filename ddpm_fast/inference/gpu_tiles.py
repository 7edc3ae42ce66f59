"""Which few configurations of the Triton kernels are worth a trial for one layer.

A model of a program's time ranks those of a convolution: products at the rate of the tensor cores, operands at the
rate of the L2 cache, the fixed cost of a pass and of a program, and how evenly the programs fill the processors. It
only prunes; the trial on the device decides. Its constants are those of data sheets and compiled code, none of them
measured here.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ..backends.triton.conv_call import Tile
from ..backends.triton.launch import power_of_two
from ..backends.triton.norm import MAX_SPAN
from ..backends.triton.rms_norm import MAX_CHANNELS

ROWS, COLUMNS, SPLITS = (128, 64, 32, 16), (128, 64, 32), (1, 2, 4, 8, 16)

L2_BYTES, ISSUE, PROGRAM = 48, 160, 1500
"""Per processor: bytes from L2 in a cycle; cycles to issue a pass's instructions; cycles to start and end a program."""

REDUCE = 4000
"""Cycles of the second kernel that a split sum needs, mostly its launch."""

JOINED, JOINED_PARTS = 4096, 32768
"""Elements of a tile whose parts one program may add, and of all its parts: more take as long as a second kernel's
launch, and 16 parts of 64 x 64 were seen to spill."""


def term_block(channels: int, half_width: bool) -> int:
    """Terms of the sum per pass: the longest run up to 128 bytes that divides the channels."""
    return math.gcd(channels, 64 if half_width else 32)


def tiles(
    rows: int,
    columns: int,
    quarters: int,
    channels: int,
    taps: int,
    dtype: torch.dtype,
    processors: int,
    capability: int,
    count: int,
    largest: int = 128 * 128,
) -> list[Tile]:
    """At most ``count`` tiles for a product of rows x (quarters x columns) over taps x channels terms, most promising
    first; a program's columns lie within one quarter.

    processors: of the device; capability: 80, 90, ...; largest: elements of a tile. Never two of one shape that differ
    only in how the sum is split, unless nothing else is left: the shapes are what the model knows least about.
    """
    half = dtype != torch.float32
    ranked: list[tuple[float, Tile]] = []
    for m in ROWS:
        if m > 16 and m >= 2 * rows:
            continue
        for n in COLUMNS:
            if n > 32 and n >= 2 * columns:
                continue
            if m * n > (largest if half else min(largest, 4096)):
                continue  # in float32 larger ones would spill: three products of two halves each
            k = term_block(channels, half)
            if half and capability < 90 and m * n >= 8192:
                k = min(k, 32)  # likewise or nearly, with operands in registers
            passes = taps * channels // k
            for splits in SPLITS:
                if splits > 1 and passes < 2 * splits:
                    break
                tile = Tile(m, n, k, stages=3 if m * n >= 8192 else 4, splits=splits)
                ranked.append((cycles(tile, rows, columns, quarters, passes, half, processors, capability), tile))
    ranked.sort(key=lambda entry: entry[0])
    chosen: list[Tile] = []
    for spare in (False, True):
        for _, tile in ranked:
            seen = any((tile.m, tile.n) == (other.m, other.n) for other in chosen)
            if len(chosen) < count and tile not in chosen and (spare or not seen):
                chosen.append(tile)
    return chosen


def with_joined(found: list[Tile]) -> list[Tile]:
    """The same tiles, and before the most promising one of a split sum the same with its parts joined.

    Not of large tiles: the one program that adds the parts would take as long as a launch, or spill."""
    for i, tile in enumerate(found):
        elements = tile.m * tile.n
        if tile.splits > 1 and elements <= JOINED and elements * tile.splits <= JOINED_PARTS:
            return [*found[:i], dataclasses.replace(tile, joined=True), *found[i:]]
    return found


def cycles(
    tile: Tile, rows: int, columns: int, quarters: int, passes: int, half: bool, processors: int, capability: int
) -> float:
    """The modelled time of a launch in processor cycles."""
    size = 2 if half else 4
    rate = 2048 if capability >= 90 and tile.m >= 64 else 1024  # multiplications of 16-bit numbers a cycle
    products = tile.m * tile.n * tile.k / (rate if half else rate / 6)  # three products at half the rate
    operands = (tile.m + tile.n) * tile.k * size / L2_BYTES
    per_pass = max(products, operands, ISSUE)
    finish = PROGRAM + tile.m * tile.n * (4 if tile.splits > 1 else size) / L2_BYTES
    program = -(-passes // tile.splits) * per_pass + finish
    programs = -(-rows // tile.m) * -(-columns // tile.n) * quarters * tile.splits
    # Two programs on a processor hide each other's start and end, a single one hides nothing.
    hidden = finish / 2 if programs > processors else 0
    total = -(-programs // processors) * (program - hidden)
    return total + (
        REDUCE + 2 * tile.splits * rows * columns * quarters * 4 / L2_BYTES / processors if tile.splits > 1 else 0
    )


def spans(channels: int, groups: int) -> list[tuple[int, int]]:
    """(channels, warps) of a program of a GroupNorm, most promising first: at least 32 channels, two sectors of memory
    in half precision, and where there are more, as many as one may have. Nothing where a group has more than that."""
    width = channels // groups
    fitting = range(width, min(channels, MAX_SPAN) + 1, width)
    aligned = [span for span in fitting if span % 8 == 0] or list(fitting)
    if not aligned:
        return []
    least = next((span for span in aligned if span >= 32), aligned[-1])
    found = [(least, 16), (aligned[-1], 16), (least, 8)]
    return list(dict.fromkeys(found))


def pixel_blocks(channels: int, pixels: int) -> list[tuple[int, int]]:
    """(pixels, warps) of a program of an RMSNorm, most promising first: 16 elements a thread in programs of 4 warps and
    of 8, and 8 in those of 4; of images of so many pixels. Nothing where a pixel has more channels than a program can
    have."""
    if channels > MAX_CHANNELS:
        return []
    width, most, found = power_of_two(channels), power_of_two(pixels), []
    for warps, elements in ((4, 16), (8, 16), (4, 8)):
        block = 32 * warps * elements // width
        if block > most:  # fewer warps do for fewer pixels
            block, warps = most, max(1, warps * most // block)
        if block > 0:
            found.append((block, warps))
    return list(dict.fromkeys(found))
