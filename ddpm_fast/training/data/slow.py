"""Data that is read one by one, from files or a Dataset, and kept in memory where there is room."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .base import describe

KEPT = 2**30  # bytes; data up to this size is read once


class SlowData(ABC):
    """`Data` whose images are read one by one; `prefetch` gives the work to other processes.

    A subclass sets the attributes of `Data` and has `read` and `fingerprint`; `keep=True` says that an image read once
    stays in this process's memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    labels: Tensor | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None

    def __init__(self, count: int, *, keep: bool) -> None:
        self._count = count
        self._kept: Tensor | None = None
        self._have: Tensor | None = None
        if keep:
            # Memory is taken from the system page by page, as images arrive.
            self._kept = torch.empty((count, *self.shape), dtype=self.dtype)
            self._have = torch.zeros(count, dtype=torch.bool)
        self.complete = False  # whether all are in memory

    def __len__(self) -> int:
        return self._count

    @abstractmethod
    def read(self, index: int) -> NDArray[Any]:
        """One of them, of `shape` and `dtype`."""

    @abstractmethod
    def fingerprint(self) -> str: ...

    def report_broken(self) -> int:
        """How many could not be read so far; a warning where there are new ones."""
        return 0

    def missing(self, indices: Tensor) -> Tensor:
        """Those of `indices` that have to be read: without what is in memory, each once."""
        return indices if self._have is None else indices[~self._have[indices]].unique()

    def read_many(self, indices: Sequence[int]) -> NDArray[Any]:
        return np.stack([self.read(i) for i in indices]) if len(indices) else np.empty((0, *self.shape))

    def assemble(self, indices: Tensor, missing: Tensor, images: NDArray[Any]) -> Tensor:
        """The batch of `indices`, of which `missing` were read as `images`."""
        if self._kept is None or self._have is None:
            return torch.from_numpy(images)
        if len(missing):
            self._kept[missing] = torch.from_numpy(images)
            self._have[missing] = True
            self.complete = bool(self._have.all())
        return self._kept.index_select(0, indices)

    def batch(self, indices: Tensor) -> Tensor:
        if self.complete and self._kept is not None:
            return self._kept.index_select(0, indices)
        missing = self.missing(indices)
        return self.assemble(indices, missing, self.read_many(missing.tolist()))

    def __repr__(self) -> str:
        return describe(self)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process reads what it is told to.
        return {**self.__dict__, "_kept": None, "_have": None}
