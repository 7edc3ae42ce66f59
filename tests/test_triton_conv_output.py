"""The last layer in Triton, alone and with the reverse step: in the interpreter, or on the GPU where there is one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support import assert_same

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

from ddpm_fast.backends import reference
from ddpm_fast.backends.triton import launch
from ddpm_fast.backends.triton.conv_output import Output
from ddpm_fast.noise import make_rng

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not launch.INTERPRETED else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [
    pytest.param((2, 6, 10), 48, 3, id="odd"),
    pytest.param((1, 4, 4), 96, 1, id="one_channel"),
    pytest.param((3, 2, 2), 16, 4, id="tiny_images"),
    pytest.param((2, 16, 24), 128, 3, id="several_programs"),
]
NINE_TAPS = [
    pytest.param((2, 7, 5), 48, 3, id="odd"),
    pytest.param((3, 1, 1), 16, 4, id="pixels"),
    pytest.param((2, 1, 9), 16, 1, id="lines"),
    pytest.param((2, 16, 24), 128, 3, id="several_programs"),
]
TABLE = torch.tensor([[1.01, 0.5, 0.3, 0.7, 0.01, 0.0, 0.2, 1.0], [1.2, 0.4, 0.0, 0.9, -0.1, 0.0, 0.0, 0.5]]).to(DEVICE)
T_OF_ROW = torch.tensor([7, 0], dtype=torch.int32, device=DEVICE)
RNG = make_rng(2**64 - 3, 2**33 + 5).to(DEVICE)


def layer(size, channels, outputs, dtype=torch.float32, side=1):
    """A source in the middle of a wider buffer with an image of NaN on either side, a weight and a bias."""
    draw = torch.Generator().manual_seed(0)
    n, *sides = size
    buffer = torch.randn(n + 2, *sides, channels + 32, generator=draw).to(DEVICE, dtype)
    buffer[[0, -1]] = float("nan")
    weight = torch.randn(outputs, channels, side, side, generator=draw).to(memory_format=torch.channels_last)
    return buffer[1:-1, ..., 16:-16], weight.to(DEVICE), torch.randn(outputs, generator=draw).to(DEVICE)


def predicted(source, weight, bias):
    out = torch.full((source.shape[0], len(bias), *source.shape[1:3]), float("nan"), device=DEVICE)
    Output(source, weight, bias)(out)
    return out


def step(last, x, row, **kwargs):
    bad_row = torch.tensor([-1], dtype=torch.int32, device=DEVICE)
    last.step(x, TABLE, T_OF_ROW, torch.tensor([row], device=DEVICE), RNG, bad_row, **kwargs)
    return bad_row


def check_products(source, weight, bias):
    exact = F.conv2d(source.permute(0, 3, 1, 2).double(), weight.double(), bias.double(), padding=weight.shape[-1] // 2)
    got = predicted(source, weight, bias)
    assert (got.double() - exact).norm() < 3e-7 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "channels", "outputs"), CASES)
def test_multiplies_in_float32(size, channels, outputs, dtype):
    check_products(*layer(size, channels, outputs, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "channels", "outputs"), NINE_TAPS)
def test_nine_taps_multiply_in_float32(size, channels, outputs, dtype):
    check_products(*layer(size, channels, outputs, dtype, side=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("size", "channels", "outputs"), CASES)
def test_with_the_step_it_has_the_bits_of_one_after_the_other(size, channels, outputs, dtype):
    source, weight, bias = layer(size, channels, outputs, dtype)
    m = predicted(source, weight, bias)
    for row in (0, 1, 2, -1):  # with noise, without, and outside the table on both sides
        start = torch.randn(m.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        x, x0 = start.clone(), torch.zeros_like(m)
        bad_row = step(Output(source, weight, bias), x, row, x0_out=x0)
        x_expected, x0_expected, bad_expected = start.cpu(), torch.zeros_like(m).cpu(), torch.tensor([-1]).int()
        reference.ddpm_step(
            *(x_expected, m.cpu(), TABLE.cpu(), T_OF_ROW.cpu(), torch.tensor([row]), RNG.cpu()),
            *[None] * 7,
            *(x0_expected, None, bad_expected),
        )
        assert_same(x, x_expected)
        assert_same(x0, x0_expected)
        assert_same(bad_row, bad_expected)


def test_writes_nothing_but_its_images():
    source, weight, bias = layer((2, 6, 10), 16, 3)
    memory = torch.full((2 * 3 * 60 + 64,), 55.0, device=DEVICE)
    x = memory[32:-32].view(2, 3, 6, 10)
    x.zero_()
    step(Output(source, weight, bias), x, 0)
    assert (x != 0).all()
    Output(source, weight, bias)(x)
    assert (memory[:32] == 55).all()
    assert (memory[-32:] == 55).all()


def test_noise_is_that_of_the_sample_and_the_timestep():
    """x0 and m without weight: what is left is s z, with z = normal(seed, first sample + i, t + 1)."""
    source, weight, bias = layer((3, 4, 4), 16, 2)
    x = torch.zeros(3, 2, 4, 4, device=DEVICE)
    step(Output(source, torch.zeros_like(weight), torch.zeros_like(bias)), x, 0)
    z = torch.empty(x.shape)
    reference.normal(z, RNG.cpu(), 8)
    assert_same(x, 0.2 * z)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_row_that_breaks_is_noted_once():
    source, weight, bias = layer((1, 4, 4), 16, 1)
    source[0, 1, 2, 3] = float("inf")
    x, bad_row = torch.zeros(1, 1, 4, 4, device=DEVICE), torch.tensor([-1], dtype=torch.int32, device=DEVICE)
    last = Output(source, weight, bias)
    for row in (1, 0):
        last.step(x, TABLE, T_OF_ROW, torch.tensor([row], device=DEVICE), RNG, bad_row)
    assert int(bad_row) == 1


def test_bad_input():
    with pytest.raises(ValueError, match="multiple of 16, got 24"):
        Output(*layer((1, 4, 4), 24, 3))
    with pytest.raises(ValueError, match="at most 8 output channels are served, got 9"):
        Output(*layer((1, 4, 4), 16, 9))
    with pytest.raises(ValueError, match="multiple of 4 for a step in one pass, got 9"):
        step(Output(*layer((1, 3, 3), 16, 1)), torch.zeros(1, 1, 3, 3), 0)
    with pytest.raises(ValueError, match="only a 1x1 layer and the step are one pass, got 9 taps"):
        step(Output(*layer((1, 4, 4), 16, 1, side=3)), torch.zeros(1, 1, 4, 4), 0)
    source, weight, bias = layer((1, 4, 4), 16, 3, side=3)
    with pytest.raises(ValueError, match=r"weight must be channels_last, got strides \(144, 9, 3, 1\)"):
        Output(source, weight.contiguous(), bias)
    last = Output(*layer((2, 4, 4), 16, 3))
    for x in (torch.zeros(2, 3, 4, 4, dtype=torch.float16), torch.zeros(2, 4, 4, 3).permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match="x must be contiguous float32, got torch"):
            step(last, x, 0)
