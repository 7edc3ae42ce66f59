"""Gradients of the ops that are trained through: q_sample, add_bias_temb, the norms and noise_mse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.ddpm_fast


def _q_sample_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x0, t, table, noise, _rng, _stream, _offset, target, _dtype = inputs
    ctx.save_for_backward(t, table)
    ctx.target = target
    ctx.x0_dtype = x0.dtype
    ctx.has_noise = noise is not None
    ctx.set_materialize_grads(False)


def _q_sample_backward(ctx: Any, g_x_t: Tensor | None, g_target: Tensor | None) -> tuple[Any, ...]:
    t, table = ctx.saved_tensors
    need_x0, need_noise = ctx.needs_input_grad[0], ctx.has_noise and ctx.needs_input_grad[3]
    if ctx.target == "none":
        g_target = None
    if (g_x_t is None and g_target is None) or not (need_x0 or need_noise):
        return (None,) * 9
    g_x0, g_noise = _ops.q_sample_backward.default(
        g_x_t, g_target, t, table, ctx.target, ctx.x0_dtype, need_x0, need_noise
    )
    return (g_x0 if need_x0 else None, None, None, g_noise if need_noise else None, *(None,) * 5)


def _add_bias_temb_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, bias, temb, act = inputs
    # The identity needs neither h nor bias again; SiLU recomputes h + bias instead of storing it.
    ctx.save_for_backward(*((h, bias) if act == "silu" else (None, None)))
    ctx.act = act
    ctx.bias_like = None if bias is None else (bias.shape, bias.dtype)
    ctx.temb_like = None if temb is None else (temb.shape, temb.dtype)


def _add_bias_temb_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    h, bias = ctx.saved_tensors
    need_h, need_bias, need_temb, _ = ctx.needs_input_grad
    need_bias, need_temb = need_bias and ctx.bias_like is not None, need_temb and ctx.temb_like is not None
    identity = ctx.act == "none"
    g_h, gh_sum, g_sum = g, None, None
    if need_bias or need_temb or not identity:
        g_h, gh_sum, g_sum = _ops.add_bias_temb_backward.default(
            g, h, bias, ctx.act, need_h and not identity, need_bias, need_temb
        )
    g_bias = gh_sum.sum(0).to(ctx.bias_like[1]) if need_bias and gh_sum is not None else None
    g_temb = g_sum.to(ctx.temb_like[1]) if need_temb and g_sum is not None else None
    if not need_h:
        return None, g_bias, g_temb, None
    return g if identity else g_h, g_bias, g_temb, None


def _like(sums: Tensor, value: Tensor) -> Tensor:
    """[N, C] sums as the gradient of ``value`` [C] or [N, C]."""
    return (sums.sum(0) if value.dim() == 1 else sums).to(value.dtype)


def _batch_norm_silu_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    h, temb, weight, bias, running_mean, _running_var, eps, act = inputs
    _, mean, var = output
    ctx.save_for_backward(h, weight, bias, mean, var)
    ctx.rest = (running_mean is None, eps, act)
    ctx.temb_dtype = None if temb is None else temb.dtype
    ctx.mark_non_differentiable(mean, var)
    ctx.set_materialize_grads(False)


def _batch_norm_silu_backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Any, ...]:
    h, weight, bias, mean, var = ctx.saved_tensors
    need_h, need_temb, need_weight, need_bias = ctx.needs_input_grad[:4]
    need_temb = need_temb and ctx.temb_dtype is not None
    if g is None or not any((need_h, need_temb, need_weight, need_bias)):
        return (None,) * 8
    g_h, g_temb, d_weight, d_bias = _ops.batch_norm_silu_backward.default(
        g, h, weight, bias, mean, var, *ctx.rest, need_h, need_temb
    )
    return (
        g_h if need_h else None,
        g_temb.to(ctx.temb_dtype) if need_temb else None,
        d_weight.to(weight.dtype) if need_weight and weight is not None else None,
        d_bias.to(bias.dtype) if need_bias and bias is not None else None,
        *(None,) * 4,
    )


def _group_norm_silu_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, num_groups, _eps, act = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*tensors, mean, rstd)
    ctx.rest = (num_groups, act)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _group_norm_silu_backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Any, ...]:
    h, bias, temb, weight, beta, mean, rstd = ctx.saved_tensors
    given = (h, bias, temb, weight, beta)
    need_h, need_bias, need_temb, need_weight, need_beta = (
        value is not None and needed for value, needed in zip(given, ctx.needs_input_grad[:5], strict=True)
    )
    if g is None or not any((need_h, need_bias, need_temb, need_weight, need_beta)):
        return (None,) * 8
    needed = (need_h, need_bias or need_temb, need_weight, need_beta)
    g_h, g_sum, d_weight, d_beta = _ops.group_norm_silu_backward.default(
        g, h, bias, temb, weight, beta, mean, rstd, *ctx.rest, *needed
    )
    return (
        g_h if need_h else None,
        _like(g_sum, bias) if need_bias else None,
        _like(g_sum, temb) if need_temb else None,
        _like(d_weight, weight) if need_weight else None,
        _like(d_beta, beta) if need_beta else None,
        *(None,) * 3,
    )


def _rms_norm_silu_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, weight, beta, _residual, eps, act = inputs
    # The norm of each place is taken again: h is read in any case.
    ctx.save_for_backward(h, weight, beta)
    ctx.rest = (eps, act)


def _rms_norm_silu_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    h, weight, beta = ctx.saved_tensors
    need_h, need_weight, need_beta, need_residual = ctx.needs_input_grad[:4]
    need_weight, need_beta = need_weight and weight is not None, need_beta and beta is not None
    g_h, d_weight, d_beta = None, None, None
    if need_h or need_weight or need_beta:
        g_h, d_weight, d_beta = _ops.rms_norm_silu_backward.default(
            g, h, weight, beta, *ctx.rest, need_h, need_weight, need_beta
        )
    return (
        g_h if need_h else None,
        _like(d_weight, weight) if need_weight and d_weight is not None else None,
        _like(d_beta, beta) if need_beta and d_beta is not None else None,
        g if need_residual else None,
        *(None,) * 2,
    )


def _noise_mse_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:6])
    ctx.rest = inputs[6:]


def _noise_mse_backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    g_pred = _ops.noise_mse_backward.default(g, *ctx.saved_tensors, *ctx.rest) if ctx.needs_input_grad[0] else None
    return (g_pred, *(None,) * 10)


def register(library: torch.library.Library) -> None:
    """Attach the formulas to the declared ops."""
    for name, backward, context in (
        ("q_sample", _q_sample_backward, _q_sample_context),
        ("add_bias_temb", _add_bias_temb_backward, _add_bias_temb_context),
        ("batch_norm_silu", _batch_norm_silu_backward, _batch_norm_silu_context),
        ("group_norm_silu", _group_norm_silu_backward, _group_norm_silu_context),
        ("rms_norm_silu", _rms_norm_silu_backward, _rms_norm_silu_context),
        ("noise_mse", _noise_mse_backward, _noise_mse_context),
    ):
        torch.library.register_autograd(f"ddpm_fast::{name}", backward, setup_context=context, lib=library)
