"""What the op tests share: awkward inputs, the reference's answer, exact comparison, guarded buffers, tolerances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ddpm_fast

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MEMORY = ("contiguous", "channels_last", "sliced", "offset")

# N = 1, E = 1, 3, 1023 and 0, no samples, quads that cross channels, several tiles, vectors.
SHAPES = [(1, 1), (2, 3), (1, 1023), (3, 0), (0, 3, 4, 4), (2, 3, 5, 7), (3, 4, 8, 8), (1, 3, 33, 32)]
IMAGE = (2, 3, 6, 6)

# Where results are not exact, the bound and why.
TOLERANCES = {
    # sums of float32 values in another order than float64's; eager's own error is checked beside it
    "reduction": {"rtol": 2e-6, "atol": 1e-7},
    # one rounding to the storage dtype on either side
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
    torch.float16: {"rtol": 2**-10, "atol": 1e-4},
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},
}
# Of the norms: statistics are summed in another order and rounded once, a few ulp for all that they are of alike.
# Half-width results are rounded once on either side.
CLOSE = {**TOLERANCES, torch.float32: {"rtol": 4e-6, "atol": 4e-6}}
# Sums of up to a thousand such values, in float32 or better.
CLOSE_SUMS = {**TOLERANCES, torch.float32: {"rtol": 1e-5, "atol": 3e-5}}


def in_memory(x: Tensor, kind: str) -> Tensor:
    """The same values as ``x``, lying in memory as ``kind`` says."""
    if kind == "contiguous":
        return x.contiguous()
    if kind == "channels_last":
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    if kind == "sliced":  # every second sample and all but the first column of a larger tensor
        big = x.new_full((2 * x.shape[0], *x.shape[1:-1], x.shape[-1] + 1), 77)
        view = big[::2, ..., 1:]
    else:  # one element off every alignment
        view = x.new_full((x.numel() + 1,), 77)[1:].view(x.shape)
    view.copy_(x)
    return view


def rand(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, kind: str = "contiguous") -> Tensor:
    """Normal values (uint8: all bytes), the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        x = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    else:
        x = torch.randn(shape, generator=generator).to(dtype)
    return in_memory(x, kind)


def to(device: torch.device, value: Any) -> Any:
    """Tensors in ``value`` (a tensor, dict or anything else) on the device, with their strides and alignment."""
    if isinstance(value, Tensor):
        if device.type == "cpu":
            return value
        # As far from the start of its memory as it was, so that what lay off every alignment still does.
        first, ends = value.storage_offset(), zip(value.shape, value.stride(), strict=True)
        length = first + 1 + sum(max(size - 1, 0) * stride for size, stride in ends)
        moved = torch.empty(length, dtype=value.dtype, device=device).as_strided(value.shape, value.stride(), first)
        return moved.copy_(value.detach()).requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: to(device, item) for name, item in value.items()}
    return value


def reference(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the reference backend answers on the CPU."""
    from ddpm_fast import backends

    served = backends._requested
    with ddpm_fast.use_backend("reference"):
        result = function(*args, **kwargs)
    assert backends._requested == served
    return result


def assert_same(got: Tensor, expected: Tensor) -> None:
    """Equal value for value, NaN equal to NaN, with dtype and shape."""
    got = got.detach().cpu()
    expected = expected.detach()
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    same = (got == expected) | (got.isnan() & expected.isnan()) if got.is_floating_point() else got == expected
    if not bool(same.all()):
        wrong = (~same).nonzero()
        where = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"{len(wrong)} of {same.numel()} elements differ; first at {where}: "
            f"got {got[where].item()!r}, expected {expected[where].item()!r}"
        )


def ulp_error(got: Tensor, exact: Tensor) -> Tensor:
    """|got - exact| in units of the float32 spacing at exact (float64)."""
    import numpy as np

    spacing = np.spacing(np.abs(exact.numpy()).astype(np.float32)).astype(np.float64)
    return torch.from_numpy(np.abs(got.double().numpy() - exact.numpy()) / spacing)


class Guarded:
    """A buffer with guard values around it: ``view`` is the tensor, ``intact()`` whether nobody wrote beside it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool = False):
        count = 1
        for size in shape:
            count *= size
        self.buffer = torch.full((count + 64,), 55, dtype=dtype, device=device)
        inner = self.buffer[32 : 32 + count]
        if channels_last:
            n, c, h, w = shape
            self.view = inner.view(n, h, w, c).permute(0, 3, 1, 2)
        else:
            self.view = inner.view(shape)

    def intact(self) -> bool:
        outside = torch.cat([self.buffer[:32], self.buffer[self.buffer.numel() - 32 :]])
        return bool((outside == 55).all())
