"""The GroupNorm of fused plans in Triton against float64: in the interpreter, or on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

from ddpm_fast.backends.triton import launch
from ddpm_fast.backends.triton.norm import Norm
from ddpm_fast.inference.gpu_tiles import spans

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not launch.INTERPRETED else "cpu")
GUARD = 55.0
# Of the norm of the result: one rounding of it to the dtype, and in float32 that of the sums.
BOUND = {torch.float32: 1e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}
EPS = 1e-5
FIRST = 8


class Case:
    """A norm of random numbers: NaN beside its source, guards beside its target."""

    def __init__(
        self, size, channels, groups, dtype=torch.float32, *, silu=True, modulated=False, labels=False, mean=0.5
    ):
        draw = torch.Generator().manual_seed(0)
        randn = lambda *shape: torch.randn(*shape, generator=draw).to(DEVICE)  # noqa: E731
        n, h, w = size
        self.groups, self.silu, self.modulated = groups, silu, modulated
        buffer = torch.full((n + 2, h, w, channels + 32), float("nan"), dtype=dtype, device=DEVICE)
        self.source = buffer[1:-1, ..., 16:-16]
        self.source.copy_(randn(n, h, w, channels) * (1 + torch.rand(channels, generator=draw).to(DEVICE)) + mean)
        self.buffer = torch.full((n + 2, h, w, channels + 48), GUARD, dtype=dtype, device=DEVICE)
        self.target = self.buffer[1:-1, ..., 16 : 16 + channels]
        self.weight, self.bias = randn(channels), randn(channels)
        self.table, self.rows = randn(5, 2 * channels + 32), torch.arange(n).remainder(5).to(DEVICE)
        self.label_table = randn(3, 2 * channels + 32) if labels else None
        self.label_rows = torch.arange(n).remainder(3).to(DEVICE) if labels else None

    def run(self, span, warps=4):
        first = FIRST if self.modulated else None
        norm = Norm(
            *(self.source, self.weight, self.bias, self.target, self.groups, EPS, span, warps),
            silu=self.silu,
            first_column=first,
        )
        norm(self.table, self.rows, self.label_table, self.label_rows)
        return self.target.clone()

    def exact(self):
        x = self.source.permute(0, 3, 1, 2).double()
        y = F.group_norm(x, self.groups, self.weight.double(), self.bias.double(), EPS)
        if self.modulated:
            temb = self.table[self.rows].double()
            if self.label_table is not None:
                temb = temb + self.label_table[self.label_rows].double()
            scale, shift = temb[:, FIRST : FIRST + 2 * x.shape[1], None, None].chunk(2, dim=1)
            y = y * (1 + scale) + shift
        return (F.silu(y) if self.silu else y).permute(0, 2, 3, 1)

    def check(self):
        expected = self.exact()
        assert (self.target.double() - expected).norm() < BOUND[self.target.dtype] * expected.norm()
        self.target.fill_(GUARD)
        assert (self.buffer == GUARD).all()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("size", "channels", "groups", "span", "options"),
    [
        pytest.param((2, 6, 10), 64, 8, 32, {}, id="several_blocks_of_pixels"),
        pytest.param((3, 4, 4), 48, 4, 24, {"silu": False}, id="groups_of_twelve"),
        pytest.param((2, 7, 5), 80, 8, 40, {"modulated": True}, id="odd_sides_modulated"),
        pytest.param((2, 3, 3), 112, 14, 32, {"modulated": True, "labels": True}, id="last_program_half_empty"),
        pytest.param((3, 1, 1), 32, 2, 32, {}, id="single_pixels"),
        pytest.param((1, 5, 3), 64, 1, 64, {}, id="one_group"),
        pytest.param((1, 5, 5), 16, 16, 16, {}, id="a_group_per_channel"),
    ],
)
def test_matches_float64(size, channels, groups, span, options, dtype):
    case = Case(size, channels, groups, dtype, **options)
    case.run(span, warps=1)
    case.check()


def test_a_large_mean_costs_no_digits():
    """Squares of the values themselves would leave nothing of the variance."""
    case = Case((2, 16, 16), 32, 4, mean=3000.0, silu=False)
    case.run(32, warps=1)
    case.check()


def test_of_a_constant_image_the_bias_is_left():
    case = Case((2, 5, 5), 32, 4, silu=False)
    case.source.fill_(0.1)
    assert torch.equal(case.run(32, warps=1), case.bias.expand(2, 5, 5, 32))


def test_outliers_in_front_cost_no_digits():
    case = Case((1, 16, 16), 32, 4, silu=False)
    case.source[:, 0, 0] = 4000.0
    case.run(32, warps=1)
    case.check()


@pytest.mark.parametrize("row", [-1, 5, 2**40])
def test_a_row_outside_the_table_makes_nan_of_its_sample_alone(row):
    case = Case((3, 2, 2), 16, 4, modulated=True, labels=True)
    case.rows[1] = row
    case.label_rows[2] = row
    y = case.run(16)
    assert y[1:].isnan().all()
    assert y[0].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_stay_in_their_group():
    case = Case((2, 3, 3), 32, 4)
    case.source[0, 1, 1, 3], case.source[1, 0, 0, 31] = float("nan"), float("inf")
    y = case.run(32)
    assert y[0, ..., :8].isnan().all()
    assert y[0, ..., 8:].isfinite().all()
    assert y[1, ..., 24:].isnan().all()
    assert y[1, ..., :24].isfinite().all()


def test_bad_input():
    case = Case((1, 2, 2), 48, 4)
    for span in (16, 72):
        with pytest.raises(ValueError, match=f"groups of 12 channels, at most 64 channels, got {span}"):
            case.run(span)
    large = torch.empty(1, 8192, 8192, 64, device="meta")
    with pytest.raises(ValueError, match=r"an image can have at most .* got 67108864 pixels of 64"):
        Norm(large, case.weight, case.bias, large, 4, EPS, 16, 4)


def test_spans_are_whole_groups_of_at_least_two_sectors():
    assert spans(128, 32) == [(32, 16), (64, 16), (32, 8)]
    assert spans(384, 32) == [(48, 16), (48, 8)]
    assert spans(16, 4) == [(16, 16), (16, 8)]
    assert spans(1152, 32) == [(36, 16), (36, 8)]
    assert spans(1024, 8) == []
