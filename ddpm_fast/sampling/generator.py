"""Noise from the caller's `torch.Generator`, drawn as diffusers' pipelines draw it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator]


def drawing(
    generator: Generators, n: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor]:
    """A function that draws the next (n, *shape) normals in `dtype` each time and gives them on `device`.

    generator: one for the whole batch, or a list of one per sample. torch.randn runs where the generators live.
    TypeError for what is no generator, ValueError for another number of them, for generators on several devices, and
    for one on a device other than the CPU and `device`.
    """
    each = [generator] if isinstance(generator, torch.Generator) else _listed(generator)
    if not each or len(each) not in (1, n):
        raise ValueError(f"generator must be one torch.Generator or a list of {n}, one per sample, got {len(each)}")
    homes = {str(one.device) for one in each}
    if len(homes) > 1:
        raise ValueError(f"generators must live on one device, got {', '.join(sorted(homes))}")
    home = each[0].device
    if home.type not in ("cpu", device.type):
        known = "cpu" if device.type == "cpu" else f"cpu or {device}"
        raise ValueError(f"generator must live on {known}, where the sampler runs, got one on {home}")

    def draw() -> Tensor:
        if len(each) == 1:
            return torch.randn(n, *shape, generator=each[0], dtype=dtype, device=home).to(device)
        rows = [torch.randn(1, *shape, generator=one, dtype=dtype, device=home) for one in each]
        return torch.cat(rows).to(device)

    return draw


def _listed(generator: Sequence[torch.Generator]) -> list[torch.Generator]:
    if not isinstance(generator, (list, tuple)):
        raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(generator).__name__}")
    for one in generator:
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or a list of them, got {type(one).__name__} in it")
    return list(generator)
