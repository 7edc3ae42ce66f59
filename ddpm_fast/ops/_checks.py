"""Argument checks of the public ops: done once, here, for all backends, before anything is written.

Every message names the argument, what was expected and what came. What only the device knows (the values of a CUDA
tensor) is not read, because that would stall the GPU; the kernels are safe against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, first_name: str, first: Tensor) -> None:
    """Raise unless both tensors are on one device."""
    if value.device != first.device:
        raise ValueError(
            f"{name} must be on {first.device} like {first_name}, got {value.device}; "
            f'move it with {name}.to("{first.device}")'
        )


def matching(
    name: str, value: Any, first_name: str, first: Tensor, dtypes: Sequence[torch.dtype] = FLOATS
) -> Tensor | None:
    """An optional tensor that must have the shape and device of ``first``."""
    if value is None:
        return None
    checked = tensor(name, value, dtypes)
    shape(name, checked, first.shape)
    same_device(name, checked, first_name, first)
    return checked


def batched(name: str, value: Tensor) -> Tensor:
    """Raise unless the tensor has a batch dimension and at least one more."""
    if value.dim() < 2:
        raise ValueError(
            f"{name} must have shape (N, C, ...) or (N, D), got {tuple(value.shape)}; add a batch dimension with "
            f"{name}[None]"
        )
    return value


def choice(name: str, value: Any, known: Sequence[Any]) -> Any:
    """Raise unless ``value`` is one of the known names."""
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(repr(word) for word in known)}, got {value!r}")
    return value


def rng_of(name: str, value: Any, first_name: str, first: Tensor) -> Tensor | None:
    """An optional int64[2] tensor (seed, first_sample)."""
    if value is None:
        return None
    checked = tensor(name, value, (torch.int64,))
    shape(name, checked, (2,))
    same_device(name, checked, first_name, first)
    return checked.contiguous()


def timesteps(value: Any, table: Tensor, first_name: str, first: Tensor) -> Tensor:
    """t as contiguous int64 [N]; on the CPU its values are checked against the table."""
    t = tensor("t", value, (torch.int64, torch.int32))
    shape("t", t, (first.shape[0],))
    same_device("t", t, first_name, first)
    t = t.to(torch.int64).contiguous()
    if t.device.type == "cpu" and t.numel() and not torch.compiler.is_compiling():
        low, high = t.aminmax()
        if low < 0 or high >= table.shape[0]:
            wrong = int(low) if low < 0 else int(high)
            raise ValueError(f"t must be in [0, {table.shape[0]}), the length of the table, got {wrong}")
    return t


def coefficient_table(name: str, value: Any, columns: int, first_name: str, first: Tensor, source: str) -> Tensor:
    """A float32 [steps, columns] table on the device of the images."""
    table = tensor(name, value, (torch.float32,))
    if table.dim() != 2 or table.shape[1] != columns:
        raise ValueError(f"{name} must have shape (steps, {columns}) (see {source}), got {tuple(table.shape)}")
    same_device(name, table, first_name, first)
    return table.contiguous()


def _span(x: Tensor) -> tuple[int, int]:
    """First byte and one past the last byte that the elements of ``x`` may occupy."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    start = x.data_ptr()
    return start, start + (last + 1) * x.element_size()


def no_overlap(output_name: str, output: Tensor | None, **others: Tensor | None) -> None:
    """Raise when memory that will be written is also read, or written twice."""
    if output is None or output.numel() == 0 or torch.compiler.is_compiling():
        return
    if any(stride == 0 and size > 1 for size, stride in zip(output.shape, output.stride(), strict=True)):
        raise ValueError(f"{output_name} is an expanded tensor whose elements share memory; pass {output_name}.clone()")
    start, end = _span(output)
    for name, other in others.items():
        if other is None or other.numel() == 0 or other.device != output.device:
            continue
        other_start, other_end = _span(other)
        if start < other_end and other_start < end:
            raise ValueError(
                f"{output_name} is written while {name} is read, so they must not share memory; pass {name}.clone()"
            )
