"""Every op declared once: its schema (the table below), its fake for tracing, and the dispatch to a backend.

``(a!)`` marks what an op writes. The public functions in ``ddpm_fast.ops`` check their arguments and call these;
backends implement them under the same names and argument order and may rely on the checks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends import resolve
from ddpm_fast.ops import _autograd

SCHEMAS = {
    "normal": "(Tensor(a!) out, Tensor rng, int stream) -> ()",
    "random_bits": "(Tensor(a!) out, Tensor rng, int stream) -> ()",
    "q_sample": (
        "(Tensor x0, Tensor t, Tensor table, Tensor? noise, Tensor? rng, int stream, float offset_noise, "
        "str target, ScalarType dtype) -> (Tensor x_t, Tensor target)"
    ),
    "q_sample_backward": (
        "(Tensor? g_x_t, Tensor? g_target, Tensor t, Tensor table, str target, ScalarType dtype, "
        "bool need_x0, bool need_noise) -> (Tensor g_x0, Tensor g_noise)"
    ),
    "add_bias_temb": "(Tensor h, Tensor? bias, Tensor? temb, str act) -> Tensor",
    "add_bias_temb_backward": (
        "(Tensor g, Tensor? h, Tensor? bias, str act, bool need_h, bool need_bias, bool need_temb) "
        "-> (Tensor g_h, Tensor gh_sum, Tensor g_sum)"
    ),
    "batch_norm_silu": (
        "(Tensor h, Tensor? temb, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, float eps, "
        "str act) -> (Tensor y, Tensor mean, Tensor var)"
    ),
    "batch_norm_silu_backward": (
        "(Tensor g, Tensor h, Tensor? weight, Tensor? bias, Tensor mean, Tensor var, bool of_batch, float eps, "
        "str act, bool need_h, bool need_temb) -> (Tensor g_h, Tensor g_temb, Tensor d_weight, Tensor d_bias)"
    ),
    "group_norm_silu": (
        "(Tensor h, Tensor? bias, Tensor? temb, Tensor? weight, Tensor? beta, int num_groups, float eps, str act) "
        "-> (Tensor y, Tensor mean, Tensor rstd)"
    ),
    "group_norm_silu_backward": (
        "(Tensor g, Tensor h, Tensor? bias, Tensor? temb, Tensor? weight, Tensor? beta, Tensor mean, Tensor rstd, "
        "int num_groups, str act, bool need_h, bool need_sum, bool need_weight, bool need_beta) "
        "-> (Tensor g_h, Tensor g_sum, Tensor d_weight, Tensor d_beta)"
    ),
    "rms_norm_silu": ("(Tensor h, Tensor? weight, Tensor? beta, Tensor? residual, float eps, str act) -> Tensor"),
    "rms_norm_silu_backward": (
        "(Tensor g, Tensor h, Tensor? weight, Tensor? beta, float eps, str act, "
        "bool need_h, bool need_weight, bool need_beta) -> (Tensor g_h, Tensor d_weight, Tensor d_beta)"
    ),
    "ddpm_step": (
        "(Tensor(a!) x, Tensor m, Tensor table, Tensor t_of_row, Tensor row, Tensor? rng, Tensor? noise, "
        "Tensor? m_uncond, Tensor? guidance, Tensor? x0_prev, Tensor? logvar, Tensor? logvar_range, Tensor? threshold, "
        "Tensor(b!)? x0_out, Tensor(c!)? copy_out, Tensor(d!)? bad_row) -> ()"
    ),
    "noise_mse": (
        "(Tensor pred, Tensor? x0, Tensor? t, Tensor? table, Tensor? noise, Tensor? rng, int stream, "
        "float offset_noise, str target, str loss, float huber_delta) -> Tensor"
    ),
    "noise_mse_backward": (
        "(Tensor g, Tensor pred, Tensor? x0, Tensor? t, Tensor? table, Tensor? noise, Tensor? rng, int stream, "
        "float offset_noise, str target, str loss, float huber_delta) -> Tensor"
    ),
}

_library = torch.library.Library("ddpm_fast", "DEF")


def _run(name: str, *args: Any) -> Any:
    """The registered implementation of every op on every device: ask the resolver, call what it names."""
    first = args[0] if args[0] is not None else args[1]
    return resolve(name, first)(*args)


def _nothing(like: Tensor) -> Tensor:
    """What stands in a result tuple for an output that was not asked for."""
    return like.new_empty(0)


def _fake_fill(out: Tensor, rng: Tensor, stream: int) -> None:
    return None


def _fake_q_sample(
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
    x_t = torch.empty_like(x0, dtype=dtype)
    return x_t, torch.empty_like(x_t) if target != "none" else _nothing(x_t)


def _fake_q_sample_backward(
    g_x_t: Tensor | None,
    g_target: Tensor | None,
    t: Tensor,
    table: Tensor,
    target: str,
    dtype: torch.dtype,
    need_x0: bool,
    need_noise: bool,
) -> tuple[Tensor, Tensor]:
    g = g_x_t if g_x_t is not None else g_target
    assert g is not None
    noise_dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    g_x0 = torch.empty_like(g, dtype=dtype) if need_x0 else _nothing(g)
    return g_x0, torch.empty_like(g, dtype=noise_dtype) if need_noise else _nothing(g)


def _fake_add_bias_temb(h: Tensor, bias: Tensor | None, temb: Tensor | None, act: str) -> Tensor:
    return torch.empty_like(h)


def _fake_add_bias_temb_backward(
    g: Tensor, h: Tensor | None, bias: Tensor | None, act: str, need_h: bool, need_bias: bool, need_temb: bool
) -> tuple[Tensor, Tensor, Tensor]:
    sum_dtype = torch.float64 if g.dtype == torch.float64 else torch.float32
    sums = g.shape[:2]
    return (
        torch.empty_like(h if h is not None else g) if need_h else _nothing(g),
        g.new_empty(sums, dtype=sum_dtype) if need_bias else _nothing(g),
        g.new_empty(sums, dtype=sum_dtype) if need_temb else _nothing(g),
    )


def _fake_batch_norm_silu(h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    mean, var = (h.new_empty(h.shape[1:2], dtype=dtype) for _ in range(2))
    return torch.empty_like(h), mean, var


def _fake_batch_norm_silu_backward(g: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_h, need_temb = rest[-2:]
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    d_weight, d_bias = (h.new_empty(h.shape[1:2], dtype=dtype) for _ in range(2))
    g_temb = h.new_empty(h.shape[:2], dtype=dtype) if need_temb else _nothing(g)
    return torch.empty_like(h) if need_h else _nothing(g), g_temb, d_weight, d_bias


def _fake_group_norm_silu(
    h: Tensor,
    bias: Tensor | None,
    temb: Tensor | None,
    weight: Tensor | None,
    beta: Tensor | None,
    num_groups: int,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    mean, rstd = (h.new_empty((h.shape[0], num_groups), dtype=dtype) for _ in range(2))
    return torch.empty_like(h), mean, rstd


def _fake_norm_backward(g: Tensor, h: Tensor, need_h: bool, *need_sums: bool) -> tuple[Tensor, ...]:
    dtype = torch.float64 if h.dtype == torch.float64 else torch.float32
    sums = (g.new_empty(h.shape[:2], dtype=dtype) if needed else _nothing(g) for needed in need_sums)
    return (torch.empty_like(h) if need_h else _nothing(g), *sums)


def _fake_group_norm_silu_backward(g: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_norm_backward(g, h, *rest[-4:])


def _fake_rms_norm_silu(h: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(h)


def _fake_rms_norm_silu_backward(g: Tensor, h: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_norm_backward(g, h, *rest[-3:])


def _fake_ddpm_step(x: Tensor, m: Tensor, *rest: Any) -> None:
    return None


def _fake_noise_mse(pred: Tensor, *rest: Any) -> Tensor:
    return pred.new_empty(pred.shape[:1], dtype=torch.float64 if pred.dtype == torch.float64 else torch.float32)


def _fake_noise_mse_backward(g: Tensor, pred: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(pred)


FAKES: dict[str, Callable[..., Any]] = {
    "normal": _fake_fill,
    "random_bits": _fake_fill,
    "q_sample": _fake_q_sample,
    "q_sample_backward": _fake_q_sample_backward,
    "add_bias_temb": _fake_add_bias_temb,
    "add_bias_temb_backward": _fake_add_bias_temb_backward,
    "batch_norm_silu": _fake_batch_norm_silu,
    "batch_norm_silu_backward": _fake_batch_norm_silu_backward,
    "group_norm_silu": _fake_group_norm_silu,
    "group_norm_silu_backward": _fake_group_norm_silu_backward,
    "rms_norm_silu": _fake_rms_norm_silu,
    "rms_norm_silu_backward": _fake_rms_norm_silu_backward,
    "ddpm_step": _fake_ddpm_step,
    "noise_mse": _fake_noise_mse,
    "noise_mse_backward": _fake_noise_mse_backward,
}

for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, partial(_run, _name), _key)
    torch.library.register_fake(f"ddpm_fast::{_name}", FAKES[_name], lib=_library)

_autograd.register(_library)
