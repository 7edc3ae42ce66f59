"""The specification of group_norm_silu; see ``reference.py`` for the rules it keeps.

The statistics are those of float32 v, taken in float64 and rounded to float32.
"""

from __future__ import annotations

from torch import Tensor

from ddpm_fast.backends.reference_math import _compute_dtype, _into, _per_channel, silu, silu_grad


def _summed(h: Tensor, bias: Tensor | None, temb: Tensor | None) -> Tensor:
    """v = h + (bias[c] + temb[n, c])"""
    compute = _compute_dtype(h)
    v = h.to(compute)
    if bias is not None and temb is not None:
        return v + _per_channel(bias.to(compute) + temb.to(compute), h)
    added = bias if bias is not None else temb
    return v if added is None else v + _per_channel(added.to(compute), h)


def _per_group(values: Tensor, like: Tensor) -> Tensor:
    """[N, G] -> [N, C, 1, ...]"""
    n, groups = values.shape
    each = values[:, :, None].expand(n, groups, like.shape[1] // groups)
    return each.reshape(*like.shape[:2], *[1] * (like.dim() - 2))


def _channel_sums(x: Tensor) -> Tensor:
    """float64 [N, C]: sums over all but (n, c)"""
    return x.double().unsqueeze(-1).flatten(2).sum(2)


def _affine(xhat: Tensor, weight: Tensor | None, beta: Tensor | None) -> Tensor:
    """u = xhat weight + beta"""
    u = xhat if weight is None else xhat * _per_channel(weight.to(xhat.dtype), xhat)
    return u if beta is None else u + _per_channel(beta.to(xhat.dtype), xhat)


def group_norm_silu(
    h: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    weight: Tensor | None,
    beta: Tensor | None,
    num_groups: int,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = act((v - mean) rstd weight + beta) with v = h + bias + temb; mean and rstd [N, G] over the group of each c"""
    v = _summed(h, bias, temb)
    grouped = v.double().reshape(h.shape[0], num_groups, h.shape[1] // num_groups * h.shape[2:].numel())
    mean = grouped.mean(2)
    centred = grouped - mean[:, :, None]
    rstd = 1 / ((centred * centred).mean(2) + eps).sqrt()
    mean, rstd = mean.to(v.dtype), rstd.to(v.dtype)
    u = _affine((v - _per_group(mean, h)) * _per_group(rstd, h), weight, beta)
    return _into(silu(u) if act == "silu" else u, h, h.dtype), mean, rstd


def group_norm_silu_backward(
    g: Tensor,
    h: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    weight: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    act: str,
    need_h: bool,
    need_sum: bool,
    need_weight: bool,
    need_beta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g_h = rstd (g_x - mean(g_x) - xhat mean(g_x xhat)) with g_u = g act'(u), g_x = g_u weight and means over the
    group; and [N, C] the sums over all but (n, c) of g_h, of g_u xhat and of g_u"""
    compute = _compute_dtype(h)
    scale = _per_group(rstd, h)
    xhat = (_summed(h, bias, temb) - _per_group(mean, h)) * scale
    g_u = g.to(compute)
    if act == "silu":
        g_u = g_u * silu_grad(_affine(xhat, weight, beta))
    g_x = _affine(g_u, weight, None)

    def group_mean(x: Tensor) -> Tensor:
        sums = _channel_sums(x).reshape(h.shape[0], num_groups, h.shape[1] // num_groups).sum(2)
        return _per_group((sums / (h.shape[1] // num_groups * h.shape[2:].numel() or 1)).to(compute), h)

    g_h = scale * (g_x - group_mean(g_x) - xhat * group_mean(g_x * xhat))
    nothing = g.new_empty(0)
    return (
        _into(g_h, h, h.dtype) if need_h else nothing,
        _channel_sums(g_h).to(compute) if need_sum else nothing,
        _channel_sums(g_u * xhat).to(compute) if need_weight else nothing,
        _channel_sums(g_u).to(compute) if need_beta else nothing,
    )
