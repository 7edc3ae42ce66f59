"""The scalar formulas of csrc/ddpm_math.h in Triton: the same operations in the same order, so the same bits in
float32. (SiLU leaves out some operations of exp that cannot change its result.)

What the interpreter does not show but compiled code would do: ``/`` is an approximate division there, ``tl.sqrt`` and
``tl.exp`` are approximate, ``tl.clamp`` drops NaN and a multiplication followed by an addition is fused. Hence
``tl.div_rn``, ``tl.sqrt_rn``, a polynomial for exp, nested ``tl.where`` for clipping, and ``enable_fp_fusion=False``
in launch.py.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""In the interpreter a cast to bfloat16 truncates and one from it loses subnormals (3.6 to 3.9), so there the bits
are moved by hand; compiled casts round to nearest even."""


@triton.jit
def clip(x, lo, hi):
    """x limited to [lo, hi]; NaN stays NaN."""
    return tl.where(x < lo, lo, tl.where(x > hi, hi, x))


@triton.jit
def negated(x):
    """The sign of x flipped; ``-x`` in Triton is 0 - x, which is +0 for x = +0."""
    return x * -1.0


@triton.jit
def exp_parts(w):
    """(p, n) with exp(w) = p 2^n and p in about [0.7, 1.42], for w in [-126, 126]."""
    shifted = w * 1.44269504088896341 + 12582912.0
    nf = shifted - 12582912.0
    r = (w - nf * 0.693359375) - nf * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = (p * (r * r) + r) + 1.0
    return p, shifted.to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def pow2(n):
    """2^n for |n| <= 126, from its bits."""
    return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_f32(x):
    """exp of x clipped to [-126, 126]; 2^n comes in two exact steps, so only a subnormal or overflow is rounded."""
    p, n = exp_parts(clip(x, -126.0, 126.0))
    half = n >> 1
    return p * pow2(half) * pow2(n - half)


@triton.jit
def exp_of_minus_abs(v):
    """(a, p, low, rest): a = -|v| limited to -126 from below, and exp(a) = p rest low with powers of two low >=
    2^-126 and rest, which is 1 unless exp(a) is subnormal: half the work of ``exp_f32`` for the same bits."""
    a = -1.0 * tl.abs(v)
    a = tl.where(a < -126.0, -126.0, a)
    p, n = exp_parts(a)
    n_low = tl.maximum(n, -126)
    return a, p, pow2(n_low), pow2(n - n_low)


@triton.jit
def silu(v):
    """v / (1 + exp(-v)) = v exp(v) / (1 + exp(v)): exp is only taken of -|v| and its power of two is applied last, so
    nothing overflows and small results are exact. In the denominator ``low`` does for 2^n, because below it the sum
    is 1."""
    negative = v < 0.0
    a, p, low, rest = exp_of_minus_abs(v)
    ratio = tl.div_rn(tl.where(negative, a * p, v), 1.0 + p * low)
    return tl.where(negative, ratio * rest * low, ratio)


@triton.jit
def silu_grad(v):
    """s (1 + v (1 - s)) with s = 1 / (1 + exp(-v))."""
    negative = v < 0.0
    a, p, low, rest = exp_of_minus_abs(v)
    e = p * rest * low
    denominator = 1.0 + e
    big = tl.div_rn(tl.full(e.shape, 1.0, tl.float32), denominator)
    small = e * big
    s = tl.where(negative, small, big)
    one_minus_s = tl.where(negative, big, small)
    return s * (1.0 + tl.where(negative, a, v) * one_minus_s)


@triton.jit
def float_of_bits(bits):
    """A float that came as int32 bits: float kernel arguments become float64 when Inductor traces the launch."""
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def load_image(pointers, mask):
    """A float array in float32, 0 where masked; bytes become [-1, 1] through x / 127.5 - 1."""
    x = tl.load(pointers, mask=mask, other=0)
    if pointers.dtype.element_ty == tl.uint8:
        value = x.to(tl.float32)
        value = tl.div_rn(value, tl.full(value.shape, 127.5, tl.float32)) - 1.0
    elif pointers.dtype.element_ty == tl.bfloat16 and INTERPRETED:
        value = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        value = x.to(tl.float32)
    return value


@triton.jit
def store_image(pointers, x, mask):
    """Store float32 x in the type of the array; bytes are (x + 1) 127.5, half to even, saturating, NaN to 0."""
    if pointers.dtype.element_ty == tl.uint8:
        v = (x + 1.0) * 127.5
        inside = tl.where(v >= 0.0, tl.where(v > 255.0, 255.0, v), 0.0)
        # Adding 2^23 leaves the rounded integer in the low mantissa bits.
        bits = (inside + 8388608.0).to(tl.int32, bitcast=True)
        tl.store(pointers, (bits & 0xFF).to(tl.uint8), mask=mask)
    elif pointers.dtype.element_ty == tl.bfloat16 and INTERPRETED:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        tl.store(pointers, rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def noising_row(table_ptr, t_ptr, sample, steps, mask):
    """(sqrt(alphas_cumprod_t), sqrt(1 - alphas_cumprod_t)) of each sample; NaN where t is outside the table."""
    t = tl.load(t_ptr + sample, mask=mask, other=0)
    known = mask & (t >= 0) & (t < steps)
    signal = tl.load(table_ptr + 2 * t, mask=known, other=float("nan"))
    noise = tl.load(table_ptr + 2 * t + 1, mask=known, other=float("nan"))
    return signal, noise


@triton.jit
def target_value(TARGET: tl.constexpr, signal, noise, x0, eps):
    """What the model is to predict: eps, x0, or v = sqrt(ab) eps - sqrt(1 - ab) x0 (Salimans & Ho 2022)."""
    if TARGET == "eps":
        target = eps
    elif TARGET == "x0":
        target = x0
    else:
        target = signal * eps - noise * x0
    return target


@triton.jit
def loss_value(LOSS: tl.constexpr, d, delta):
    """Squared error, absolute error, or Huber's: d^2 / 2 inside delta, delta (|d| - delta / 2) outside."""
    if LOSS == "mse":
        value = d * d
    elif LOSS == "l1":
        value = tl.abs(d)
    else:
        size = tl.abs(d)
        value = tl.where(size < delta, 0.5 * d * d, delta * (size - 0.5 * delta))
    return value


@triton.jit
def loss_grad(LOSS: tl.constexpr, d, delta):
    """The derivative of ``loss_value``; NaN stays NaN."""
    if LOSS == "mse":
        value = 2.0 * d
    elif LOSS == "l1":
        value = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    else:
        value = tl.where(d > 0.0, delta, tl.where(d < 0.0, negated(delta), d))
        value = tl.where(tl.abs(d) < delta, d, value)
    return value


@triton.jit
def sum_over_columns(x):
    """The sums [R, 1] of the rows of x [R, W]; infinities and NaN as in any sum.

    Four neighbours, which lie in one thread, are added first. Their sums are split on a grid so coarse that multiples
    of it add up exactly in any order (Demmel & Nguyen 2013); what is left is at most 2^-23 W of the largest, so that
    its rounding errors do not matter. So the error does not grow with W.
    """
    lanes = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 4, 4]), axis=2) if x.shape[1] >= 4 else x
    grid = tl.max(tl.abs(lanes), axis=1)[:, None] * (4.0 * lanes.shape[1])
    grid = tl.where(grid < float("inf"), grid, 0.0)
    coarse = (lanes + grid) - grid
    fine = tl.where(coarse == lanes, 0.0, lanes - coarse)
    return (tl.sum(coarse, axis=1) + tl.sum(fine, axis=1))[:, None]
