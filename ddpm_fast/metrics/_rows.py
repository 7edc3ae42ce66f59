"""Samples as rows of float64, which every metric starts from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

FloatArray = np.ndarray[Any, np.dtype[np.float64]]

BLOCK_ELEMENTS = 1 << 22  # of a matrix over pairs, held at once: 32 MiB of float64


def as_rows(name: str, samples: Any) -> Tensor:
    """Tensor or array (N, ...) -> float64 (N, D) on its own device."""
    rows = torch.as_tensor(samples)
    if rows.dim() < 2:
        raise ValueError(f"{name} must have shape (N, ...) with at least two dimensions, got {tuple(rows.shape)}")
    rows = rows.detach().flatten(1).to(torch.float64)
    if not bool(torch.isfinite(rows).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinite values")
    return rows


def as_pair(names: tuple[str, str], x: Any, y: Any, least: int) -> tuple[Tensor, Tensor]:
    """Both as rows of one width on x's device, each with at least `least` of them."""
    a, b = as_rows(names[0], x), as_rows(names[1], y)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{names[1]} must have {a.shape[1]} elements a sample as {names[0]} has, got {b.shape[1]}")
    for name, rows in zip(names, (a, b), strict=True):
        if rows.shape[0] < least:
            raise ValueError(f"{name} must hold at least {least} samples, got {rows.shape[0]}")
    return a, b.to(a.device)


def blocks(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    """x in blocks of rows, so many that a matrix of block rows by `columns` stays within BLOCK_ELEMENTS."""
    parts: tuple[Tensor, ...] = x.split(max(1, BLOCK_ELEMENTS // max(1, columns)))
    return parts
