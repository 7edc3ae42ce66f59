"""The specification of every op, in eager PyTorch: one operation per rounding, left to right, nothing fused.

Only binary + - x / and sqrt are used (no ``alpha=``, ``addcmul``, ``lerp``), because fused forms round differently;
the other backends must give the same bits in float32. float64 inputs are computed in float64 (for gradcheck). Slow on
purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast import noise as spec
from ddpm_fast.backends.reference_batch_norm import batch_norm_silu as batch_norm_silu
from ddpm_fast.backends.reference_batch_norm import batch_norm_silu_backward as batch_norm_silu_backward
from ddpm_fast.backends.reference_math import _clip, _compute_dtype, _into, _per_channel, exp, silu, silu_grad
from ddpm_fast.backends.reference_norm import group_norm_silu as group_norm_silu
from ddpm_fast.backends.reference_norm import group_norm_silu_backward as group_norm_silu_backward
from ddpm_fast.backends.reference_rms_norm import rms_norm_silu as rms_norm_silu
from ddpm_fast.backends.reference_rms_norm import rms_norm_silu_backward as rms_norm_silu_backward


def unavailable_reason(device: torch.device) -> str | None:
    """Always None: eager PyTorch runs everywhere."""
    return None


# ---- helpers -------------------------------------------------------------------------------------------------------


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[N] -> [N, 1, 1, ...]"""
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _image(x: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 -> [-1, 1]; floats as they are."""
    if x.dtype != torch.uint8:
        return x.to(dtype)
    # A tensor on the same device: CUDA multiplies by the reciprocal where the divisor is a number.
    return x.to(dtype) / torch.tensor(127.5, dtype=dtype, device=x.device) - 1


def _drawn(rng: Tensor, stream: int, shape: torch.Size, device: torch.device) -> Tensor:
    """float32 [shape]: normal(seed, first_sample + n, stream, element)"""
    seed, first_sample = rng.tolist()
    elements = shape[1:].numel()
    z = spec.normal(seed % 2**64, first_sample, shape[0], stream % 2**32, elements)
    return torch.from_numpy(z.reshape(shape).copy()).to(device)


def _noise(x: Tensor, noise: Tensor | None, rng: Tensor | None, stream: int, offset_noise: float) -> Tensor:
    """The eps of an op over images ``x``: given or drawn, plus offset noise (one value per sample and channel)."""
    dtype = _compute_dtype(x)
    if noise is None:
        assert rng is not None
        noise = _drawn(rng, stream, x.shape, x.device)
    eps = noise.to(dtype)
    if offset_noise != 0:
        assert rng is not None
        channels = x.shape[:2] if x.dim() > 1 else torch.Size((x.shape[0], 1))
        offset = _drawn(rng, spec.STREAM_OFFSET_NOISE, channels, x.device).to(dtype)
        offset = offset.reshape(*x.shape[:2], *[1] * (x.dim() - 2)) if x.dim() > 1 else offset.reshape(-1)
        eps = eps + torch.tensor(offset_noise, dtype=dtype) * offset
    return eps


def _noising_rows(t: Tensor, table: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(ab_t), sqrt(1 - ab_t) for each sample, NaN where t is outside the table."""
    inside = (t >= 0) & (t < table.shape[0])
    rows = table.to(_compute_dtype(x))[torch.where(inside, t, 0)]
    rows = torch.where(inside[:, None], rows, torch.nan)
    return _per_sample(rows[:, 0], x), _per_sample(rows[:, 1], x)


# ---- ops -----------------------------------------------------------------------------------------------------------


def normal(out: Tensor, rng: Tensor, stream: int) -> None:
    """out[n, e] = normal(seed, first_sample + n, stream, e)"""
    out.copy_(_drawn(rng, stream, out.shape, out.device))


def random_bits(out: Tensor, rng: Tensor, stream: int) -> None:
    """The uint32 under the normals, as int64"""
    seed, first_sample = rng.tolist()
    words = spec.random_bits(seed % 2**64, first_sample, out.shape[0], stream % 2**32, out.shape[1:].numel())
    out.copy_(torch.from_numpy(words.astype("int64").reshape(out.shape)))


def q_sample(
    x0: Tensor,
    t: Tensor,
    table: Tensor,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps (DDPM eq. 4); v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0"""
    signal, sigma = _noising_rows(t, table, x0)
    eps = _noise(x0, noise, rng, stream, offset_noise)
    x = _image(x0, _compute_dtype(x0))
    x_t = _into(signal * x + sigma * eps, x0, dtype)
    if target == "none":
        return x_t, x_t.new_empty(0)
    return x_t, _into({"eps": eps, "x0": x, "v": signal * eps - sigma * x}[target], x_t, dtype)


def q_sample_backward(
    g_x_t: Tensor | None,
    g_target: Tensor | None,
    t: Tensor,
    table: Tensor,
    target: str,
    dtype: torch.dtype,
    need_x0: bool,
    need_noise: bool,
) -> tuple[Tensor, Tensor]:
    """The transposed map: gradients of x_t and of the target pulled back to x0 and eps"""
    g = g_x_t if g_x_t is not None else g_target
    assert g is not None
    compute = _compute_dtype(g)
    signal, sigma = _noising_rows(t, table, g)
    g_x = g_x_t.to(compute) if g_x_t is not None else torch.zeros_like(g, dtype=compute)
    g_y = g_target.to(compute) if g_target is not None else torch.zeros_like(g, dtype=compute)
    g_x0, g_noise = signal * g_x, sigma * g_x
    if target == "x0":
        g_x0 = g_x0 + g_y
    elif target == "eps":
        g_noise = g_noise + g_y
    elif target == "v":
        g_x0, g_noise = g_x0 - sigma * g_y, g_noise + signal * g_y
    nothing = g.new_empty(0)
    return _into(g_x0, g, dtype) if need_x0 else nothing, _into(g_noise, g, compute) if need_noise else nothing


def add_bias_temb(h: Tensor, bias: Tensor | None, temb: Tensor | None, act: str) -> Tensor:
    """y = act(h + bias[c]) + temb[n, c]"""
    compute = _compute_dtype(h)
    y = h.to(compute)
    if bias is not None:
        y = y + _per_channel(bias.to(compute), h)
    if act == "silu":
        y = silu(y)
    if temb is not None:
        y = y + _per_channel(temb.to(compute), h)
    return _into(y, h, h.dtype)


def add_bias_temb_backward(
    g: Tensor, h: Tensor | None, bias: Tensor | None, act: str, need_h: bool, need_bias: bool, need_temb: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """g_h = g act'(h + bias); the sums of g_h and of g over all but (n, c)"""
    compute = _compute_dtype(g)
    g_y = g.to(compute)
    g_h = g_y
    if act == "silu":
        assert h is not None
        v = h.to(compute)
        if bias is not None:
            v = v + _per_channel(bias.to(compute), h)
        g_h = g_y * silu_grad(v)
    like = h if h is not None else g
    nothing = g.new_empty(0)
    sums = [value.double().unsqueeze(-1).flatten(2).sum(2).to(compute) for value in (g_h, g_y)]
    return (
        _into(g_h, like, like.dtype) if need_h else nothing,
        sums[0] if need_bias else nothing,
        (sums[1] if need_temb else nothing),
    )


def ddpm_step(
    x: Tensor,
    m: Tensor,
    table: Tensor,
    t_of_row: Tensor,
    row: Tensor,
    rng: Tensor | None,
    noise: Tensor | None,
    m_uncond: Tensor | None,
    guidance: Tensor | None,
    x0_prev: Tensor | None,
    logvar: Tensor | None,
    logvar_range: Tensor | None,
    threshold: Tensor | None,
    x0_out: Tensor | None,
    copy_out: Tensor | None,
    bad_row: Tensor | None,
) -> None:
    """x0 = clip(a x - b m); x <- c1 x0 + c2 x + c3 m [+ c4 x0_prev] [+ s z], with the table's row of coefficients"""
    index = int(row)
    inside = 0 <= index < table.shape[0]
    dtype = x.dtype
    coefficients = table[index].to(dtype) if inside else torch.full((8,), torch.nan, dtype=dtype, device=x.device)
    a, b, c1, c2, c3, c4, s, bound = coefficients.unbind()
    m = m.to(dtype)
    if m_uncond is not None:
        assert guidance is not None
        m = m_uncond.to(dtype) + guidance.to(dtype) * (m - m_uncond.to(dtype))
    x0 = a * x - b * m
    if threshold is not None:
        limit = _per_sample(threshold.to(dtype), x)
        x0 = _clip(x0, -limit, limit) / limit
    else:
        x0 = _clip(x0, -bound, bound)
    y = c1 * x0 + c2 * x + c3 * m
    if x0_prev is not None:
        y = y + c4 * x0_prev
    if inside and float(s) != 0.0 and (noise is not None or rng is not None):
        z = _noise(x, noise, rng, 1 + int(t_of_row[index]), 0.0)
        sigma = s
        if logvar is not None:
            log_variance = logvar.to(dtype)
            if logvar_range is not None:  # Nichol & Dhariwal 2021, eq. 15
                low, high = logvar_range[index].to(dtype).unbind()
                f = 0.5 * (log_variance + 1.0)
                log_variance = f * high + (1.0 - f) * low
            sigma = exp(0.5 * log_variance)
        y = y + sigma * z
    x.copy_(y)
    if x0_out is not None:
        x0_out.copy_(x0)
    if copy_out is not None:
        copy_out.copy_(_byte(y) if copy_out.dtype == torch.uint8 else y)
    if bad_row is not None and int(bad_row) < 0 and not bool(torch.isfinite(y).all()):
        bad_row.fill_(max(index, 0))


def _byte(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8, half to even, saturating, NaN to 0"""
    v = (x + 1.0) * 127.5
    inside = torch.where(v >= 0, torch.where(v > 255.0, 255.0, v), 0.0)
    return torch.round(inside).to(torch.uint8)


def _target(
    pred: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
) -> Tensor:
    if target == "x0":
        assert x0 is not None
        return _image(x0, _compute_dtype(pred))
    eps = _noise(pred, noise, rng, stream, offset_noise)
    if target == "eps":
        return eps
    assert x0 is not None
    assert t is not None
    assert table is not None
    signal, sigma = _noising_rows(t, table, pred)
    return signal * eps - sigma * _image(x0, _compute_dtype(pred))


def noise_mse(
    pred: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    loss: str,
    huber_delta: float,
) -> Tensor:
    """[N]: the mean over each sample of loss(pred - target)"""
    d = pred.to(_compute_dtype(pred)) - _target(pred, x0, t, table, noise, rng, stream, offset_noise, target)
    if loss == "mse":
        values = d * d
    elif loss == "l1":
        values = d.abs()
    else:
        delta = torch.tensor(huber_delta, dtype=d.dtype)
        size = d.abs()
        values = torch.where(size < delta, 0.5 * d * d, delta * (size - 0.5 * delta))
    return values.double().reshape(pred.shape[0], -1).mean(1).to(d.dtype)


def noise_mse_backward(
    g: Tensor,
    pred: Tensor,
    x0: Tensor | None,
    t: Tensor | None,
    table: Tensor | None,
    noise: Tensor | None,
    rng: Tensor | None,
    stream: int,
    offset_noise: float,
    target: str,
    loss: str,
    huber_delta: float,
) -> Tensor:
    """g_pred = g[n] / E loss'(pred - target)"""
    d = pred.to(_compute_dtype(pred)) - _target(pred, x0, t, table, noise, rng, stream, offset_noise, target)
    if loss == "mse":
        slope = 2.0 * d
    else:
        limit = torch.tensor(1.0 if loss == "l1" else huber_delta, dtype=d.dtype)
        slope = torch.where(d > 0, limit, torch.where(d < 0, -limit, d))
        if loss == "huber":
            slope = torch.where(d.abs() < limit, d, slope)
    scale = g.to(d.dtype) / torch.tensor(float(pred.shape[1:].numel()), dtype=d.dtype, device=d.device)
    return _into(_per_sample(scale, d) * slope, pred, pred.dtype)
