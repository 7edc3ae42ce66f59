"""RMSNorm, linear attention and attention with memory tokens of the CPU layers against float64, for every instruction
set that can be used here.

Layers run through `_C.Program` as in a plan, on slices of wider buffers with guard values around what they write.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from inference_models import relative_error
from inference_programs import (
    COLUMNS,
    DTYPES,
    SCALE_COLUMN,
    SHIFT_COLUMN,
    Tables,
    guards_hold,
    random,
    slice_of,
)
from torch import Tensor

from ddpm_fast.backends import native as extension
from ddpm_fast.inference import native

pytestmark = pytest.mark.skipif(not native.available(), reason="the extension has no inference layers here")

# A bfloat16 is off by 2^-9 at most, half of that on average; two roundings where a residual is added in place.
NORM_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}


class Norm:
    """An RMSNorm layer with its weights; x: [n, h, w, c] slice."""

    def __init__(self, silu: bool = True, scale_shift: bool = False, eps: float = 1e-12) -> None:
        self.silu, self.eps = silu, eps
        self.columns = (SCALE_COLUMN, SHIFT_COLUMN) if scale_shift else (-1, -1)

    def weight(self, c: int) -> Tensor:
        return (random(c, seed=1) / 4 + 1) * c**0.5

    def run(
        self, isa: str, x: Tensor, y: Tensor, tables: Tables, residual: Tensor | None = None, threads: int = 1
    ) -> Tensor:
        n, h, w, c = x.shape
        weight, program = self.weight(c), extension._C.Program(COLUMNS)
        affine = (weight.data_ptr(), self.silu, *self.columns)
        source, target = (x.data_ptr(), x.stride(2)), (y.data_ptr(), y.stride(2))
        added = (0, 0) if residual is None else (residual.data_ptr(), residual.stride(2))
        program.rms_norm(isa, n, h, w, c, self.eps, *source, *affine, *added, *target)
        tables.run(program, threads)
        return y

    def exact(self, x: Tensor, tables: Tables, residual: Tensor | None = None) -> Tensor:
        y = F.normalize(x.double(), dim=3, eps=self.eps) * self.weight(x.shape[3])
        if self.columns != (-1, -1):
            scale, shift = (tables.columns(column, x.shape[3])[:, None, None] for column in self.columns)
            y = y * (1 + scale) + shift
        y = F.silu(y) if self.silu else y
        return y if residual is None else y + residual


@pytest.mark.parametrize("isa", DTYPES)
class TestNorm:
    @pytest.mark.parametrize(
        ("n", "h", "w", "c"),
        [(1, 1, 1, 16), (3, 5, 7, 16), (2, 3, 3, 48), (1, 16, 17, 144), (2, 2, 5, 256), (3, 1, 2, 80), (1, 40, 33, 32)],
    )
    @pytest.mark.parametrize(
        ("silu", "scale_shift", "labels", "add"),
        [
            (True, True, True, False),
            (False, False, False, True),
            (True, True, False, True),
            (True, False, False, False),
        ],
    )
    def test_matches_float64(self, isa, n, h, w, c, silu, scale_shift, labels, add) -> None:
        norm, tables = Norm(silu, scale_shift), Tables(n, labels)
        source, x = slice_of(random(n, h, w, c, seed=3, dtype=DTYPES[isa]) * 2 + 0.5)
        target, y = slice_of(torch.zeros_like(x), before=16, after=40)
        added, residual = slice_of(random(n, h, w, c, seed=4, dtype=DTYPES[isa]), before=32)
        norm.run(isa, x, y, tables, residual if add else None)
        assert relative_error(y, norm.exact(x, tables, residual if add else None)) < NORM_TOLERANCE[DTYPES[isa]]
        assert guards_hold(target, y)
        assert guards_hold(source, x)
        assert guards_hold(added, residual)

    def test_small_pixels_are_bounded_by_eps_and_zeros_stay(self, isa) -> None:
        x = random(1, 3, 4, 32, seed=3, dtype=DTYPES[isa])
        x[0, 1] *= 1e-4
        x[0, 2] = 0
        norm, tables = Norm(silu=False, eps=1e-2), Tables(1, labels=False)
        got = norm.run(isa, x, torch.empty_like(x), tables)
        assert relative_error(got[0, :2], norm.exact(x, tables)[0, :2]) < NORM_TOLERANCE[DTYPES[isa]]
        assert relative_error(got[0, 1], norm.exact(x, tables)[0, 1]) < NORM_TOLERANCE[DTYPES[isa]]
        assert (got[0, 2] == 0).all()
        assert (Norm(silu=False).run(isa, x, torch.empty_like(x), tables)[0, 2] == 0).all()

    @pytest.mark.parametrize("size", [1e-6, 1e12])
    def test_the_size_of_a_pixel_does_not_matter(self, isa, size) -> None:
        x = (random(1, 2, 9, 64, seed=3) * size).to(DTYPES[isa])
        norm, tables = Norm(), Tables(1, labels=False)
        got = norm.run(isa, x, torch.empty_like(x), tables)
        assert relative_error(got, norm.exact(x, tables)) < NORM_TOLERANCE[DTYPES[isa]]

    def test_nan_stays_in_its_pixel(self, isa) -> None:
        x = random(2, 4, 5, 48, seed=3, dtype=DTYPES[isa])
        x[1, 2, 3, 13] = float("nan")
        got = Norm().run(isa, x, torch.empty_like(x), Tables(2, labels=False))
        assert got[1, 2, 3].isnan().all()
        assert got.isnan().sum() == 48

    @pytest.mark.parametrize(("n", "c"), [(1, 128), (3, 80)])
    def test_bits_depend_on_neither_threads_nor_batch_nor_place(self, isa, n, c) -> None:
        norm, tables = Norm(scale_shift=True), Tables(n, labels=True)
        x, residual = (random(n, 17, 19, c, seed=seed, dtype=DTYPES[isa]) for seed in (3, 4))
        expected = norm.run(isa, x, torch.empty_like(x), tables, residual)
        for threads in (2, 3):
            assert torch.equal(norm.run(isa, x, torch.empty_like(x), tables, residual, threads), expected)
        in_place, onto = x.clone(), residual.clone()
        assert torch.equal(norm.run(isa, in_place, in_place, tables, residual, 2), expected)
        assert torch.equal(norm.run(isa, x, onto, tables, onto, 2), expected)
        alone = norm.run(isa, x[:1], torch.empty_like(x[:1]), tables, residual[:1])
        assert torch.equal(alone, expected[:1])


class TestBadInput:
    @staticmethod
    def norm(*, n=1, h=2, w=2, c=32, eps=1e-12, columns=(-1, -1)) -> None:
        isa = next(iter(DTYPES))
        extension._C.Program(COLUMNS).rms_norm(isa, n, h, w, c, eps, 0, c, 0, True, *columns, 0, 0, 0, c)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"n": 0}, "n, h and w must be at least 1, got 0, 2, 2"),
            ({"c": 24}, "channels must be a multiple of 16, got 24"),
            ({"eps": -1.0}, "eps must not be negative, got -1"),
            ({"columns": (3, -1)}, "scale_column and shift_column must both be columns or both -1, got 3 and -1"),
        ],
    )
    def test_norm(self, arguments, message) -> None:
        with pytest.raises(ValueError, match=message):
            self.norm(**arguments)

    def test_what_fits_is_taken(self) -> None:
        self.norm()
