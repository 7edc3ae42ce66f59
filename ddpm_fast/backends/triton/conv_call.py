"""Calls of the kernels in conv.py with everything that does not change bound once: weights packed, grids, strides."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .conv import MAX_WARPS, _conv_kernel, _reduce_kernel
from .launch import launch_overlapping, power_of_two

KINDS = ("conv", "linear", "first", "up", "doubled", "window", "point")
"""What a layer is bound as: those of conv.py, of which "linear" is its 1x1 "conv"."""

QUARTERED = ("up", "doubled", "window")
"""Four target pixels to a row."""

TAPS = {"conv": 9, "doubled": 4, "window": 4}
"""Of a row's sum, where there are several."""

REDUCE_ROWS, REDUCE_COLUMNS = 16, 64
"""The tile of a program that adds the parts of a split sum: small, for the sums that are split have few rows."""

LARGE = 8192
"""Elements of a tile from which embeddings looked up for every row would not fit beside it in registers."""

MAX_PIXELS = 2**31 - 2**16
"""Pixels of a target that int32 can number, the rounding up of the rows to a whole tile included."""


NO_TABLES: tuple[Any, ...] = (None, None, 0, None, None, 0)
"""`tables_of` for a layer without an embedding."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """A configuration of ``_conv_kernel``: rows x columns of a program, terms of the sum per pass, passes in flight,
    parts of the sum, warps; joined: the parts are added by the program that comes last, not by a second kernel."""

    m: int
    n: int
    k: int
    stages: int = 3
    splits: int = 1
    warps: int = 4
    joined: bool = False

    def __str__(self) -> str:
        split = f" split {self.splits}" if self.splits > 1 else ""
        return f"{self.m}x{self.n}x{self.k}{split}{' joined' if split and self.joined else ''}"


def first_terms(channels: int) -> int:
    """The length of the sum of a "first" layer as the kernel takes it: 9 x channels, rounded up to a power of two."""
    return max(16, power_of_two(9 * channels))


def pack(kind: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights as the kernel reads them, [taps x channels, quarters x columns], contiguous.

    weight: [out, in, 3, 3], for "up" [in, out, 2, 2], for "linear" [out, in]. dtype: of the products; a "first" layer
    always multiplies in float32, for its sum is short and rounding the image would be its largest error.
    """
    if kind == "up":
        packed = weight.permute(0, 2, 3, 1).flatten(1)
    elif kind == "linear":
        packed = weight.t()
    elif kind == "doubled":
        # The taps [first and one past the last] that meet source row a of a quarter, and likewise its columns.
        meet = {(0, 0): (0, 1), (0, 1): (1, 3), (1, 0): (0, 2), (1, 1): (2, 3)}
        blocks = []
        for tap in range(4):
            runs = [(meet[q // 2, tap // 2], meet[q % 2, tap % 2]) for q in range(4)]
            blocks.append(torch.cat([weight[:, :, slice(*y), slice(*x)].sum((2, 3)).t() for y, x in runs], dim=1))
        packed = torch.cat(blocks)
    elif kind == "window":
        # Pixel p of the source reaches pixel q of the target through tap p - q + 1, in each of both directions.
        blocks = [
            torch.cat([weight[:, :, p // 2 - q // 2 + 1, p % 2 - q % 2 + 1].t() for q in range(4)], dim=1)
            for p in range(4)
        ]
        packed = torch.cat(blocks)
    elif kind == "point":
        packed = weight[:, :, 1, 1].t()
    else:
        packed = weight.permute(2, 3, 1, 0).flatten(0, 2)
        if kind == "first":
            missing = first_terms(weight.shape[1]) - packed.shape[0]
            return torch.nn.functional.pad(packed.float(), (0, 0, 0, missing)).contiguous()
    return packed.to(dtype).contiguous()


def images_of(kind: str, pixels: int, rows: int, columns: int) -> int:
    """IMAGES of ``conv_epilogue.finish`` for tiles of rows x columns."""
    if kind in ("window", "point"):
        return 0
    if pixels % rows == 0:
        return 1
    if rows * columns < LARGE:
        return 0
    whole = rows % pixels == 0  # else a tile may begin and end within an image
    return max(16, power_of_two(rows // pixels if whole else (rows - 2) // pixels + 2))


def tables_of(
    time_table: Tensor, time_rows: Tensor | None, label_table: Tensor | None, label_rows: Tensor | None
) -> tuple[tuple[Any, ...], int]:
    """What ``conv_epilogue.embedding`` takes: tables, rows and their counts; and the columns of a table."""
    labels = (None, None, 0) if label_table is None else (label_table, label_rows, label_table.shape[0])
    return (time_table, time_rows, time_table.shape[0], *labels), time_table.shape[1]


class Conv:
    """One layer at one place, ready to launch.

    kind: one of KINDS. source, target: [n, h, w, channels] views of channels-last buffers: stride 1 over channels, and
    the stride of dimension 2 that of every pixel (in a slice of a contiguous tensor it is, even of one pixel). source
    is None for "first", whose images (float32 NCHW contiguous, ``channels`` of them) come with each call. pooled: gets
    the 2x2 maximum of the target, or None; only of "conv" and "first". residual: [n, h, w, columns] as target, to be
    added, or None; not where it is pooled. packed: `pack`'s. bias: float32 [columns].
    first_column: of the tables' columns that belong to this layer, or None for no embedding.
    Channels are multiples of 16 (but an image's), and tile.k divides them (is `first_terms` of an image's); ValueError
    otherwise.
    """

    def __init__(
        self,
        kind: str,
        source: Tensor | None,
        packed: Tensor,
        bias: Tensor,
        target: Tensor,
        tile: Tile,
        *,
        pooled: Tensor | None = None,
        residual: Tensor | None = None,
        silu: bool = False,
        first_column: int | None = None,
        channels: int | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        n, th, tw, columns = target.shape
        h, w = (th // 2, tw // 2) if kind in ("up", "doubled") else (th, tw)
        if source is not None:
            channels = source.shape[3]
        assert channels is not None
        self._check(kind, channels, columns, h, w, tile, pooled)
        rows = n if kind in ("window", "point") else n * h * w
        if n * th * tw > MAX_PIXELS:
            raise ValueError(f"a layer can have at most {MAX_PIXELS} pixels, got {n * th * tw}; use smaller batches")
        if pooled is not None and residual is not None:
            raise ValueError("a layer is pooled or has a residual added, not both")
        taps = TAPS.get(kind, 1)
        quarters = 4 if kind in QUARTERED else 1
        source_stride = 0 if source is None else source.stride(2)
        if kind == "window" and source_stride == channels:
            taps, channels = 1, 4 * channels  # the four pixels lie in a row: one longer sum, no taps
        passes = 1 if kind == "first" else taps * channels // tile.k
        splits = min(tile.splits, passes)
        span = -(-passes // splits)
        splits = -(-passes // span)  # none of them empty

        pooled_stride = 0 if pooled is None else pooled.stride(2)
        residual_stride = 0 if residual is None else residual.stride(2)
        pixels = n * h * w
        reach = max(
            pixels * (channels if source is None else source_stride),
            n * th * tw * max(target.stride(2), residual_stride),
            pixels // 4 * pooled_stride,
        )
        wide = reach >= 2**31 - 2**24  # the masked rows behind the last one count too
        constants = {"KIND": "conv" if kind == "linear" else kind, "QUARTERS": quarters, "SILU": silu, "WIDE": wide}
        blocks = -(-columns // tile.n) * quarters
        self._on = target
        self._embedded = first_column is not None
        self._two = splits > 1 and not tile.joined  # kernels
        self._source = source
        self._grid = (-(-rows // tile.m) * blocks, splits)
        workspace = count = None
        if splits > 1:
            workspace = torch.empty(splits, rows, quarters * columns, dtype=torch.float32, device=target.device)
            if tile.joined:
                count = torch.zeros(self._grid[0], dtype=torch.int32, device=target.device)
        strides = (target.stride(2), residual_stride, pooled_stride)
        added = None if self._two else residual
        sizes = (rows, h, w, channels, columns, source_stride)
        self._args = (packed, bias, target, added, pooled, workspace, count, *sizes, *strides)
        self._last = (first_column or 0, span)
        self._constants: dict[str, Any] = {
            **constants,
            "TAPS": taps,
            "PARTS": splits if tile.joined else 1,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "IMAGES": images_of(kind, h * w, tile.m, tile.n),
            "EVEN": columns % tile.n == 0,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
        if self._two:
            block_n = min(REDUCE_COLUMNS, power_of_two(columns))
            self._reduce_grid = (-(-rows // REDUCE_ROWS) * -(-columns // block_n) * quarters,)
            self._reduce_args = (bias, target, residual, pooled, workspace, rows, h, w, columns, *strides)
            self._reduce_constants = {
                **constants,
                "PARTS": splits,
                "BLOCK_M": REDUCE_ROWS,
                "BLOCK_N": block_n,
                "IMAGES": images_of(kind, h * w, REDUCE_ROWS, block_n),
                "EVEN": columns % block_n == 0,
            }

    @staticmethod
    def _check(kind: str, channels: int, columns: int, h: int, w: int, tile: Tile, pooled: Tensor | None) -> None:
        if columns % 16 or (kind != "first" and channels % 16):
            raise ValueError(f"channels must be multiples of 16, got {channels} in and {columns} out")
        if kind == "first" and tile.k != first_terms(channels):
            raise ValueError(f'tile.k of a "first" layer must be {first_terms(channels)}, got {tile.k}')
        if kind != "first" and channels % tile.k:
            raise ValueError(f"tile.k must divide the {channels} channels of the source, got {tile.k}")
        if tile.warps > MAX_WARPS and kind in TAPS:
            raise ValueError(f"a sum over several taps takes at most {MAX_WARPS} warps (see conv.py), got {tile.warps}")
        if kind == "first" and tile.splits > 1:
            raise ValueError(f'the sum of a "first" layer is one block and cannot be split, got {tile.splits} parts')
        if kind in ("window", "point") and (h, w) != ((2, 2) if kind == "window" else (1, 1)):
            raise ValueError(f'"{kind}" is for images of {"2x2" if kind == "window" else "1x1"} pixels, got {h}x{w}')
        if pooled is not None and (kind not in ("conv", "first") or h % 2 or w % 2):
            raise ValueError(f'only a "conv" or "first" layer of even sides can be pooled, got "{kind}" of {h}x{w}')

    def __call__(
        self,
        x: Tensor | None,
        time_table: Tensor | None = None,
        time_rows: Tensor | None = None,
        label_table: Tensor | None = None,
        label_rows: Tensor | None = None,
    ) -> None:
        """Launch. x: the images of a "first" layer. Tables: float32 [entries, columns] contiguous; rows: int64 [n]."""
        tables, stride = (NO_TABLES, 0)
        if self._embedded and time_table is not None:
            tables, stride = tables_of(time_table, time_rows, label_table, label_rows)
        source = x if self._source is None else self._source
        launch_overlapping(
            _conv_kernel,
            self._grid,
            self._on,
            source,
            *(NO_TABLES if self._two else tables),
            *self._args,
            stride,
            *self._last,
            **self._constants,
        )
        if self._two:
            launch_overlapping(
                _reduce_kernel,
                self._reduce_grid,
                self._on,
                *tables,
                *self._reduce_args,
                stride,
                self._last[0],
                **self._reduce_constants,
            )
