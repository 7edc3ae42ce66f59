"""Argument checks of the public ops: done once, here, for all backends, before anything is written.

Every message names the argument, what was expected and what came. What only the device knows (the values of a CUDA
tensor) is not read, because that would stall the GPU; the kernels are safe against it. The checks run at every call, so
they are written to cost little: a small step on a CPU takes ten microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORED = FLOATS[:3]  # what the kernels store; float64 is the reference backend's
INDICES = (torch.int64, torch.int32)


def names(dtypes: Sequence[torch.dtype]) -> str:
    """ "float32, bfloat16 or float16" """
    words = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def tensor(name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
    """``value`` if it is a tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {names(dtypes)}, got {names([value.dtype])}")
    return value


def shape(name: str, value: Tensor, expected: Sequence[int]) -> None:
    """Raise unless ``value`` has exactly the expected shape."""
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(value.shape)}")


def choice(name: str, value: Any, known: Sequence[Any]) -> Any:
    """Raise unless ``value`` is one of the known names."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(repr(word) for word in known)}, got {value!r}")
    return value


def stream(value: int) -> None:
    """Raise unless ``value`` is a stream of the noise."""
    if not 0 <= value < 2**32:
        raise ValueError(f"stream must be in [0, 2**32), got {value}")


class Images:
    """The first tensor of an op, checked, which the others must match in device, and images in shape too."""

    __slots__ = ("device", "name", "shape", "tensor")

    def __init__(self, name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATS) -> None:
        self.name, self.tensor = name, tensor(name, value, dtypes)
        self.shape, self.device = self.tensor.shape, self.tensor.device
        if len(self.shape) < 2:
            raise ValueError(
                f"{name} must have shape (N, C, ...) or (N, D), got {tuple(self.shape)}; add a batch dimension with "
                f"{name}[None]"
            )

    def with_device(
        self, name: str, value: Any, expected: Sequence[int], dtypes: Sequence[torch.dtype] = FLOATS
    ) -> Tensor:
        """A tensor of the expected shape on the device of the images."""
        checked = tensor(name, value, dtypes)
        if checked.shape != expected:
            shape(name, checked, expected)
        if checked.device != self.device:
            raise ValueError(
                f"{name} must be on {self.device} like {self.name}, got {checked.device}; "
                f'move it with {name}.to("{self.device}")'
            )
        return checked

    def like(self, name: str, value: Any, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor | None:
        """An optional tensor in the shape of the images."""
        return None if value is None else self.with_device(name, value, self.shape, dtypes)

    def rng(self, value: Any) -> Tensor | None:
        """An optional int64[2] tensor (seed, first_sample)."""
        return None if value is None else self.with_device("rng", value, (2,), (torch.int64,)).contiguous()

    def timesteps(self, value: Any, table: Tensor) -> Tensor:
        """t as contiguous int64 [N]; on the CPU its values are checked against the table."""
        t = self.with_device("t", value, self.shape[:1], INDICES).to(torch.int64).contiguous()
        if t.is_cpu and not torch.compiler.is_compiling() and t.numel():
            low, high = (int(value) for value in t.aminmax())
            if low < 0 or high >= table.shape[0]:
                wrong = low if low < 0 else high
                raise ValueError(f"t must be in [0, {table.shape[0]}), the length of the table, got {wrong}")
        return t

    def table(self, value: Any, columns: int, source: str) -> Tensor:
        """A float32 [steps, columns] table of coefficients."""
        table = tensor("table", value, (torch.float32,))
        if table.dim() != 2 or table.shape[1] != columns:
            raise ValueError(f"table must have shape (steps, {columns}) (see {source}), got {tuple(table.shape)}")
        return self.with_device("table", table, table.shape, (torch.float32,)).contiguous()


def _span(x: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that the elements of ``x`` may occupy."""
    start = x.data_ptr()
    if x.is_contiguous():
        return start, start + x.nbytes
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.element_size()


def same_place(a: Tensor, b: Tensor | None) -> bool:
    """Whether each element of ``a`` lies where that of ``b``, of the same shape and dtype, does."""
    if b is None or b is a or torch.compiler.is_compiling():
        return b is a
    return a.data_ptr() == b.data_ptr() and a.stride() == b.stride()


def no_overlap(name: str, output: Tensor | None, others: dict[str, Tensor | None]) -> None:
    """Raise when memory that will be written is also read, or written twice."""
    if output is None or torch.compiler.is_compiling() or output.numel() == 0:
        return
    if not output.is_contiguous() and any(s == 0 and n > 1 for n, s in zip(output.shape, output.stride(), strict=True)):
        raise ValueError(f"{name} is an expanded tensor whose elements share memory; pass {name}.clone()")
    start, end = _span(output)
    for other_name, other in others.items():
        if other is None:
            continue
        other_start, other_end = _span(other)
        if start < other_end and other_start < end and other.numel() and other.device == output.device:
            raise ValueError(
                f"{name} is written while {other_name} is read, so they must not share memory; "
                f"pass {other_name}.clone()"
            )
