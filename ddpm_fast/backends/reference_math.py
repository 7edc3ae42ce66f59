"""What the reference ops share: shapes, the dtype of the arithmetic, exp and SiLU in eager PyTorch.

As in ``reference.py`` every operation is rounded once, and nothing is fused.
"""

from __future__ import annotations

import torch
from torch import Tensor

LN2_HIGH = 0.693359375
LN2_LOW = -2.12194440e-4
EXP_POLYNOMIAL = (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """[C] or [N, C] -> [1 or N, C, 1, ...]"""
    rows = values.shape[0] if values.dim() == 2 else 1
    return values.reshape(rows, like.shape[1], *[1] * (like.dim() - 2))


def _clip(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """clip that keeps NaN"""
    return torch.where(x < lo, lo, torch.where(x > hi, hi, x))


def _into(value: Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` rounded to ``dtype`` in the strides that an op's result has."""
    out = torch.empty_like(like, dtype=dtype)
    return out.copy_(value)


def _exp_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(x) = p 2^n for x clipped to [-126, 126], in float32; n as int32."""
    w = _clip(x, torch.tensor(-126.0), torch.tensor(126.0))
    shifted = w * 1.44269504088896341 + 12582912.0
    nf = shifted - 12582912.0
    r = (w - nf * LN2_HIGH) - nf * LN2_LOW
    p = torch.full_like(r, 1.9875691500e-4)
    for coefficient in EXP_POLYNOMIAL:
        p = p * r + coefficient
    p = (p * (r * r) + r) + 1.0
    return p, shifted.view(torch.int32) - 0x4B400000


def _scale_pow2(x: Tensor, n: Tensor) -> Tensor:
    """x 2^n in two exact steps."""
    half = n >> 1
    return x * ((half + 127) << 23).view(torch.float32) * ((n - half + 127) << 23).view(torch.float32)


def exp(x: Tensor) -> Tensor:
    """exp within 1 ulp: the library's polynomial in float32, torch's function in float64."""
    return torch.exp(x) if x.dtype == torch.float64 else _scale_pow2(*_exp_parts(x))


def silu(v: Tensor) -> Tensor:
    """v / (1 + exp(-v)), exp taken of -|v| only, its power of two applied last."""
    if v.dtype == torch.float64:
        return v / (1 + torch.exp(-v))
    w = torch.where(v < -126.0, torch.tensor(-126.0), v)
    negative = w < 0
    p, n = _exp_parts(torch.where(negative, w, -w))
    ratio = torch.where(negative, w * p, w) / (1.0 + _scale_pow2(p, n))
    return _scale_pow2(ratio, torch.where(negative, n, 0))


def silu_grad(v: Tensor) -> Tensor:
    """s (1 + v (1 - s)) with s = 1 / (1 + exp(-v))"""
    w = torch.where(v < -126.0, torch.tensor(-126.0, dtype=v.dtype), v)
    negative = w < 0
    e = exp(torch.where(negative, w, -w))
    big = 1.0 / (1.0 + e)
    small = e * big
    s, one_minus_s = torch.where(negative, small, big), torch.where(negative, big, small)
    return s * (1.0 + w * one_minus_s)
