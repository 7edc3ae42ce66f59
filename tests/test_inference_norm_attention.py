"""GroupNorm and attention of the CPU layers against float64, for every instruction set that can be used here.

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

# A bfloat16 is off by 2^-9 at most, half of that on average; attention also rounds the probabilities.
NORM_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3}
ATTENTION_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3.5e-3}


class Norm:
    """A GroupNorm layer with its weights; x: [n, h, w, c] slice."""

    def __init__(self, groups: int, silu: bool = True, scale_shift: bool = False, eps: float = 1e-5) -> None:
        self.groups, self.silu, self.eps = groups, silu, eps
        self.columns = (SCALE_COLUMN, SHIFT_COLUMN) if scale_shift else (-1, -1)

    def weights(self, c: int) -> tuple[Tensor, Tensor]:
        return random(c, seed=1) / 4 + 1, random(c, seed=2)

    def run(self, isa: str, x: Tensor, y: Tensor, tables: Tables, threads: int = 1) -> Tensor:
        n, h, w, c = x.shape
        weight, beta = self.weights(c)
        program = extension._C.Program(COLUMNS)
        affine = (weight.data_ptr(), beta.data_ptr(), self.silu, *self.columns)
        source, target = (x.data_ptr(), x.stride(2)), (y.data_ptr(), y.stride(2))
        program.norm(isa, n, h, w, c, self.groups, self.eps, *source, *affine, *target)
        tables.run(program, threads)
        return y

    def exact(self, x: Tensor, tables: Tables) -> Tensor:
        c = x.shape[3]
        weight, beta = self.weights(c)
        y = F.group_norm(x.permute(0, 3, 1, 2).double(), self.groups, weight.double(), beta.double(), self.eps)
        y = y.permute(0, 2, 3, 1)
        if self.columns != (-1, -1):
            scale, shift = (tables.columns(column, c)[:, None, None] for column in self.columns)
            y = y * (1 + scale) + shift
        return F.silu(y) if self.silu else y


@pytest.mark.parametrize("isa", DTYPES)
class TestNorm:
    @pytest.mark.parametrize(
        ("n", "h", "w", "c", "groups"),
        [
            (1, 1, 1, 16, 4),
            (3, 5, 7, 16, 1),
            (1, 8, 8, 128, 32),
            (2, 3, 3, 48, 6),  # 8 channels a group
            (3, 4, 4, 96, 8),  # 12: borders of groups are those of panels every third panel
            (1, 16, 17, 144, 6),  # 24; more pixels than are summed in float32
            (2, 2, 5, 256, 8),
            (3, 1, 2, 80, 80),
            (1, 40, 33, 32, 2),
        ],
    )
    @pytest.mark.parametrize(("silu", "scale_shift", "labels"), [(True, True, True), (False, False, False)])
    def test_matches_float64(self, isa, n, h, w, c, groups, silu, scale_shift, labels) -> None:
        norm, tables = Norm(groups, silu, scale_shift), Tables(n, labels)
        source, x = slice_of(random(n, h, w, c, seed=3, dtype=DTYPES[isa]) * 2 + 0.5)
        target, y = slice_of(torch.zeros_like(x), before=16, after=40)
        norm.run(isa, x, y, tables)
        assert relative_error(y, norm.exact(x, tables)) < NORM_TOLERANCE[DTYPES[isa]]
        assert guards_hold(target, y)
        assert guards_hold(source, x)

    def test_scale_shift_without_labels_and_silu_alone(self, isa) -> None:
        x, tables = random(2, 6, 5, 64, seed=3, dtype=DTYPES[isa]), Tables(2, labels=False)
        for norm in (Norm(16, silu=False, scale_shift=True), Norm(16)):
            got = norm.run(isa, x, torch.empty_like(x), tables)
            assert relative_error(got, norm.exact(x, tables)) < NORM_TOLERANCE[DTYPES[isa]]

    @pytest.mark.parametrize("of_groups", [False, True])
    def test_a_mean_far_from_zero_costs_no_digits(self, isa, of_groups) -> None:
        """1000 standard deviations away in float32, where the square of the mean alone has as many digits as a float;
        all alike, or each group elsewhere."""
        far = 1000.0 if DTYPES[isa] == torch.float32 else 30.0
        mean = far * (torch.arange(64) // 8 * 2 - 7 if of_groups else 1)
        x = (random(2, 12, 13, 64, seed=3) + mean).to(DTYPES[isa])
        norm, tables = Norm(8, silu=False), Tables(2, labels=False)
        exact = norm.exact(x, tables)
        assert exact.std() > 0.5
        got = norm.run(isa, x, torch.empty_like(x), tables)
        assert relative_error(got, exact) < NORM_TOLERANCE[DTYPES[isa]]

    def test_constant_groups_become_beta(self, isa) -> None:
        x, norm = torch.full((1, 9, 9, 32), 3.1, dtype=DTYPES[isa]), Norm(4, silu=False)
        got = norm.run(isa, x, torch.empty_like(x), Tables(1, labels=False))
        assert torch.equal(got, norm.weights(32)[1].to(DTYPES[isa]).expand_as(x))

    def test_nan_stays_in_its_image_and_group(self, isa) -> None:
        x = random(2, 4, 4, 48, seed=3, dtype=DTYPES[isa])
        x[1, 2, 3, 13] = float("nan")
        got = Norm(4).run(isa, x, torch.empty_like(x), Tables(2, labels=False))
        assert got[1, :, :, 12:24].isnan().all()
        assert not got[0].isnan().any()
        assert not got[1, :, :, :12].isnan().any()
        assert not got[1, :, :, 24:].isnan().any()

    @pytest.mark.parametrize(("n", "c", "groups"), [(1, 128, 32), (3, 96, 8)])
    def test_bits_depend_on_neither_threads_nor_batch_nor_place(self, isa, n, c, groups) -> None:
        norm, tables = Norm(groups, scale_shift=True), Tables(n, labels=True)
        x = random(n, 17, 16, c, seed=3, dtype=DTYPES[isa])
        expected = norm.run(isa, x, torch.empty_like(x), tables)
        for threads in (2, 3):
            assert torch.equal(norm.run(isa, x, torch.empty_like(x), tables, threads), expected)
        in_place = x.clone()
        assert torch.equal(norm.run(isa, in_place, in_place, tables, 2), expected)
        alone = norm.run(isa, x[:1], torch.empty_like(x[:1]), tables)
        assert torch.equal(alone, expected[:1])


class Attend:
    """An attention layer; qkv: [n, tokens, 3 c] slice."""

    def __init__(self, heads: int, scale: float | None = None) -> None:
        self.heads, self.scale = heads, scale

    def scale_of(self, c: int) -> float:
        return (c // self.heads) ** -0.5 if self.scale is None else self.scale

    def run(self, isa: str, qkv: Tensor, y: Tensor, threads: int = 1) -> Tensor:
        n, tokens, c = y.shape
        program = extension._C.Program(COLUMNS)
        source, target = (qkv.data_ptr(), qkv.stride(1)), (y.data_ptr(), y.stride(1))
        program.attention(isa, n, tokens, c, self.heads, self.scale_of(c), 0, 0, 0, *source, *target)
        Tables(n, labels=False).run(program, threads)
        return y

    def exact(self, qkv: Tensor) -> Tensor:
        n, tokens, c = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
        parts = qkv.double().reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = parts[0] @ parts[1].transpose(2, 3) * self.scale_of(c)
        return (scores.softmax(-1) @ parts[2]).transpose(1, 2).reshape(n, tokens, c)


def output_of(qkv: Tensor) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@pytest.mark.parametrize("isa", DTYPES)
class TestAttention:
    @pytest.mark.parametrize(
        ("n", "tokens", "c", "heads"),
        [
            (1, 1, 8, 1),
            (2, 5, 16, 2),  # 8 channels a head
            (1, 2, 2, 1),
            (3, 50, 48, 2),  # 24
            (1, 65, 64, 1),
            (2, 64, 192, 3),
            (1, 100, 256, 1),
            (1, 16, 320, 4),  # 80
            (1, 257, 80, 2),  # two blocks of keys; 40
            (2, 530, 48, 6),  # three
        ],
    )
    def test_matches_float64(self, isa, n, tokens, c, heads) -> None:
        attend = Attend(heads)
        source, qkv = slice_of(random(n, tokens, 3 * c, seed=4, dtype=DTYPES[isa]), before=2, after=0)
        target, y = slice_of(torch.zeros(n, tokens, c, dtype=DTYPES[isa]), before=6, after=2)
        attend.run(isa, qkv, y)
        assert relative_error(y, attend.exact(qkv)) < ATTENTION_TOLERANCE[DTYPES[isa]]
        assert guards_hold(target, y)
        assert guards_hold(source, qkv)

    @pytest.mark.parametrize("order", [1, -1])
    def test_scores_that_grow_or_fall_from_block_to_block(self, isa, order) -> None:
        """Sums over earlier keys have to be rescaled, or to stay; and scores are far beyond what e^x can hold."""
        tokens, c = 700, 16
        qkv = random(1, tokens, 3 * c, seed=5)
        qkv[..., :c] = 1
        qkv[..., c : 2 * c] += torch.arange(tokens)[None, :, None] * (order * 0.05)
        qkv, attend = qkv.to(DTYPES[isa]), Attend(1, scale=1.0)
        assert (
            relative_error(attend.run(isa, qkv, output_of(qkv)), attend.exact(qkv))
            < 2 * ATTENTION_TOLERANCE[DTYPES[isa]]
        )

    def test_equal_scores_average_the_values(self, isa) -> None:
        qkv = random(2, 37, 96, seed=6, dtype=DTYPES[isa])
        qkv[..., :32] = 0
        got = Attend(4).run(isa, qkv, output_of(qkv)).double()
        mean = qkv[..., 64:].double().mean(1, keepdim=True)
        assert relative_error(got, mean.expand_as(got)) < ATTENTION_TOLERANCE[DTYPES[isa]]

    def test_many_tokens(self, isa) -> None:
        qkv, attend = random(1, 4096, 24, seed=7, dtype=DTYPES[isa]) * 2, Attend(1)
        got = attend.run(isa, qkv, output_of(qkv), threads=2)
        # The result is an average of thousands: probabilities, not results, are what is rounded.
        assert relative_error(got, attend.exact(qkv)) < ATTENTION_TOLERANCE[DTYPES[isa]]

    def test_nan_stays_in_its_image_and_head(self, isa) -> None:
        qkv = random(2, 20, 96, seed=8, dtype=DTYPES[isa])
        qkv[1, 3, 17] = float("nan")  # a query of the second head
        got = Attend(2).run(isa, qkv, output_of(qkv))
        assert got[1, 3, 16:].isnan().all()
        assert got.isnan().sum() == 16

    @pytest.mark.parametrize(("n", "tokens", "c", "heads"), [(1, 300, 32, 1), (3, 70, 48, 2)])
    def test_bits_depend_on_neither_threads_nor_batch(self, isa, n, tokens, c, heads) -> None:
        attend, qkv = Attend(heads), random(n, tokens, 3 * c, seed=9, dtype=DTYPES[isa])
        expected = attend.run(isa, qkv, output_of(qkv))
        for threads in (2, 3):
            assert torch.equal(attend.run(isa, qkv, output_of(qkv), threads), expected)
        assert torch.equal(attend.run(isa, qkv[:1], output_of(qkv[:1])), expected[:1])


class TestBadInput:
    @staticmethod
    def norm(*, n=1, h=2, w=2, c=32, groups=4, columns=(-1, -1)) -> None:
        isa = next(iter(DTYPES))
        extension._C.Program(COLUMNS).norm(isa, n, h, w, c, groups, 1e-5, 0, c, 0, 0, True, *columns, 0, c)

    @staticmethod
    def attention(*, n=1, tokens=4, c=32, heads=2, scale=1.0) -> None:
        isa = next(iter(DTYPES))
        extension._C.Program(COLUMNS).attention(isa, n, tokens, c, heads, scale, 0, 0, 0, 0, 3 * c, 0, c)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"n": 0}, "n, h and w must be at least 1, got 0, 2, 2"),
            ({"c": 24}, "channels must be a multiple of 16, got 24"),
            ({"groups": 5}, "channels must be a multiple of groups, got 32 channels and 5 groups"),
            ({"groups": 0}, "channels must be a multiple of groups, got 32 channels and 0 groups"),
            ({"columns": (3, -1)}, "scale_column and shift_column must both be columns or both -1, got 3 and -1"),
        ],
    )
    def test_norm(self, arguments, message) -> None:
        with pytest.raises(ValueError, match=message):
            self.norm(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"tokens": 0}, "n and tokens must be at least 1, got 1 and 0"),
            ({"heads": 3}, "channels must be a multiple of twice the heads, got 32 channels and 3 heads"),
            ({"heads": 32}, "channels must be a multiple of twice the heads, got 32 channels and 32 heads"),
            ({"scale": 0.0}, "scale must be positive, got 0"),
            ({"scale": float("nan")}, "scale must be positive, got nan"),
        ],
    )
    def test_attention(self, arguments, message) -> None:
        with pytest.raises(ValueError, match=message):
            self.attention(**arguments)

    def test_what_fits_is_taken(self) -> None:
        self.norm()
        self.attention()
