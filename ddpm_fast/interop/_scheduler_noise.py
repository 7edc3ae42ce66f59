"""`add_noise` and `get_velocity` of the drop-in schedulers. Needs no diffusers."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..schedule import Schedule


def noised(schedule: Schedule, x0: Tensor, noise: Tensor, timesteps: Tensor, *, velocity: bool = False) -> Tensor:
    """x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps; with velocity v = sqrt(ab_t) eps - sqrt(1 - ab_t) x0.

    x0 and noise broadcast, and with timesteps of any shape, flattened, along the first dimension. The result has the
    dtype that x0 and noise promote to, rounded once from float32. Raises IndexError for timesteps outside the schedule
    (on a GPU the samples become NaN) or of no integer dtype, RuntimeError for shapes that do not broadcast.
    """
    dtype = torch.promote_types(x0.dtype, noise.dtype)
    dtype = dtype if dtype.is_floating_point else torch.float32
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    t = _inside(timesteps.to(x0.device).flatten(), len(schedule))
    dims = max(x0.dim(), noise.dim(), 1)
    shape = torch.broadcast_shapes(t.shape + (1,) * (dims - 1), x0.shape, noise.shape)
    if wide == torch.float64 or not x0.is_floating_point():
        x0 = x0.to(wide)
    x0, eps = x0.expand(shape), noise.to(device=x0.device, dtype=wide).expand(shape)
    if dims == 1:  # the op sees samples of at least one dimension
        x0, eps = x0[:, None], eps[:, None]
    table = schedule.noising_table(x0.device)
    t = t.expand(shape[0])
    result = (
        ops.q_sample(x0, t, table, noise=eps, target="v", dtype=dtype)[1]
        if velocity
        else ops.q_sample(x0, t, table, noise=eps, dtype=dtype)
    )
    return result.reshape(shape)


def _inside(t: Tensor, T: int) -> Tensor:
    """t as int64, its values checked where the host has them."""
    if t.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise IndexError(f"timesteps must be integers, got {t.dtype}")
    if t.is_cpu and t.numel() and not torch.compiler.is_compiling():
        low, high = (int(value) for value in t.aminmax())
        if low < 0 or high >= T:
            raise IndexError(f"timesteps must be in 0..{T - 1}, got {low if low < 0 else high}")
    return t.to(torch.int64)
