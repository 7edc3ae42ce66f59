"""Convolutions of a fused network as implicit GEMM: y = act(conv(x) + bias) + temb + residual, put where it belongs.

Rows are pixels, columns are output channels, and the sum runs over taps x input channels. Seven layers are one kernel:

| KIND    | layer                                    | rows          | taps | quarters |
|---------|------------------------------------------|---------------|------|----------|
| conv    | 3x3, padding 1                           | pixels        | 9    | 1        |
| conv    | 1x1                                      | pixels        | 1    | 1        |
| first   | 3x3, padding 1, of the image itself      | pixels        | 9    | 1        |
| up      | transposed, 2x2, stride 2                | source pixels | 1    | 4        |
| doubled | 3x3 on the image with doubled pixels     | source pixels | 4    | 4        |
| window  | 3x3 on 2x2 images: all pixels at once    | images        | 4    | 4        |
| point   | 3x3 on 1x1 images: the centre tap        | images        | 1    | 1        |

A quarter is one of the four pixels that a row of ``up``, ``doubled`` or ``window`` makes; a program's columns lie
within one. In a doubled image three rows of taps meet two rows of the source: the first tap one and the others the next
in the upper quarters, the first two one and the last the next in the lower, and likewise in columns. So each quarter is
a 2x2 convolution with taps added up beforehand: 16 products for four pixels in place of 36.

The taps and the channels are one flattened loop, which Triton pipelines. Triton is known to miscompile such a loop for
8 warps and more, silently (triton#1254, pytorch#173068), hence MAX_WARPS. No configuration may be used unchecked:
whoever chooses one compares it with another implementation on the device at hand first.

With few rows the sum is split among programs (split-K). Each writes its part to its own place of a float32 workspace,
and the parts are added in order, so the same bits every time: by a second kernel, or, "joined", by whichever program
of a tile comes last. That one is found by a count of those that are through, which it sets back to 0. A joined sum
saves a launch, longer than all of the work where there are few images, but one program then adds what many could.
"""

import triton
import triton.language as tl

from . import _math, _tile
from .conv_epilogue import columns_inside, finish, pixel_of_row, target_pixel

INTERPRETED = _math.INTERPRETED

MAX_WARPS = 4
"""Of a flattened loop over several taps: see above."""


@triton.jit
def rounded_sum(a, b):
    """a + b rounded to nearest. Tensor cores truncate what they add up, always towards zero, so over thousands of terms
    the error grows with their number; adding every pass's sum out here stops that. In assembly, because Triton turns
    a plain a + dot into dot with a as its accumulator."""
    return tl.inline_asm_elementwise("add.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def load_operand(pointers, mask):
    """An operand tile in its own type, 0 where masked. The interpreter multiplies bfloat16 as float32, its bits moved
    by hand (see _math.py); the products are the same."""
    if INTERPRETED and pointers.dtype.element_ty == tl.bfloat16:
        value = _math.load_image(pointers, mask)
    else:
        value = tl.load(pointers, mask=mask, other=0.0)
    return value


@triton.jit
def loop_bound(value):
    """An integer for range(). The interpreter's numbers are arrays of one element, which NumPy 2.4 does not take for
    an index; there this is Python and can look inside."""
    return value.handle.data.item() if INTERPRETED else value


@triton.jit
def image_tile(x_ptr, image, y, x, present, h, w, channels, BLOCK_K: tl.constexpr, WIDE: tl.constexpr):
    """The taps x channels of float32 (N, C, h, w) images around each pixel, [pixels, BLOCK_K], tap slowest."""
    k = tl.arange(0, BLOCK_K)[None, :]
    tap = k // channels
    channel = k - tap * channels
    at_y = y[:, None] + tap // 3 - 1
    at_x = x[:, None] + tap % 3 - 1
    mask = present[:, None] & (tap < 9) & (at_y >= 0) & (at_y < h) & (at_x >= 0) & (at_x < w)
    plane = image[:, None] * channels + channel
    if WIDE:
        plane = plane.to(tl.int64)
    return tl.load(x_ptr + (plane * h + at_y) * w + at_x, mask=mask, other=0.0)


@triton.jit
def sum_of_parts(pointers, mask, part_size, PARTS: tl.constexpr):
    """What PARTS programs have left, in order. Written out for every part, so that all are on their way at once."""
    acc = tl.zeros(pointers.shape, tl.float32)
    for _ in tl.static_range(PARTS):
        acc += tl.load(pointers, mask=mask, other=0.0)
        pointers += part_size
    return acc


@triton.jit
def comes_last(count_ptr, parts):
    """Whether this program is the last of so many to be through, whose stores it then sees; the count goes back to 0.

    The barriers: every thread has stored before one of them counts, and none reads before that one has."""
    tl.debug_barrier()
    last = tl.atomic_add(count_ptr, 1, sem="acq_rel", scope="gpu") == parts - 1
    tl.debug_barrier()
    if last:
        tl.store(count_ptr, 0)
    return last


@triton.jit(do_not_specialize=["time_count", "label_count", "rows", "h", "w", "span"])
def _conv_kernel(
    source_ptr,
    time_ptr,
    time_row_ptr,
    time_count,
    label_ptr,
    label_row_ptr,
    label_count,
    weight_ptr,
    bias_ptr,
    target_ptr,
    residual_ptr,
    pooled_ptr,
    partial_ptr,
    count_ptr,
    rows,
    h,
    w,
    channels,
    columns,
    source_stride,
    target_stride,
    residual_stride,
    pooled_stride,
    table_stride,
    first_column,
    span,
    KIND: tl.constexpr,
    TAPS: tl.constexpr,
    QUARTERS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SILU: tl.constexpr,
    IMAGES: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One tile. Axis 0 of the grid: column blocks (fastest, they share rows) x row blocks; axis 1: parts of the sum,
    ``span`` blocks of BLOCK_K each. weight: [TAPS x channels, QUARTERS x columns]. Strides are per pixel. count: of the
    programs of each tile that are through, for a joined sum of PARTS."""
    blocks = tl.cdiv(columns, BLOCK_N)
    row_block = tl.program_id(0) // (blocks * QUARTERS)
    block = tl.program_id(0) - row_block * (blocks * QUARTERS)
    quarter = block // blocks
    column = (block - quarter * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    present = m < rows
    image, y, x = pixel_of_row(m, h, w, KIND, pooled_ptr is not None)

    k = tl.arange(0, BLOCK_K)
    width = columns * QUARTERS
    weight_ptrs = weight_ptr + k[:, None] * width + (quarter * columns + column)[None, :]
    weight_mask = columns_inside(column, columns, EVEN)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    _tile.await_previous(OVERLAP)
    if KIND == "first":
        tile = image_tile(source_ptr, image, y, x, present, h, w, channels, BLOCK_K, WIDE)
        weight = tl.load(weight_ptrs, mask=weight_mask, other=0.0)
        acc = tl.dot(tile, weight, acc, input_precision="tf32x3")
    else:
        pixel = m * 4 if KIND == "window" else target_pixel(m, image, y, x, 0, h, w, "conv", pooled_ptr is not None)
        if WIDE:
            pixel = pixel.to(tl.int64)
        source_ptrs = source_ptr + (pixel * source_stride)[:, None] + k[None, :]
        chunks = channels // BLOCK_K
        first = tl.program_id(1) * span
        weight_ptrs += first.to(tl.int64) * BLOCK_K * width
        for i in range(loop_bound(first), loop_bound(tl.minimum(first + span, TAPS * chunks))):
            mask = present
            if TAPS == 1:
                shift = i * BLOCK_K
            else:
                tap = i // chunks
                shift = (i - tap * chunks) * BLOCK_K
                if KIND == "window":
                    shift += tap * source_stride
                else:
                    if KIND == "conv":
                        dy = tap // 3 - 1
                        dx = tap - 3 * (dy + 1) - 1
                    else:
                        dy = tap // 2 + quarter // 2 - 1
                        dx = tap % 2 + quarter % 2 - 1
                    shift += (dy * w + dx) * source_stride
                    mask = mask & (y + dy >= 0) & (y + dy < h) & (x + dx >= 0) & (x + dx < w)
            tile = load_operand(source_ptrs + shift, mask[:, None])
            weight = load_operand(weight_ptrs, weight_mask)
            if source_ptr.dtype.element_ty == tl.float32 and not INTERPRETED:
                acc = rounded_sum(acc, tl.dot(tile, weight, input_precision="tf32x3"))
            else:
                acc = tl.dot(tile, weight, acc)
            weight_ptrs += BLOCK_K * width

    if partial_ptr is not None:
        inside = present[:, None] & weight_mask
        place = m.to(tl.int64)[:, None] * width + (quarter * columns + column)[None, :]
        part_size = rows.to(tl.int64) * width
        tl.store(partial_ptr + tl.program_id(1) * part_size + place, acc, mask=inside)
    if partial_ptr is None or count_ptr is not None:
        mine = True
        if count_ptr is not None:
            mine = comes_last(count_ptr + tl.program_id(0), PARTS)
        if mine:
            if count_ptr is not None:
                acc = sum_of_parts(partial_ptr + place, inside, part_size, PARTS)
            finish(
                acc,
                row_block * BLOCK_M,
                rows,
                column,
                quarter,
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
                KIND,
                SILU,
                IMAGES,
                EVEN,
                WIDE,
            )


@triton.jit(do_not_specialize=["time_count", "label_count", "rows", "h", "w"])
def _reduce_kernel(
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
    partial_ptr,
    rows,
    h,
    w,
    columns,
    target_stride,
    residual_stride,
    pooled_stride,
    table_stride,
    first_column,
    PARTS: tl.constexpr,
    KIND: tl.constexpr,
    QUARTERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SILU: tl.constexpr,
    IMAGES: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Adds the parts [PARTS, rows, QUARTERS x columns] that ``_conv_kernel`` left, in order, and finishes."""
    _tile.await_previous(OVERLAP)
    blocks = tl.cdiv(columns, BLOCK_N)
    row_block = tl.program_id(0) // (blocks * QUARTERS)
    block = tl.program_id(0) - row_block * (blocks * QUARTERS)
    quarter = block // blocks
    column = (block - quarter * blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    width = columns * QUARTERS
    mask = (m < rows)[:, None] & columns_inside(column, columns, EVEN)
    partial_ptrs = partial_ptr + m.to(tl.int64)[:, None] * width + (quarter * columns + column)[None, :]
    acc = sum_of_parts(partial_ptrs, mask, rows.to(tl.int64) * width, PARTS)
    finish(
        acc,
        row_block * BLOCK_M,
        rows,
        column,
        quarter,
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
        KIND,
        SILU,
        IMAGES,
        EVEN,
        WIDE,
    )
