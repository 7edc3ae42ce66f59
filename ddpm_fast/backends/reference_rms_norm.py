"""The specification of rms_norm_silu; see ``reference.py`` for the rules it keeps.

The factor of a place, sqrt(C) / max(|h|, eps), is that of float32 h, taken in float64 and rounded to float32.
"""

from __future__ import annotations

from torch import Tensor

from ddpm_fast.backends.reference_math import _compute_dtype, _into, silu, silu_grad
from ddpm_fast.backends.reference_norm import _affine, _channel_sums


def _normalized(h: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """xhat = h factor, factor = sqrt(C) / max(|h|, eps) and whether |h| >= eps, the last two [N, 1, ...]"""
    v = h.to(_compute_dtype(h))
    norm = (v.double() * v.double()).sum(1, keepdim=True).sqrt()
    factor = (h.shape[1] ** 0.5 / norm.clamp_min(eps)).to(v.dtype)
    return v * factor, factor, norm >= eps


def rms_norm_silu(
    h: Tensor, weight: Tensor | None, beta: Tensor | None, residual: Tensor | None, eps: float, act: str
) -> Tensor:
    """y = act(xhat weight + beta) + residual with xhat = h sqrt(C) / max(|h|, eps), |h| over the channels"""
    u = _affine(_normalized(h, eps)[0], weight, beta)
    y = silu(u) if act == "silu" else u
    return _into(y if residual is None else y + residual.to(y.dtype), h, h.dtype)


def rms_norm_silu_backward(
    g: Tensor,
    h: Tensor,
    weight: Tensor | None,
    beta: Tensor | None,
    eps: float,
    act: str,
    need_h: bool,
    need_weight: bool,
    need_beta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """g_h = factor (g_x - xhat mean(g_x xhat)) with g_u = g act'(u), g_x = g_u weight and the mean over the channels,
    absent where |h| < eps; and [N, C] the sums over all but (n, c) of g_u xhat and of g_u"""
    compute = _compute_dtype(h)
    xhat, factor, above = _normalized(h, eps)
    g_u = g.to(compute)
    if act == "silu":
        g_u = g_u * silu_grad(_affine(xhat, weight, beta))
    g_x = _affine(g_u, weight, None)
    mean = ((g_x * xhat).double().sum(1, keepdim=True) / (h.shape[1] or 1) * above).to(compute)
    nothing = g.new_empty(0)
    return (
        _into(factor * (g_x - xhat * mean), h, h.dtype) if need_h else nothing,
        _channel_sums(g_u * xhat).to(compute) if need_weight else nothing.clone(),
        _channel_sums(g_u).to(compute) if need_beta else nothing.clone(),
    )
