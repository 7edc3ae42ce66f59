"""Batches ahead of the training step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from .base import Data


def prefetch(data: Data, indices: Iterable[Tensor], workers: int | None = None) -> Iterator[Tensor]:
    """Batches of `data` in exactly the order of `indices`, each int64 (n,).

    workers: processes that read; None: as many as help, none for data in memory.
    """
    for some in indices:
        yield data.batch(some)
