"""normal(seed, sample, stream, element) in Triton: csrc/philox.h operation by operation, so the same bits.

The generator runs once for each quad of four consecutive elements; ``interleaved`` puts the four results side by
side, which keeps them in one thread's registers and lets contiguous stores be 128 bits wide.
"""

import triton
import triton.language as tl

from . import _math


@triton.jit
def philox4x32_10(seed, c0, c1, c2, c3):
    """Philox4x32-10 (Salmon et al. 2011): four uint32 for the counter words c0 ... c3 under a 64-bit key."""
    k0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def log_unit(u):
    """Natural logarithm for u in (0, 1]: u = m 2^e, m in [sqrt(1/2), sqrt(2)), a polynomial of degree 8 in m - 1."""
    bits = u.to(tl.int32, bitcast=True)
    e = (bits - 0x3F3504F3) >> 23
    m = (bits - (e << 23)).to(tl.float32, bitcast=True)
    x = m - 1.0
    z = x * x
    p = x * 7.0376836292e-2 + -1.1514610310e-1
    p = p * x + 1.1676998740e-1
    p = p * x + -1.2420140846e-1
    p = p * x + 1.4249322787e-1
    p = p * x + -1.6668057665e-1
    p = p * x + 2.0000714765e-1
    p = p * x + -2.4999993993e-1
    p = p * x + 3.3333331174e-1
    ef = e.to(tl.float32)
    y = x * z * p
    y = y + ef * -2.12194440e-4
    y = y - 0.5 * z
    return (x + y) + ef * 0.693359375


@triton.jit
def sincos_turn(r):
    """sin and cos of 2 pi r / 2^32; the quadrant comes from the top bits, so the range reduction is exact."""
    quadrant = (r + 0x20000000) >> 30
    t = (r - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-9
    z = t * t
    s = ((z * -1.9515295891e-4 + 8.3321608736e-3) * z + -1.6666654611e-1) * z * t + t
    c = (z * 2.443315711809948e-5 + -1.388731625493765e-3) * z + 4.166664568298827e-2
    c = c * z * z - 0.5 * z + 1.0
    odd = (quadrant & 1) != 0
    sin_bits = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ ((quadrant & 2) << 30)
    cos_bits = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ (((quadrant + 1) & 2) << 30)
    return sin_bits.to(tl.float32, bitcast=True), cos_bits.to(tl.float32, bitcast=True)


@triton.jit
def box_muller(a, b):
    """Two independent normals from two uint32; |z| <= 6.77."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt_rn(log_unit(u) * -2.0)
    s, c = sincos_turn(b)
    return radius * c, radius * s


@triton.jit
def interleaved(v0, v1, v2, v3):
    """Four tensors [N, Q] as one [N, 4 Q] with v0 ... v3 of each quad side by side."""
    quads = tl.join(tl.join(v0, v2), tl.join(v1, v3))
    return tl.reshape(quads, [v0.shape[0], 4 * v0.shape[1]])


@triton.jit
def bits_of_quads(rng_ptr, stream, row, quad):
    """Four uint32 [N, Q], those of the quads [1, Q] of the samples rng[1] + row [N, 1]."""
    seed = tl.load(rng_ptr)
    sample = tl.load(rng_ptr + 1) + row
    low = (sample & 0xFFFFFFFF).to(tl.uint32)
    high = ((sample >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word = tl.full([1, 1], 0, tl.uint32) + stream.to(tl.uint32)
    return philox4x32_10(seed, quad.to(tl.uint32), low, high, word)


@triton.jit
def normal_of_quads(rng_ptr, stream, row, quad):
    """The normals, float32 [N, 4 Q], of the quads [1, Q] of the samples rng[1] + row [N, 1]."""
    r0, r1, r2, r3 = bits_of_quads(rng_ptr, stream, row, quad)
    z0, z1 = box_muller(r0, r1)
    z2, z3 = box_muller(r2, r3)
    return interleaved(z0, z1, z2, z3)


@triton.jit
def eps_of_tile(noise_ptr, rng_ptr, stream, offset_ptr, strength_bits, quad, row, place, size, channel, channels, mask):
    """The noise of a tile: the given one or a drawn one, plus strength x one normal per channel (offset noise)."""
    if noise_ptr is not None:
        eps = tl.load(noise_ptr + row * size + place, mask=mask, other=0.0)
    else:
        eps = normal_of_quads(rng_ptr, stream, row, quad)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + row * channels + channel, mask=mask, other=0.0)
        eps = eps + _math.float_of_bits(strength_bits) * offset
    return eps
