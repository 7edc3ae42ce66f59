"""One benchmark case per op: the op as a user calls it, the same in eager PyTorch, and the bytes it must move.

Eager and compiled baselines draw their noise with torch.randn_like, as a user's own code would; the losses find it
stored. op_speed.py checks and measures them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast import ops
from ddpm_fast.noise import make_rng

CHANNELS, GROUPS, EDGE = 16, 4, 32  # of one sample; --elements decides how many samples
T = 1000


@dataclass
class Inputs:
    """What every case is built from."""

    x: Tensor
    y: Tensor
    noise: Tensor  # float32
    t: Tensor
    table: Tensor
    steps: Tensor
    t_of_row: Tensor
    row: Tensor
    rng: Tensor
    weight: Tensor
    bias: Tensor
    temb: Tensor

    @classmethod
    def make(cls, n: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        shape = (n, CHANNELS, EDGE, EDGE)
        generator = torch.Generator(device).manual_seed(0)

        def rand(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype)

        signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).sqrt()
        return cls(
            x=rand(*shape),
            y=rand(*shape),
            noise=rand(*shape, dtype=torch.float32),
            t=(torch.arange(n, device=device) * 37) % T,
            table=torch.stack([signal, (1 - signal**2).sqrt()], 1).float().to(device),
            steps=torch.tensor([[1.2, 0.7, 0.6, 0.38, 0.0, 0.0, 0.2, 1.0]], device=device),
            t_of_row=torch.tensor([500], dtype=torch.int32, device=device),
            row=torch.zeros(1, dtype=torch.int64, device=device),
            rng=make_rng(1, 0, device),
            weight=rand(CHANNELS),
            bias=rand(CHANNELS),
            temb=rand(n, CHANNELS),
        )


@dataclass(frozen=True)
class Case:
    """An op as a user calls it, the same in eager PyTorch, and the bytes one element must move.

    checked: how many of its results are compared with the reference's.
    """

    name: str
    fast: Callable[[Inputs], object]
    eager: Callable[[Inputs], object]
    bytes_per_element: Callable[[int], float]  # of the storage dtype's size
    exact: bool = True
    atol: float = 1e-7  # of the check, where the op is not exact
    checked: int = 1


def _grads(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def _eager_q_sample(i: Inputs, noise: Tensor | None = None) -> Tensor:
    return _eager_q_sample_and_eps(i, noise)[0]


def _eager_q_sample_and_eps(i: Inputs, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    eps = torch.randn_like(i.x) if noise is None else noise
    signal, sigma = i.table[i.t, 0].view(-1, 1, 1, 1), i.table[i.t, 1].view(-1, 1, 1, 1)
    return (signal * i.x + sigma * eps).to(i.x.dtype), eps


def _eager_step(i: Inputs) -> Tensor:
    a, b, c1, c2, _, _, s, bound = i.steps[0].unbind()
    x0 = (a * i.noise - b * i.y).clamp(-bound, bound)
    return c1 * x0 + c2 * i.noise + s * torch.randn_like(i.noise)


def _eager_add(i: Inputs, h: Tensor) -> Tensor:
    return F.silu(h + i.bias[None, :, None, None]) + i.temb[:, :, None, None]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _fast_add_backward(i: Inputs) -> object:
    h, bias, temb = _leaf(i.x), _leaf(i.bias), _leaf(i.temb)
    return torch.autograd.grad(ops.add_bias_temb(h, bias, temb, act="silu"), (h, bias, temb), i.y)


def _eager_add_backward(i: Inputs) -> object:
    h, bias, temb = _leaf(i.x), _leaf(i.bias), _leaf(i.temb)
    y = F.silu(h + bias[None, :, None, None]) + temb[:, :, None, None]
    return torch.autograd.grad(y, (h, bias, temb), i.y)


def _fast_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, beta, bias, temb = leaves or (i.x, i.weight, i.bias, i.bias, i.temb)
    return ops.group_norm_silu(h, GROUPS, weight, beta, bias=bias, temb=temb)


def _eager_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, beta, bias, temb = leaves or (i.x, i.weight, i.bias, i.bias, i.temb)
    return F.silu(F.group_norm(h + bias[None, :, None, None] + temb[:, :, None, None], GROUPS, weight, beta))


def _norm_backward(i: Inputs, function: Callable[..., Tensor]) -> object:
    leaves = [_leaf(value) for value in (i.x, i.weight, i.bias, i.bias, i.temb)]
    return torch.autograd.grad(function(i, *leaves), leaves, i.y)


# As in lucidrains' blocks: a norm over channels, scale and shift of the time embedding, SiLU, and the block's input.
def _fast_rms_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, scale, shift, residual = leaves or (i.x, i.weight, i.temb, i.temb, i.y)
    return ops.rms_norm_silu(h, weight, scale=scale, shift=shift, residual=residual)


def _eager_rms_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, scale, shift, residual = leaves or (i.x, i.weight, i.temb, i.temb, i.y)
    xhat = F.normalize(h, dim=1) * weight[None, :, None, None] * CHANNELS**0.5
    return F.silu(xhat * (scale[:, :, None, None] + 1) + shift[:, :, None, None]) + residual


def _rms_norm_backward(i: Inputs, function: Callable[..., Tensor]) -> object:
    leaves = [_leaf(value) for value in (i.x, i.weight, i.temb, i.temb, i.y)]
    return torch.autograd.grad(function(i, *leaves), leaves, i.y)


# As in the tutorial's blocks, in training: the norm takes the statistics of the batch.
def _fast_batch_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, beta, temb = leaves or (i.x, i.weight, i.bias, i.temb)
    return ops.batch_norm_silu(h, weight, beta, temb=temb)


def _eager_batch_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, beta, temb = leaves or (i.x, i.weight, i.bias, i.temb)
    return F.silu(F.batch_norm(h, None, None, weight, beta, training=True)) + temb[:, :, None, None]


def _batch_norm_backward(i: Inputs, function: Callable[..., Tensor]) -> object:
    leaves = [_leaf(value) for value in (i.x, i.weight, i.bias, i.temb)]
    return torch.autograd.grad(function(i, *leaves), leaves, i.y)


def _fast_loss_backward(i: Inputs) -> object:
    pred = _leaf(i.x)
    return _grads(ops.noise_mse(pred, rng=i.rng), pred)


def _eager_loss_backward(i: Inputs) -> object:
    pred = _leaf(i.x)
    return _grads(F.mse_loss(pred.float(), i.noise), pred)


CASES = [
    Case(
        "normal",
        lambda i: ops.normal(i.x.shape[0], i.x.shape[1:], rng=i.rng, out=i.y),
        lambda i: torch.randn_like(i.x),
        lambda size: size,
    ),
    Case(
        "random_bits",
        lambda i: ops.random_bits(i.x.shape[0], i.x.shape[1:], rng=i.rng),
        lambda i: torch.randint(0, 2**32, i.x.shape, device=i.x.device),
        lambda size: 8,
    ),
    Case("q_sample", lambda i: ops.q_sample(i.x, i.t, i.table, rng=i.rng), _eager_q_sample, lambda size: 2 * size),
    Case(
        "q_sample, eps stored",
        lambda i: ops.q_sample(i.x, i.t, i.table, rng=i.rng, target="eps"),
        _eager_q_sample_and_eps,
        lambda size: 3 * size,
        checked=2,
    ),
    Case(
        "q_sample, noise given",
        lambda i: ops.q_sample(i.x, i.t, i.table, noise=i.noise),
        lambda i: _eager_q_sample(i, i.noise),
        lambda size: 2 * size + 4,
    ),
    Case(
        "ddpm_step",
        # In place, again and again: its row clips and contracts, so the state stays bounded.
        lambda i: ops.ddpm_step(i.noise, i.y, i.steps, i.t_of_row, i.row, i.rng),
        _eager_step,
        lambda size: 8 + size,  # x read and written, m read
    ),
    Case(
        "add_bias_temb",
        lambda i: ops.add_bias_temb(i.x, i.bias, i.temb, act="silu"),
        lambda i: _eager_add(i, i.x),
        lambda size: 2 * size,
    ),
    Case("add_bias_temb, backward", _fast_add_backward, _eager_add_backward, lambda size: 5 * size),
    # Both read the images twice; the second time an image is in the cache.
    Case("group_norm_silu", _fast_norm, _eager_norm, lambda size: 2 * size, exact=False, atol=5e-6),
    Case(
        "group_norm_silu, backward",
        lambda i: _norm_backward(i, _fast_norm),
        lambda i: _norm_backward(i, _eager_norm),
        lambda size: 5 * size,
        exact=False,
        atol=5e-6,
    ),
    Case("rms_norm_silu", _fast_rms_norm, _eager_rms_norm, lambda size: 3 * size, exact=False, atol=5e-6),
    Case(
        "rms_norm_silu, backward",
        lambda i: _rms_norm_backward(i, _fast_rms_norm),
        lambda i: _rms_norm_backward(i, _eager_rms_norm),
        lambda size: 6 * size,  # forward: h, residual, y; backward: g, h, g_h (the residual's gradient is g)
        exact=False,
        atol=5e-6,
    ),
    Case("batch_norm_silu", _fast_batch_norm, _eager_batch_norm, lambda size: 3 * size, exact=False, atol=5e-6),
    Case(
        "batch_norm_silu, backward",
        lambda i: _batch_norm_backward(i, _fast_batch_norm),
        lambda i: _batch_norm_backward(i, _eager_batch_norm),
        lambda size: 8 * size,  # forward: h twice, y; backward: g and h twice, g_h
        exact=False,
        atol=5e-6,
    ),
    Case(
        "noise_mse",
        lambda i: ops.noise_mse(i.x, rng=i.rng),
        lambda i: F.mse_loss(i.x.float(), i.noise),  # keeps the noise in memory, which ours draws again
        lambda size: size,
        exact=False,
    ),
    Case(
        "noise_mse, noise given",
        lambda i: ops.noise_mse(i.x, noise=i.noise),
        lambda i: F.mse_loss(i.x.float(), i.noise),
        lambda size: size + 4,
        exact=False,
    ),
    Case("noise_mse, backward", _fast_loss_backward, _eager_loss_backward, lambda size: 3 * size, exact=False),
]
