"""The arguments of `Sampler.sample` and `Sampler.stream`, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tables.steps import COLUMNS, StepTable

Noise = Tensor | Callable[[int, int], Tensor]
Labels = int | Sequence[int] | Tensor


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int in low..high, else TypeError or ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {limits}, got {value}")
    return int(value)


def seed_of(seed: int | None) -> int:
    """The seed itself, or one drawn from torch's default CPU generator (so that torch.manual_seed governs it)."""
    if seed is None:
        return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu"))
    return whole("seed", seed, 0, 2**64 - 1)


def start_state(x: Tensor | None, start: int, n: int, shape: tuple[int, ...], device: torch.device) -> Tensor | None:
    """x, given as the state before row `start`, as float32; None when x_T is to be drawn."""
    if x is None:
        if start:
            raise ValueError(f"start={start} resumes a run and needs x, the state after {start} rows")
        return None
    return _state("x", x, n, shape, device)


def history_of(
    x0_prev: Tensor | None,
    steps: StepTable,
    self_condition: bool,
    start: int,
    n: int,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor | None:
    """x0_prev, the x0 of row start - 1, as float32; None where no row to come reads it."""
    if x0_prev is None:
        multistep = start < len(steps) and steps.coefficients[start, COLUMNS.index("c4")] != 0.0
        if multistep or (self_condition and 0 < start < len(steps)):
            kind, hint = ("multistep", "") if multistep else ("self-conditioned", ", zeros where there is none")
            raise ValueError(
                f"start={start} resumes a {kind} run and needs x0_prev, the x0 of row {start - 1}{hint}; "
                "step.state() of a stream holds it beside x"
            )
        return None
    looks_back = steps.needs_history or self_condition
    if not (looks_back and start):
        why = "start=0 has no row before it" if looks_back else "no step of this sampler looks back"
        raise ValueError(
            'x0_prev is for resuming method="dpmsolver++" of order 2 or a self-conditioned model, '
            f"and {why}; leave it out"
        )
    return _state("x0_prev", x0_prev, n, shape, device)


def _state(name: str, x: Tensor, n: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.shape != (n, *shape):
        raise ValueError(f"{name} must have shape {(n, *shape)}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got {x.dtype}")
    if x.device != device:
        raise ValueError(f"{name} must be on {device}, where the sampler runs, got {x.device}")
    if not bool(torch.isfinite(x).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity in it")
    return x.detach().float()


def given_noise(
    noise: Noise | None, start: int, steps: int, n: int, shape: tuple[int, ...], device: torch.device
) -> Callable[[int, int], Tensor] | None:
    """noise as a function (row, t) -> the tensor of that row; None when it is to be drawn from the seed."""
    if noise is None:
        return None
    if isinstance(noise, Tensor):
        allowed = {steps: 0, steps - start: start}
        if noise.dim() == 0 or noise.shape[0] not in allowed or noise.shape[1:] != (n, *shape):
            lengths = " or ".join(str((length, n, *shape)) for length in allowed)
            raise ValueError(f"noise must have shape {lengths}, one entry per row, got {tuple(noise.shape)}")
        check_noise(noise[0] if len(noise) else noise.new_empty(n, *shape), n, shape, device)
        first = allowed[noise.shape[0]]
        return lambda row, t: noise[row - first]
    if not callable(noise):
        raise TypeError(f"noise must be a tensor or a function (row, t) -> tensor, got {type(noise).__name__}")
    return noise


def check_noise(z: Any, n: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """One row's noise, or the error that names what is wrong with it."""
    if not isinstance(z, Tensor):
        raise TypeError(f"noise(row, t) must return a tensor, got {type(z).__name__}")
    if z.shape != (n, *shape):
        raise ValueError(f"noise of one row must have shape {(n, *shape)}, got {tuple(z.shape)}")
    if not z.is_floating_point():
        raise TypeError(f"noise must be a floating tensor, got {z.dtype}")
    if z.device != device:
        raise ValueError(f"noise must be on {device}, where the sampler runs, got {z.device}")
    return z


def labels_of(labels: Labels | None, n: int, device: torch.device, classes: int | None, null: bool) -> Tensor | None:
    """labels as a tensor with n rows on `device`: int64 [n] of classes, or a floating condition [n, ...].

    null: whether there is a label that means "none"; then `classes` itself, one past the last class, is allowed.
    """
    if labels is None:
        return None
    if isinstance(labels, (int, np.integer)) and not isinstance(labels, bool):
        labels = [int(labels)] * n
    try:
        result = labels if isinstance(labels, Tensor) else torch.tensor(labels, dtype=None if n else torch.int64)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"labels must be an int, a list of ints or a tensor, got {labels!r}") from None
    if result.dim() == 0 or result.shape[0] != n:
        raise ValueError(f"labels must have {n} rows, one per sample, got shape {tuple(result.shape)}")
    if result.is_floating_point():
        if result.dim() == 1:
            raise TypeError(f"labels must be whole numbers (or conditions of shape (n, ...)), got {result.dtype}")
        return result.to(device)
    if result.dtype == torch.bool or result.is_complex():
        raise TypeError(f"labels must be whole numbers, got {result.dtype}")
    if result.dim() != 1:
        raise ValueError(f"labels must have shape ({n},), got {tuple(result.shape)}")
    if n and isinstance(classes, int):
        low, high = int(result.min()), int(result.max())
        last = classes if null else classes - 1
        if low < 0 or high > last:
            meaning = f" ({classes} = no label)" if null else ""
            raise ValueError(f"labels must lie in 0..{last}{meaning}, got {low}..{high}")
    return result.to(device=device, dtype=torch.int64)


def guidance_of(guidance: float, labels: Tensor | None, null_label: Any) -> Tensor | None:
    """The label that means "none" as a tensor like one label, or None when guidance is 1 and one pass will do."""
    if isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
        raise TypeError(f"guidance must be a number, got {type(guidance).__name__}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be finite, got {guidance}")
    if guidance == 1:
        return None
    if labels is None:
        raise ValueError(f"guidance={guidance} needs labels to guide towards; pass labels=, or guidance=1")
    if null_label is None:
        raise ValueError(
            f'guidance={guidance} needs the label that means "no label"; the model has no null_label, so pass '
            "null_label= to Sampler"
        )
    null = torch.as_tensor(null_label, device=labels.device).to(labels.dtype)
    if null.shape not in (torch.Size([]), labels.shape[1:]):
        raise ValueError(f"null_label must have shape {tuple(labels.shape[1:])}, got {tuple(null.shape)}")
    return null.expand(labels.shape[1:])


def thresholding_of(thresholding: bool | float | tuple[float, float] | None) -> tuple[float, float] | None:
    """(ratio, max_value) of dynamic thresholding, or None. True is (0.995, 1.0); a number is the ratio."""
    if thresholding is None or thresholding is False:
        return None
    if thresholding is True:
        return 0.995, 1.0
    pair = thresholding if isinstance(thresholding, (tuple, list)) else (thresholding, 1.0)
    if len(pair) != 2 or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in pair):
        raise TypeError(f"thresholding must be a bool, a ratio or (ratio, max_value), got {thresholding!r}")
    ratio, max_value = pair
    if not 0 < ratio <= 1:
        raise ValueError(f"thresholding: the ratio must lie in (0, 1], got {ratio}")
    if not 1 <= max_value < math.inf:
        raise ValueError(f"thresholding: max_value must be finite and at least 1, got {max_value}")
    return float(ratio), float(max_value)
