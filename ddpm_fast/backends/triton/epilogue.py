"""What follows a convolution that a library has done, in one pass: act(y + bias) + temb + residual, where it belongs,
and where it is wanted each 2x2's maximum. The same arithmetic as behind our own convolutions, see conv_epilogue.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _math
from .conv_call import MAX_PIXELS, NO_TABLES, images_of, tables_of
from .conv_epilogue import columns_inside, finish, pixel_of_row, target_pixel
from .launch import launch, power_of_two

ROWS, COLUMNS = 32, 64
"""Of a program: two 128-bit accesses to each half-width array for a thread."""


@triton.jit(do_not_specialize=["time_count", "label_count", "rows", "h", "w"])
def _epilogue_kernel(
    source_ptr,
    time_ptr,
    time_row_ptr,
    time_count,
    label_ptr,
    label_row_ptr,
    label_count,
    bias_ptr,
    target_ptr,
    residual_ptr,
    pooled_ptr,
    rows,
    h,
    w,
    columns,
    target_stride,
    residual_stride,
    pooled_stride,
    table_stride,
    first_column,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SILU: tl.constexpr,
    IMAGES: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One tile of source [rows, columns]. Axis 0 of the grid: column blocks (fastest) x row blocks. Strides are per
    pixel."""
    blocks = tl.cdiv(columns, BLOCK_N)
    row_block = tl.program_id(0) // blocks
    column = (tl.program_id(0) - row_block * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    image, y, x = pixel_of_row(m, h, w, "conv", pooled_ptr is not None)
    pixel = target_pixel(m, image, y, x, 0, h, w, "conv", pooled_ptr is not None)[:, None]
    if WIDE:
        pixel = pixel.to(tl.int64)
    mask = (m < rows)[:, None] & columns_inside(column, columns, EVEN)
    finish(
        _math.load_image(source_ptr + pixel * columns + column[None, :], mask),
        row_block * BLOCK_M,
        rows,
        column,
        0,
        bias_ptr,
        time_ptr,
        time_row_ptr,
        time_count,
        label_ptr,
        label_row_ptr,
        label_count,
        table_stride,
        first_column,
        target_ptr,
        target_stride,
        residual_ptr,
        residual_stride,
        pooled_ptr,
        pooled_stride,
        h,
        w,
        columns,
        "conv",
        SILU,
        IMAGES,
        EVEN,
        WIDE,
    )


class Epilogue:
    """The end of one layer at one place, ready to launch.

    target: [n, h, w, columns] view of a channels-last buffer, columns a multiple of 16. residual: the same, or None;
    pooled: [n, h / 2, w / 2, columns], or None, and not both. bias: float32 [columns]. first_column: of the tables'
    columns that belong to this layer, or None for no embedding. ValueError for what it cannot serve.
    """

    def __init__(
        self,
        bias: Tensor,
        target: Tensor,
        *,
        pooled: Tensor | None = None,
        residual: Tensor | None = None,
        silu: bool = False,
        first_column: int | None = None,
    ) -> None:
        n, h, w, columns = target.shape
        rows = n * h * w
        if columns % 16:
            raise ValueError(f"columns must be a multiple of 16, got {columns}")
        if rows > MAX_PIXELS:
            raise ValueError(f"a layer can have at most {MAX_PIXELS} pixels, got {rows}; use smaller batches")
        if pooled is not None and (residual is not None or h % 2 or w % 2):
            raise ValueError(f"only a layer of even sides without a residual can be pooled, got {h}x{w}")
        strides = tuple(0 if view is None else view.stride(2) for view in (target, residual, pooled))
        block_n = min(COLUMNS, power_of_two(columns))
        self._on = target
        self._embedded = first_column is not None
        self._grid = (-(-rows // ROWS) * -(-columns // block_n),)
        self._args = (bias, target, residual, pooled, rows, h, w, columns, *strides)
        self._first_column = first_column or 0
        self._constants = {
            "BLOCK_M": ROWS,
            "BLOCK_N": block_n,
            "SILU": silu,
            "IMAGES": images_of("conv", h * w, ROWS, block_n),
            "EVEN": columns % block_n == 0,
            "WIDE": rows * max(columns, *strides) >= 2**31 - 2**24,
        }

    def __call__(
        self,
        y: Tensor,
        time_table: Tensor | None = None,
        time_rows: Tensor | None = None,
        label_table: Tensor | None = None,
        label_rows: Tensor | None = None,
    ) -> None:
        """Launch. y: [n, h, w, columns] contiguous. Tables: float32 [entries, columns] contiguous; rows: int64 [n]."""
        tables, stride = (NO_TABLES, 0)
        if self._embedded and time_table is not None:
            tables, stride = tables_of(time_table, time_rows, label_table, label_rows)
        arguments = (y, *tables, *self._args, stride, self._first_column)
        launch(_epilogue_kernel, self._grid, self._on, *arguments, **self._constants)
