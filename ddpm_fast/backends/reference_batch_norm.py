"""The specification of batch_norm_silu; see ``reference.py`` for the rules it keeps.

The statistics are those of float32 h, taken in float64 and rounded to float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.backends.reference_math import _compute_dtype, _into, _per_channel, silu, silu_grad
from ddpm_fast.backends.reference_norm import _affine, _channel_sums


def _sums(x: Tensor) -> Tensor:
    """float64 [C]: sums over all but c"""
    return x.double().movedim(1, 0).flatten(1).sum(1)


def _count(h: Tensor) -> int:
    """Values per channel, and 1 where there are none."""
    return h.shape[0] * h.shape[2:].numel() or 1


def _xhat(h: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(h - mean) rstd and rstd = 1 / sqrt(var + eps), the latter computed in float64"""
    compute = _compute_dtype(h)
    rstd = _per_channel((1 / (var.double() + eps).sqrt()).to(compute), h)
    return (h.to(compute) - _per_channel(mean, h)) * rstd, rstd


def batch_norm_silu(
    h: Tensor,
    temb: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act((h - mean) rstd weight + bias) + temb; mean and var [C], the batch's unless the running ones are given"""
    compute = _compute_dtype(h)
    if running_mean is not None and running_var is not None:
        mean, var = (value.to(compute, copy=True) for value in (running_mean, running_var))
    else:
        mean64 = _sums(h) / _count(h)
        centred = h.double() - _per_channel(mean64, h)
        mean, var = mean64.to(compute), (_sums(centred * centred) / _count(h)).to(compute)
    u = _affine(_xhat(h, mean, var, eps)[0], weight, bias)
    y = silu(u) if act == "silu" else u
    if temb is not None:
        y = y + _per_channel(temb.to(compute), h)
    return _into(y, h, h.dtype), mean, var


def batch_norm_silu_backward(
    g: Tensor,
    h: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    of_batch: bool,
    eps: float,
    act: str,
    need_h: bool,
    need_temb: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g_h = weight rstd (g_u - mean(g_u) - xhat mean(g_u xhat)) with g_u = g act'(u) and means over the channel, which
    are left out where mean and var are not the batch's; [N, C] the sums of g; [C] those of g_u xhat and of g_u"""
    compute = _compute_dtype(h)
    xhat, rstd = _xhat(h, mean, var, eps)
    g_y = g.to(compute)
    g_u = g_y * silu_grad(_affine(xhat, weight, bias)) if act == "silu" else g_y
    of_gx, of_g = _sums(g_u * xhat), _sums(g_u)
    g_x = g_u
    if of_batch:
        mean_gx, mean_g = (_per_channel((sums / _count(h)).to(compute), h) for sums in (of_gx, of_g))
        g_x = g_u - mean_g - xhat * mean_gx
    nothing = g.new_empty(0)
    return (
        _into(rstd * _affine(g_x, weight, None), h, h.dtype) if need_h else nothing,
        _channel_sums(g_y).to(compute) if need_temb else torch.empty_like(nothing),
        of_gx.to(compute),
        of_g.to(compute),
    )
