"""The noise of the library: normal(seed, sample, stream, element), a pure function, here in NumPy.

Philox4x32-10 (Salmon et al. 2011) under the 64-bit ``seed`` turns the counter (quad, sample, stream) into four uint32,
and Box-Muller turns them into four normals. ``quad = element // 4`` counts inside one sample in contiguous (C, H, W)
order; ``sample`` is the global index of the image; ``stream`` says what the noise is for (the constants below). Nothing
else enters: not the batch size, the memory format, the dtype, the device or how work is split.

This file is the specification: every line is one correctly rounded float32 (or exact uint32) operation, without fused
multiply-add, and C++, CUDA and Triton do the same operations in the same order, so all give the same bits.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Streams. A sampling step that leaves timestep t uses 1 + t; training counts its images in `sample`.
STREAM_X_T = 0
STREAM_TRAIN_NOISE = 2**31
STREAM_TRAIN_T = 2**31 + 1
STREAM_LABEL_DROPOUT = 2**31 + 2
STREAM_OFFSET_NOISE = 2**31 + 3
STREAM_FLIP = 2**31 + 4
STREAM_PERMUTATION = 2**31 + 5
STREAM_SELF_COND = 2**31 + 6
STREAM_MODEL_DROPOUT = 2**31 + 7
# Measuring: the subsets of KID; the timesteps of the variational bound, and the noise at timestep t, which is + t.
STREAM_SUBSET = 2**31 + 8
STREAM_BOUND_T = 2**31 + 9
STREAM_BOUND_NOISE = 2**31 + 2**30

F32 = np.float32
U32 = np.uint32
Floats = NDArray[np.float32]
Words = NDArray[np.uint32]

LOG_POLYNOMIAL = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def make_rng(seed: int, first_sample: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """The int64[2] tensor (seed, first_sample) that the ops read on their device.

    ``seed`` is any integer in [0, 2**64), ``first_sample`` any in [0, 2**63): the global index of row 0 of the batch.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")
    if isinstance(first_sample, bool) or not isinstance(first_sample, int) or not 0 <= first_sample < 2**63:
        raise ValueError(f"first_sample must be an integer in [0, 2**63), got {first_sample!r}")
    signed = seed - 2**64 if seed >= 2**63 else seed  # the same 64 bits as int64
    return torch.tensor([signed, first_sample], dtype=torch.int64, device=device)


def philox4x32_10(seed: int, c0: Words, c1: Words, c2: Words, c3: Words) -> tuple[Words, Words, Words, Words]:
    """Four uint32 for each counter (c0, c1, c2, c3), which broadcast together; ``seed`` is the 64-bit key."""
    c0, c1, c2, c3 = np.broadcast_arrays(c0, c1, c2, c3)
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        p0 = np.uint64(0xD2511F53) * c0.astype(np.uint64)
        p1 = np.uint64(0xCD9E8D57) * c2.astype(np.uint64)
        c0, c2 = (p1 >> np.uint64(32)).astype(U32) ^ c1 ^ U32(k0), (p0 >> np.uint64(32)).astype(U32) ^ c3 ^ U32(k1)
        c1, c3 = p1.astype(U32), p0.astype(U32)
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def log_unit(u: Floats) -> Floats:
    """Natural logarithm for u in (0, 1]: u = m 2^e, m in [sqrt(1/2), sqrt(2)), a polynomial of degree 8 in m - 1."""
    bits = u.view(np.int32)
    e = (bits - np.int32(0x3F3504F3)) >> np.int32(23)
    x = (bits - (e << np.int32(23))).view(F32) - F32(1)
    z = x * x
    p = np.full_like(x, LOG_POLYNOMIAL[0])
    for coefficient in LOG_POLYNOMIAL[1:]:
        p = p * x + F32(coefficient)
    ef = e.astype(F32)
    y = x * z * p
    y = y + ef * F32(-2.12194440e-4)
    y = y - F32(0.5) * z
    log: Floats = (x + y) + ef * F32(0.693359375)
    return log


def sincos_turn(r: Words) -> tuple[Floats, Floats]:
    """sin and cos of 2 pi r / 2**32: exact quadrant from the top bits, short polynomials for the rest."""
    quadrant = (r + U32(0x20000000)) >> U32(30)
    t = (r - (quadrant << U32(30))).view(np.int32).astype(F32) * F32(1.4629180792671596e-9)
    z = t * t
    s = ((F32(-1.9515295891e-4) * z + F32(8.3321608736e-3)) * z + F32(-1.6666654611e-1)) * z * t + t
    c = (F32(2.443315711809948e-5) * z + F32(-1.388731625493765e-3)) * z + F32(4.166664568298827e-2)
    c = c * z * z - F32(0.5) * z + F32(1)
    odd = (quadrant & U32(1)) != 0
    sin, cos = np.where(odd, c, s), np.where(odd, s, c)
    sin = np.where((quadrant & U32(2)) != 0, -sin, sin)
    cos = np.where(((quadrant + U32(1)) & U32(2)) != 0, -cos, cos)
    return sin, cos


def box_muller(a: Words, b: Words) -> tuple[Floats, Floats]:
    """Two independent standard normals from two uint32; |z| <= 6.77."""
    u = a.astype(F32) * F32(2.3283064365386963e-10) + F32(1.1641532182693481e-10)
    radius = np.sqrt(F32(-2) * log_unit(u))
    sin, cos = sincos_turn(b)
    return radius * cos, radius * sin


def _quads(seed: int, samples: NDArray[np.uint64], stream: int, elements: int) -> tuple[Words, Words, Words, Words]:
    quads = np.arange((elements + 3) // 4, dtype=U32)[None, :]
    low = (samples & np.uint64(0xFFFFFFFF)).astype(U32)[:, None]
    high = (samples >> np.uint64(32)).astype(U32)[:, None]
    return philox4x32_10(seed, quads, low, high, np.full((1, 1), stream, dtype=U32))


def _samples(first_sample: int, n: int) -> NDArray[np.uint64]:
    samples: NDArray[np.uint64] = np.uint64(first_sample % 2**64) + np.arange(n, dtype=np.uint64)
    return samples


def random_bits(seed: int, first_sample: int, n: int, stream: int, elements: int) -> Words:
    """uint32 [n, elements]: the raw words under the normals of the same arguments."""
    r = _quads(seed, _samples(first_sample, n), stream, elements)
    return np.stack(r, axis=-1).reshape(n, 4 * r[0].shape[1])[:, :elements]


def normal(seed: int, first_sample: int, n: int, stream: int, elements: int) -> Floats:
    """float32 [n, elements]: the noise of samples first_sample ... first_sample + n - 1, in (C, H, W) order."""
    r0, r1, r2, r3 = _quads(seed, _samples(first_sample, n), stream, elements)
    z = np.stack([*box_muller(r0, r1), *box_muller(r2, r3)], axis=-1)
    return z.reshape(n, 4 * r0.shape[1])[:, :elements]
