"""The RMSNorm of fused plans in Triton against float64, in the interpreter or on the GPU where there is one; and
rms_norm_silu in many small programs, in the interpreter."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import rand
from test_triton_norm import BOUND, DEVICE, FIRST, GUARD

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

from ddpm_fast.backends import reference
from ddpm_fast.backends import triton as backend
from ddpm_fast.backends.layout import Layout
from ddpm_fast.backends.triton import _rms_norm, launch
from ddpm_fast.backends.triton.rms_norm import RMSNorm
from ddpm_fast.inference.gpu_tiles import pixel_blocks

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here: there is a GPU")

EPS = 1e-12


class Case:
    """A norm of random numbers: NaN beside its source and residual, guards beside its target."""

    def __init__(
        self, size, channels, dtype=torch.float32, *, silu=True, modulated=False, labels=False, residual=False
    ):
        draw = torch.Generator().manual_seed(0)
        randn = lambda *shape: torch.randn(*shape, generator=draw).to(DEVICE)  # noqa: E731
        n, h, w = size
        self.silu, self.modulated = silu, modulated
        self.source, self.residual = (
            torch.full((n + 2, h, w, channels + more), float("nan"), dtype=dtype, device=DEVICE)[
                1:-1, ..., 16 : 16 + channels
            ]
            for more in (32, 64)
        )
        self.source.copy_(randn(n, h, w, channels) * (1 + torch.rand(channels, generator=draw).to(DEVICE)) + 0.5)
        self.residual = self.residual.copy_(randn(n, h, w, channels)) if residual else None
        self.buffer = torch.full((n + 2, h, w, channels + 48), GUARD, dtype=dtype, device=DEVICE)
        self.target = self.buffer[1:-1, ..., 16 : 16 + channels]
        self.weight = randn(channels) * channels**0.5
        self.table, self.rows = randn(5, 2 * channels + 32), torch.arange(n).remainder(5).to(DEVICE)
        self.label_table = randn(3, 2 * channels + 32) if labels else None
        self.label_rows = torch.arange(n).remainder(3).to(DEVICE) if labels else None

    def run(self, pixels, warps=1, eps=EPS):
        norm = RMSNorm(
            *(self.source, self.weight, self.target, eps, pixels, warps),
            silu=self.silu,
            first_column=FIRST if self.modulated else None,
            residual=self.residual,
        )
        norm(self.table, self.rows, self.label_table, self.label_rows)
        return self.target.clone()

    def check(self, eps=EPS):
        x = self.source.double()
        y = F.normalize(x, dim=3, eps=eps) * self.weight.double()
        if self.modulated:
            temb = self.table[self.rows].double()
            if self.label_table is not None:
                temb = temb + self.label_table[self.label_rows].double()
            scale, shift = temb[:, None, None, FIRST : FIRST + 2 * x.shape[3]].chunk(2, dim=3)
            y = y * (1 + scale) + shift
        y = F.silu(y) if self.silu else y
        y = y if self.residual is None else y + self.residual.double()
        assert (self.target.double() - y).norm() < BOUND[self.target.dtype] * y.norm()
        self.target.fill_(GUARD)
        assert (self.buffer == GUARD).all()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    ("size", "channels", "pixels", "options"),
    [
        pytest.param((2, 6, 10), 64, 16, {"modulated": True}, id="several_programs_an_image"),
        pytest.param((3, 4, 4), 48, 16, {"silu": False, "residual": True}, id="channels_no_power_of_two"),
        pytest.param((2, 7, 5), 80, 4, {"modulated": True, "residual": True}, id="odd_sides"),
        pytest.param((2, 3, 3), 112, 16, {"modulated": True, "labels": True}, id="fewer_pixels_than_a_program"),
        pytest.param((3, 1, 1), 2048, 1, {"residual": True}, id="single_pixels_of_many_channels"),
        pytest.param((1, 5, 3), 16, 8, {"silu": False}, id="neither_activation_nor_residual"),
    ],
)
def test_matches_float64(size, channels, pixels, options, dtype):
    case = Case(size, channels, dtype, **options)
    case.run(pixels)
    case.check()


@pytest.mark.parametrize("eps", [EPS, 2.0])
def test_pixels_below_eps_are_divided_by_eps(eps):
    case = Case((2, 3, 3), 32)
    case.source[0, 1] *= 1e-8
    case.source[1, 0] = 0
    y = case.run(16, eps=eps)
    assert (y[1, 0] == 0).all()
    case.check(eps)


@pytest.mark.parametrize("row", [-1, 5, 2**40])
def test_a_row_outside_the_table_makes_nan_of_its_sample_alone(row):
    case = Case((3, 2, 2), 16, modulated=True, labels=True)
    case.rows[1] = row
    case.label_rows[2] = row
    y = case.run(4)
    assert y[1:].isnan().all()
    assert y[0].isfinite().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nan_and_infinity_stay_in_their_pixel():
    case = Case((2, 3, 3), 32)
    case.source[0, 1, 1, 3], case.source[1, 0, 0, 31] = float("nan"), float("inf")
    y = case.run(16)
    for image, at in ((0, (1, 1)), (1, (0, 0))):
        assert y[image][at].isnan().any()
        y[image][at] = 0
    assert y.isfinite().all()


def test_bad_input():
    case = Case((1, 2, 2), 16)
    wide = torch.empty(1, 2, 2, 4112, device="meta")
    with pytest.raises(ValueError, match="a pixel can have at most 4096 channels, got 4112"):
        RMSNorm(wide, case.weight, wide, EPS, 1, 4)
    large = torch.empty(1, 8192, 8192, 64, device="meta")
    with pytest.raises(ValueError, match=r"an image can have at most .* got 67108864 pixels of 64"):
        RMSNorm(large, case.weight, large, EPS, 16, 4)


def test_programs_have_at_most_sixteen_elements_a_thread_and_no_more_pixels_than_the_image():
    assert pixel_blocks(64, 1024) == [(32, 4), (64, 8), (16, 4)]
    assert pixel_blocks(64, 16) == [(16, 2), (16, 4)]
    assert pixel_blocks(512, 64) == [(4, 4), (8, 8), (2, 4)]
    assert pixel_blocks(4096, 64) == [(1, 8)]
    assert pixel_blocks(4112, 64) == []
    for channels in (16, 48, 384, 2048):
        for pixels in (1, 4, 1000):
            for block, warps in pixel_blocks(channels, pixels):
                elements = block * launch.power_of_two(channels) / (32 * warps)
                assert 0 < elements <= 16


# ---- the op in many programs ----------------------------------------------------------------------------------------


@pytest.fixture
def small_programs(monkeypatch):
    """Programs of 64 elements, and in the backward pass several tiles in one."""
    monkeypatch.setattr(_rms_norm, "INTERPRETED_ELEMENTS", 64)
    monkeypatch.setattr(_rms_norm, "PARTS", 1)


CASES = [
    pytest.param((2, 3, 5, 7), False, 1.5, id="tiles_of_several_channels"),
    pytest.param((1, 6, 5, 7), True, 0.0, id="channels_last"),
    pytest.param((1, 21, 3, 3), False, 0.0, id="channels_in_runs"),
    pytest.param((1, 70, 3), True, 7.0, id="channels_in_runs_channels_last"),
    pytest.param((2, 130), False, 1e-12, id="vectors_in_runs"),
]


@interpreted
@pytest.mark.parametrize(("shape", "last", "eps"), CASES)
def test_the_op_in_many_programs(small_programs, shape, last, eps):
    def image(seed):
        x = rand(shape, seed=seed)
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x

    h, g, residual = image(0), image(1), image(2)
    weight, beta = rand(shape[:2], seed=3), rand(shape[1:2], seed=4)
    got = backend.rms_norm_silu(h, weight, beta, residual, eps, "silu")
    expected = reference.rms_norm_silu(h, weight, beta, residual, eps, "silu")
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    assert got.stride() == h.stride()
    needed = (True, True, True)
    both = [op.rms_norm_silu_backward(g, h, weight, beta, eps, "silu", *needed) for op in (backend, reference)]
    for mine, true in zip(*both, strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-5, atol=1e-5)
    for k in range(3):  # each alone, with the same bits
        alone = backend.rms_norm_silu_backward(g, h, weight, beta, eps, "silu", *(i == k for i in range(3)))
        assert torch.equal(alone[k], both[0][k])
        assert [x.numel() for i, x in enumerate(alone) if i != k] == [0, 0]


@interpreted
def test_a_program_has_several_tiles_only_where_it_writes_sums(small_programs):
    layout = Layout.of(torch.empty(1, 4, 256, device="meta"))
    for sums, span in ((False, 16), (True, 128)):
        blocks = _rms_norm.Blocks(layout, 16, 1e-12, sums=sums)
        assert (blocks.constants["BLOCK_P"], blocks.constants["SPAN"], blocks.parts) == (16, span, 256 // span)
