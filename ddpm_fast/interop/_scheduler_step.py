"""One step of a drop-in scheduler: a row of coefficients put to work by the fused op. Needs no diffusers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import ops
from ..backends import native, reference, resolve
from ..sampling.thresholding import dynamic_threshold
from ._scheduler_rows import Placed, Rows

STORED = (torch.float32, torch.bfloat16, torch.float16)

# Draws the noise of a step for a model output: (noise, None) from torch's generator or (None, rng), our keyed noise.
Draw = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]


def is_plain(rows: Rows, m: Tensor, x: Tensor) -> bool:
    """Whether `plain_step` can take the step: float32, contiguous, nothing learned, traced or trained through."""
    return (
        not rows.special
        and type(x) is Tensor
        and type(m) is Tensor
        and x.dtype is torch.float32
        and m.dtype is torch.float32
        and x.shape == m.shape
        and x.is_contiguous()
        and m.is_contiguous()
        and x.device == m.device
        and x.numel() > 0
        and not ((x.requires_grad or m.requires_grad) and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and resolve("ddpm_step", x) is native.ddpm_step
    )


def plain_step(
    placed: Placed, row: int, m: Tensor, x: Tensor, noise: Tensor | None, rng: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(x_prev, x0) as new tensors, where `is_plain`: straight to the compiled op, which host time is spent on here."""
    x_prev, x0 = x.clone(), torch.empty_like(x)
    native.ddpm_step_row(x_prev, m, placed.addresses, row, noise, rng, x0)
    return x_prev, x0


def any_step(rows: Rows, row: int, m: Tensor, x: Tensor, draw: Draw | None) -> tuple[Tensor, Tensor]:
    """(x_prev, x0) as new tensors in the dtypes that diffusers' arithmetic gives, computed in float32 or float64.

    m: the network's output, of the shape of x or broadcasting with it; with a learned variance twice its channels.
    draw: None where the step adds no noise. Differentiable in m, x and the noise.
    """
    learned = None
    if rows.learned:
        if m.dim() < 2 or m.shape[1] != 2 * x.shape[1]:
            if draw is not None:
                raise TypeError(
                    f"variance_type={rows.learned!r} needs a model that also gives the variance: model_output must "
                    f"have {2 * x.shape[1]} channels, twice those of sample, got {tuple(m.shape)}"
                )
        else:
            m, learned = m.split(x.shape[1], dim=1)
    dtype = m.dtype if m.dtype == x.dtype else torch.promote_types(m.dtype, x.dtype)
    dtype = dtype if dtype.is_floating_point else torch.float32
    x0_dtype = m.dtype if rows.x0_is_output else dtype
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    shape = x.shape if m.shape == x.shape else torch.broadcast_shapes(m.shape, x.shape)
    noise, rng = draw(m) if draw is not None else (None, None)

    def seen(value: Tensor, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
        """As the op takes images: of state_dtype or one of dtypes, samples first, at least one more dimension."""
        value = value if value.dtype in dtypes else value.to(state_dtype)
        value = value if value.shape == shape else value.expand(shape)
        return value if len(shape) > 1 else value.reshape((1,) * (2 - len(shape)) + shape)

    placed = rows.on(x.device)
    output, state = seen(m, STORED), seen(x)
    if state.dtype == x.dtype or state.shape != x.shape:  # else it is a copy already
        state = state.clone()
    threshold = None
    if rows.threshold is not None:
        a, b = placed.table[row, 0], placed.table[row, 1]
        threshold = dynamic_threshold(a * state - b * output, *rows.threshold)
    logvar = log_range = None
    if learned is not None and draw is not None:
        # The variance itself, or where its logarithm lies in the row's range.
        logvar, log_range = (
            seen(learned if rows.log_range is not None else learned.to(state_dtype).log()),
            placed.log_range,
        )
    noise = seen(noise) if noise is not None else None
    x0 = torch.empty_like(state)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (output, state, noise, logvar)):
        reference.ddpm_step(
            state, output, placed.table, placed.t_of_row, placed.row(row), rng, noise, None, None, None, logvar,
            log_range, threshold, x0, None, None,
        )  # fmt: skip
    else:
        ops.ddpm_step(
            state, output, placed.table, placed.t_of_row, placed.row(row), rng,
            noise=noise, logvar=logvar, logvar_range=log_range, threshold=threshold, x0_out=x0,
        )  # fmt: skip
    if len(shape) < 2:
        state, x0 = state.reshape(shape), x0.reshape(shape)
    return state.to(dtype), x0.to(x0_dtype)
