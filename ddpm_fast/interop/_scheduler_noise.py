"""`add_noise` and `get_velocity` of the drop-in schedulers. Needs no diffusers."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import ops
from ..backends import resolve
from ..schedule import Schedule


def noised(schedule: Schedule, x0: Tensor, noise: Tensor, timesteps: Tensor, *, velocity: bool = False) -> Tensor:
    """x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps; with velocity v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0.

    x0 and noise broadcast, and with timesteps of any shape, flattened, along the first dimension. The result has the
    dtype that x0 and noise promote to, rounded once from float32. Differentiable in both. Raises IndexError for
    timesteps outside the schedule (on a GPU the samples become NaN) or of no integer dtype, RuntimeError for shapes
    that do not broadcast.
    """
    table, device = schedule.noising_table(x0.device), x0.device
    t = _inside(timesteps.to(device).flatten(), len(table))
    if velocity:  # the same combination of the two, each in the other's place
        table, x0, noise = _velocity_table(table), noise.to(device), x0
    dtype = x0.dtype if x0.dtype == noise.dtype else torch.promote_types(x0.dtype, noise.dtype)
    dtype = dtype if dtype.is_floating_point else torch.float32
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if wide == torch.float64 or not x0.is_floating_point():
        x0 = x0.to(wide)
    eps, dims = noise.to(device=device, dtype=wide), max(x0.dim(), noise.dim(), 1)
    shape = x0.shape
    if dims < 2 or not shape == eps.shape == t.shape + shape[1:]:
        shape = torch.broadcast_shapes(t.shape + (1,) * (dims - 1), shape, eps.shape)
        x0, eps, t = x0.expand(shape), eps.expand(shape), t.expand(shape[0]).contiguous()
        if dims == 1:  # the op takes samples of at least one dimension
            x0, eps = x0[:, None], eps[:, None]
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and (x0.requires_grad or eps.requires_grad)):
        return ops.q_sample(x0, t, table, noise=eps, dtype=dtype).reshape(shape)
    # All that the op would check is known to hold.
    x_t: Tensor = resolve("q_sample", x0)(x0, t, table, eps, None, 0, 0.0, "none", dtype)[0]
    return x_t.reshape(shape)


@functools.lru_cache(maxsize=8)
def _velocity_table(table: Tensor) -> Tensor:
    """sqrt(ab_t) and -sqrt(1 - ab_t), for `Schedule.noising_table`, which is one tensor as long as it is needed."""
    with torch.inference_mode(False):
        return table * torch.tensor([1.0, -1.0], device=table.device)


def _inside(t: Tensor, T: int) -> Tensor:
    """t as int64, its values checked where the host has them."""
    if t.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise IndexError(f"timesteps must be integers, got {t.dtype}")
    if t.is_cpu and t.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in t.aminmax())
        if low < 0 or high >= T:
            raise IndexError(f"timesteps must be in 0..{T - 1}, got {low if low < 0 else high}")
    return t.to(torch.int64)
