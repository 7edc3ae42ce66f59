"""Tensors with guard values around them, so that a kernel that writes beside its outputs, or not all of them, shows."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

GUARD = 55
AROUND = 256
"""Bytes on either side: what follows is aligned as it was."""


class Guarded:
    """A copy of a tensor, in the same strides and alignment, in the middle of guard values: ``view`` is the copy."""

    def __init__(self, like: Tensor, device: torch.device, fill: float | None = None) -> None:
        """fill: every element of the copy, instead of the values of `like`."""
        around = AROUND // like.element_size()
        self.start = around + like.storage_offset() % 16
        self.span = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride(), strict=True))
        self.buffer = torch.full((self.start + self.span + around,), GUARD, dtype=like.dtype, device=device)
        self.view = self.buffer.as_strided(like.shape, like.stride(), self.start)
        if fill is None:
            self.view.copy_(like)
        else:
            self.view.fill_(fill)

    def intact(self) -> bool:
        """Whether nobody wrote beside the tensor."""
        around = [self.buffer[: self.start], self.buffer[self.start + self.span :]]
        if self.view.numel() < self.span:  # holes inside
            whole = self.buffer.clone()
            whole.as_strided(self.view.shape, self.view.stride(), self.start).fill_(GUARD)
            around = [whole]
        return all(bool((part == GUARD).all()) for part in around)


def poison(dtype: torch.dtype) -> float:
    """What stands in an output that was not written."""
    return float("nan") if dtype.is_floating_point else 99


@contextlib.contextmanager
def guarded_allocations() -> Iterator[list[tuple[str, Guarded]]]:
    """Within it what the package allocates (``torch.empty`` and its like) is poisoned and guarded.

    The list fills with (where from, what). What is empty or has no memory of its own is left alone.
    """
    made: list[tuple[str, Guarded]] = []

    def guarding(original: Any) -> Any:
        def allocate(*args: Any, **kwargs: Any) -> Any:
            x = original(*args, **kwargs)
            caller = sys._getframe(1)
            name = caller.f_globals.get("__name__", "")
            if not name.startswith("ddpm_fast") or not isinstance(x, Tensor) or x.is_meta or x.numel() == 0:
                return x
            guarded = Guarded(x, x.device, poison(x.dtype))
            made.append((f"{name.removeprefix('ddpm_fast.')}:{caller.f_lineno}", guarded))
            return guarded.view

        return allocate

    places = [(owner, name) for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty"))]
    originals = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, guarding(original))
        yield made
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
