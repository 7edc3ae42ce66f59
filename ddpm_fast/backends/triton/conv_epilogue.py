"""What follows the sums of a convolution in Triton, and which pixels a row of them stands for: see conv.py."""

import triton
import triton.language as tl

from . import _math

INTERPRETED = _math.INTERPRETED


@triton.jit
def fast_silu(v):
    """v / (1 + exp(-v)) with the hardware's exponential and reciprocal, a few ulp of float32: for half-width results.

    Five instructions. Our exact one takes 50, which at 64 channels is as long as the matrix products, and Triton's own
    exp and division take 14, for they mind subnormal numbers.
    """
    if INTERPRETED:
        y = v / (1.0 + tl.exp(_math.negated(v)))
    else:
        y = tl.inline_asm_elementwise(
            """{
            .reg .f32 e;
            mul.f32 e, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 e, e;
            add.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 e, e;
            mul.f32 $0, $1, e;
            }""",
            "=f,f",
            [v],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return y


@triton.jit
def columns_inside(column, columns, EVEN: tl.constexpr):
    """Which columns exist, [1, block]. EVEN: all of them, which the compiler is told so as to save the masks."""
    return tl.full([1, column.shape[0]], 1, tl.int1) if EVEN else (column < columns)[None, :]


@triton.jit
def pixel_of_row(m, h, w, KIND: tl.constexpr, POOLED: tl.constexpr):
    """(image, y, x) of row m. POOLED: the four pixels of a 2x2 window are four rows in turn."""
    if KIND == "window" or KIND == "point":
        image = m
        y = m * 0
        x = m * 0
    elif POOLED:
        windows = (h // 2) * (w // 2)
        window = m // 4
        image = window // windows
        window = window - image * windows
        window_y = window // (w // 2)
        y = 2 * window_y + ((m >> 1) & 1)
        x = 2 * (window - window_y * (w // 2)) + (m & 1)
    else:
        image = m // (h * w)
        pixel = m - image * (h * w)
        y = pixel // w
        x = pixel - y * w
    return image, y, x


@triton.jit
def target_pixel(m, image, y, x, quarter, h, w, KIND: tl.constexpr, POOLED: tl.constexpr):
    """The number of the pixel that row m and a quarter write."""
    if KIND == "up" or KIND == "doubled":
        pixel = (image * (2 * h) + 2 * y + quarter // 2) * (2 * w) + 2 * x + quarter % 2
    elif KIND == "window":
        pixel = image * 4 + quarter
    elif POOLED:
        pixel = (image * h + y) * w + x
    else:
        pixel = m
    return pixel


@triton.jit
def table_row(row_ptr, count, image, present):
    """The row of a table that an image names, 0 where there is none; and whether there is."""
    row = tl.load(row_ptr + image, mask=present, other=0)
    known = (row >= 0) & (row < count)
    return tl.where(known, row, 0), known


@triton.jit
def embedding(
    time_ptr, time_row_ptr, time_count, label_ptr, label_row_ptr, label_count, stride, image, present, column, inside
):
    """What time and class add, float32 [images, columns]; column: of the tables."""
    row, _ = table_row(time_row_ptr, time_count, image, present)
    value = tl.load(time_ptr + row * stride + column, mask=present & inside, other=0.0)
    if label_ptr is not None:
        row, _ = table_row(label_row_ptr, label_count, image, present)
        value += tl.load(label_ptr + row * stride + column, mask=present & inside, other=0.0)
    return value


@triton.jit
def nan_outside(time_row_ptr, time_count, label_ptr, label_row_ptr, label_count, image, present):
    """0 for images whose rows are inside the tables, else NaN."""
    _, known = table_row(time_row_ptr, time_count, image, present)
    if label_ptr is not None:
        _, labelled = table_row(label_row_ptr, label_count, image, present)
        known = known & labelled
    return tl.where(known, 0.0, float("nan"))


@triton.jit
def finish(
    acc,
    first_row,
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
    KIND: tl.constexpr,
    SILU: tl.constexpr,
    IMAGES: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Bias, activation, time and class embedding, residual and stores, of sums acc [rows from first_row on, columns].

    IMAGES: 1 where all rows are of one image, 0 where each is looked up for itself, else a power of two, of at least
    16, that the number of images of a tile does not exceed. An image whose row is outside a table gets NaN.
    """
    POOLED: tl.constexpr = pooled_ptr is not None
    m = first_row + tl.arange(0, acc.shape[0])
    present = (m < rows)[:, None]
    inside = columns_inside(column, columns, EVEN)
    channel = column[None, :]
    y = acc + tl.load(bias_ptr + channel, mask=inside, other=0.0)
    if SILU:
        y = _math.silu(y) if target_ptr.dtype.element_ty == tl.float32 else fast_silu(y)
    image, py, px = pixel_of_row(m, h, w, KIND, POOLED)
    if time_ptr is not None:
        tables = (time_ptr, time_row_ptr, time_count, label_ptr, label_row_ptr, label_count, table_stride)
        first_image, _, _ = pixel_of_row(first_row, h, w, KIND, POOLED)
        whose, exists = image[:, None], present
        if IMAGES == 1:
            whose = first_image + tl.zeros([1, 1], tl.int32)
            exists = whose >= 0
        if IMAGES <= 1:
            y += embedding(*tables, whose, exists, first_column + channel, inside)
        else:
            # Each row picks its image's embedding, as a product with zeros and ones: gathered row by row they would
            # take as many registers as the sums themselves.
            others = first_image + tl.arange(0, IMAGES)
            there = (others < rows // (h * w))[:, None]
            value = embedding(*tables, others[:, None], there, first_column + channel, inside)
            mine = image[:, None] == others[None, :]
            if INTERPRETED:
                y = tl.dot(mine.to(tl.float32), value, y)
            else:
                # In two parts of bfloat16, which hold 16 digits; only results of 8 or 11 have tiles this large.
                high = value.to(tl.bfloat16)
                low = (value - high.to(tl.float32)).to(tl.bfloat16)
                y = tl.dot(mine.to(tl.bfloat16), low, y)
                y = tl.dot(mine.to(tl.bfloat16), high, y)
        y += nan_outside(time_row_ptr, time_count, label_ptr, label_row_ptr, label_count, whose, exists)
    pixel = target_pixel(m, image, py, px, quarter, h, w, KIND, POOLED)[:, None]
    if WIDE:
        pixel = pixel.to(tl.int64)
    if residual_ptr is not None:
        y += _math.load_image(residual_ptr + pixel * residual_stride + channel, present & inside)
    if not INTERPRETED:
        y = y.to(target_ptr.dtype.element_ty)  # rounding keeps the order, and half the registers do for the rest
    _math.store_image(target_ptr + pixel * target_stride + channel, y, present & inside)
    if POOLED:
        # A maximum passes over NaN. It is not lost: y itself, which has it too, is stored for the skip connection.
        top = tl.max(tl.reshape(y, [y.shape[0] // 4, 4, y.shape[1]]), axis=1)
        window = (first_row // 4 + tl.arange(0, y.shape[0] // 4))[:, None]
        exists = window * 4 < rows
        if WIDE:
            window = window.to(tl.int64)
        _math.store_image(pooled_ptr + window * pooled_stride + channel, top, exists & inside)
