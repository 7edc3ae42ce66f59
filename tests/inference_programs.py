"""What the tests of single layers of a `_C.Program` share: tables of columns, slices of wider buffers, guard values."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_fast.inference import native

DTYPES = {isa: dtype for dtype in (torch.float32, torch.bfloat16) for isa in native.isas(dtype)}
GUARD = 55.0
COLUMNS, SCALE_COLUMN, SHIFT_COLUMN = 640, 16, 320


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Tables:
    """Time and label tables, and which rows of them n images have."""

    def __init__(self, n: int, labels: bool) -> None:
        self.time, self.rows = random(5, COLUMNS, seed=7) / 4, torch.tensor([(3 * i + 1) % 5 for i in range(n)])
        self.label = random(4, COLUMNS, seed=8) / 4 if labels else None
        self.label_rows = (self.rows + 1) % 4

    def columns(self, first: int, count: int) -> Tensor:
        """Those of every image, float64 [n, count]."""
        both = self.time.double()[self.rows]
        if self.label is not None:
            both = both + self.label.double()[self.label_rows]
        return both[:, first : first + count]

    def run(self, program, threads: int) -> None:
        label, rows = (0, 0) if self.label is None else (self.label.data_ptr(), self.label_rows.data_ptr())
        program.run(0, 0, self.time.data_ptr(), self.rows.data_ptr(), label, rows, threads)


def slice_of(values: Tensor, before: int = 8, after: int = 24) -> tuple[Tensor, Tensor]:
    """A buffer [..., before + channels + after] of guard values, and its slice with `values`."""
    buffer = torch.full((*values.shape[:-1], before + values.shape[-1] + after), GUARD, dtype=values.dtype)
    part = buffer[..., before : before + values.shape[-1]]
    part.copy_(values)
    return buffer, part


def guards_hold(buffer: Tensor, part: Tensor) -> bool:
    first = part.storage_offset()
    return bool((buffer[..., :first] == GUARD).all() and (buffer[..., first + part.shape[-1] :] == GUARD).all())
