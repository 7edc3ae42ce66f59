"""How the kernels see a tensor: n samples of channels x inner elements, dense, contiguous or channels_last.

Kernels know these two formats only. Anything else (slices, other permutations) is copied into one of them here, in one
place, and results are copied back, so that no kernel carries general strides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _is_channels_last(x: Tensor) -> bool:
    """Dense with the channel (dimension 1) fastest, for any number of dimensions."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):  # says so at a tenth of the host time
        return True
    return x.dim() >= 3 and x.movedim(1, -1).is_contiguous()


@dataclass(slots=True)
class Layout:
    """Shape and memory format shared by the images of one op call."""

    n: int
    channels: int
    inner: int
    channels_last: bool

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        """The layout in which an op over ``x`` of shape (N, ...), (N, C) or (N, C, ...) runs."""
        n = x.shape[0]
        channels = x.shape[1] if x.dim() > 1 else 1
        inner = 1
        for size in x.shape[2:]:
            inner *= size
        if x.is_contiguous():
            channels_last = False
        else:
            # A slice of a channels_last tensor is not dense, but its result will be channels_last too.
            sliced = x.dim() >= 3 and channels > 1 and inner > 1 and x.stride(1) == 1
            channels_last = sliced or _is_channels_last(x)
        return cls(n, channels, inner, channels_last)

    @property
    def elements(self) -> int:
        """Elements of one sample."""
        return self.channels * self.inner

    def holds(self, x: Tensor) -> bool:
        """Whether ``x`` lies in memory as this layout says."""
        return _is_channels_last(x) if self.channels_last else x.is_contiguous()

    def dense(self, x: Tensor) -> Tensor:
        """``x`` in this layout; a copy only where it does not have it yet."""
        if self.holds(x):
            return x
        if self.channels_last:
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        return x.contiguous()


class Staged:
    """A tensor to be written: ``data`` is the tensor itself where it has the layout, else a buffer for ``commit``."""

    __slots__ = ("data", "tensor")

    def __init__(self, tensor: Tensor, layout: Layout, *, read: bool = False) -> None:
        self.tensor = tensor
        if layout.holds(tensor):
            self.data = tensor
        elif read:
            self.data = layout.dense(tensor)
        else:
            self.data = layout.dense(torch.empty_like(tensor, memory_format=torch.contiguous_format))

    def commit(self) -> Tensor:
        """Write the buffer back, if there is one, and return the tensor."""
        if self.data is not self.tensor:
            self.tensor.copy_(self.data)
        return self.tensor
