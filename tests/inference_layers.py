"""What the tests of single layers share: every implementation, numbers exact in a dtype, guarded buffers, a frame."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.inference import library, native
from ddpm_fast.inference.candidate import Frame
from ddpm_fast.inference.network import Conv, Layer

GUARD = 55.0
CPU = torch.device("cpu")
# Inputs and weights are exact in the dtype; what is left are sums in another order, one or two roundings of results.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
COLUMNS, FIRST_COLUMN = 112, 16
EVERY_ISA = native.isas()


def listed(layer: Layer, n: int, h: int, w: int, dtype: torch.dtype) -> list:
    """All that may be listed somewhere: native layers of every instruction set, every library form."""
    result = library.candidates(layer, n, h, w, dtype, CPU)
    if isinstance(layer, Conv) and layer.resample == "none":
        more = {"conv2d": library._conv2d} | ({"im2col": library._im2col} if layer.source is not None else {})
        names = {candidate.name for candidate in result}
        result += [library.Library(name, bind) for name, bind in more.items() if name not in names]
    kinds = {candidate.kind for candidate in native.candidates(layer, n, h, w, dtype, CPU)}
    return result + [native.Native(kind, isa) for kind in sorted(kinds) for isa in native.isas(dtype)]


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).float()


def guarded(n: int, h: int, w: int, channels: int, dtype: torch.dtype, before: int = 16) -> tuple[Tensor, Tensor]:
    """A buffer full of guard values and a slice of its channels."""
    buffer = torch.full((n, h, w, before + channels + 16), GUARD, dtype=dtype)
    return buffer, buffer[..., before : before + channels]


def intact(buffer: Tensor, channels: int, before: int = 16) -> bool:
    outside = torch.cat([buffer[..., :before], buffer[..., before + channels :]], dim=-1)
    return bool((outside == GUARD).all())


def frame(n: int, channels: int, h: int, w: int, labels: bool, seed: int = 3) -> Frame:
    time = random((5, COLUMNS), torch.float32, seed)
    rows = torch.tensor([(3 * i + 1) % 5 for i in range(n)])
    extra = (random((4, COLUMNS), torch.float32, seed + 1), (rows + 1) % 4) if labels else (None, None)
    x = random((n, channels, h, w), torch.float32, seed + 2)
    return Frame(x, torch.full_like(x, float("nan")), time, rows, *extra)


def temb(run: Frame, channels: int) -> Tensor:
    columns = slice(FIRST_COLUMN, FIRST_COLUMN + channels)
    result = run.time_table[run.time_rows][:, columns].double()
    if run.label_table is not None:
        result = result + run.label_table[run.label_rows][:, columns]
    return result[:, :, None, None]
