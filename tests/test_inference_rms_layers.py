"""RMSNorm and the 2x2 and 7x7 convolutions of the CPU layers against float64, for every instruction set that can be
used here.

Layers run through `_C.Program` as in a plan, on slices of wider buffers with guard values around what they write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
from ddpm_fast.inference.candidate import Frame, Packs, Place
from ddpm_fast.inference.network import Buffer, Conv, Down, Layer, Slice

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


def ran(layer: Layer, isa: str, x: Tensor | None, y: Tensor, run: Frame, size: tuple[int, int]) -> None:
    """The layer's only kind for this instruction set, from x (None: the image) to y."""
    kinds = {one.kind for one in native.candidates(layer, y.shape[0], *size, y.dtype, torch.device("cpu"))}
    assert len(kinds) == 1
    place = Place(y.shape[0], *size, y.dtype, torch.device("cpu"), x, y, None, COLUMNS, Packs())
    native.Native(kinds.pop(), isa).prepare(layer, place)(run)


def frame(n: int, x: Tensor) -> Frame:
    tables = Tables(n, labels=False)
    return Frame(x, torch.empty_like(x), tables.time, tables.rows)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", DTYPES)
class TestDown:
    @pytest.mark.parametrize(
        ("n", "h", "w", "c", "out"),
        [(1, 2, 2, 16, 16), (3, 6, 10, 48, 80), (2, 16, 32, 64, 128), (1, 4, 4, 32, 272), (5, 2, 4, 80, 48)],
    )
    def test_matches_float64(self, isa, n, h, w, c, out) -> None:
        dtype = DTYPES[isa]
        weight = (random(out, c, 2, 2, seed=1) * (4 * c) ** -0.5).to(dtype).float()
        bias, part = random(out, seed=2), Slice(Buffer("any", c, 0), 0, c)
        layer = Down("down", weight, bias, part, Slice(Buffer("any", out, 1), 0, out))
        source, x = slice_of(random(n, h, w, c, seed=3, dtype=dtype))
        exact = F.conv2d(x.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), stride=2).permute(0, 2, 3, 1)
        target, y = slice_of(torch.zeros(n, h // 2, w // 2, out, dtype=dtype), before=16, after=40)
        first = None
        for count in (1, 2, 3):
            with torch_threads(count):
                ran(layer, isa, x, y, frame(n, random(n, 3, h, w, seed=4)), (h, w))
            assert relative_error(y, exact) < NORM_TOLERANCE[dtype]
            assert first is None or torch.equal(y, first)
            first = y.clone()
        assert guards_hold(target, y)
        assert guards_hold(source, x)


@pytest.mark.parametrize("isa", DTYPES)
class TestStem:
    """The 7x7 convolution of the image."""

    @pytest.mark.parametrize(
        ("n", "h", "w", "c", "out"),
        [
            (1, 1, 1, 3, 16),
            (2, 5, 7, 3, 48),
            (1, 32, 32, 6, 64),
            (3, 8, 4, 1, 32),
            (1, 3, 40, 4, 80),
            (2, 16, 18, 2, 16),
        ],
    )
    @pytest.mark.parametrize(("silu", "timed"), [(False, False), (True, True)])
    def test_matches_float64(self, isa, n, h, w, c, out, silu, timed) -> None:
        dtype = DTYPES[isa]
        weight = (random(out, c, 7, 7, seed=1) * (49 * c) ** -0.5).to(dtype).float()
        bias, part = random(out, seed=2), Slice(Buffer("any", out, 0), 0, out)
        layer = Conv("stem", weight, bias, None, part, silu, temb=SCALE_COLUMN if timed else None)
        x = random(n, c, h, w, seed=3)
        exact = F.conv2d(x.to(dtype).double(), weight.double(), bias.double(), padding=3)
        exact = (F.silu(exact) if silu else exact).permute(0, 2, 3, 1)
        if timed:
            exact = exact + Tables(n, labels=False).columns(SCALE_COLUMN, out)[:, None, None]
        target, y = slice_of(torch.zeros(n, h, w, out, dtype=dtype), before=16, after=40)
        kept, first = x.clone(), None
        for count in (1, 2, 3):
            with torch_threads(count):
                ran(layer, isa, None, y, frame(n, x), (h, w))
            assert relative_error(y, exact) < NORM_TOLERANCE[dtype]
            assert first is None or torch.equal(y, first)
            first = y.clone()
        assert guards_hold(target, y)
        assert torch.equal(x, kept)


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

    def test_down_needs_even_sizes(self) -> None:
        isa = next(iter(DTYPES))
        with pytest.raises(ValueError, match="kind down needs an even height and width, got 3x2"):
            extension._C.Program(COLUMNS).pixelwise("down", isa, 1, 3, 2, 16, 16, 0, 16, 0, 0, 0, 16, 0, 0)
        part = Slice(Buffer("any", 16, 0), 0, 16)
        layer = Down("down", random(16, 16, 2, 2, seed=1), random(16, seed=2), part, part)
        assert native.candidates(layer, 1, 3, 2, torch.float32, torch.device("cpu")) == []

    def test_what_fits_is_taken(self) -> None:
        self.norm()
