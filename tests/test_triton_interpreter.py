"""The Triton helpers one by one in the interpreter, and what the op tests cannot reach: many programs per launch.

The op tests run every op through the interpreter too, but there one large program does a whole tensor. Here the
blocks are made tiny, so that grids, masks and the seams between programs are used.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

import triton.language as tl  # noqa: E402

from ddpm_fast import noise as spec  # noqa: E402
from ddpm_fast.backends import reference  # noqa: E402
from ddpm_fast.backends import triton as backend  # noqa: E402
from ddpm_fast.backends.triton import _math, _noise, launch  # noqa: E402

pytestmark = pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here: there is a GPU")

add_bias_temb_module = sys.modules["ddpm_fast.backends.triton.add_bias_temb"]


@triton.jit
def _unary_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, FUNCTION: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=1)
    if FUNCTION == "exp":
        y = _math.exp_f32(x)
    elif FUNCTION == "silu":
        y = _math.silu(x)
    elif FUNCTION == "silu_grad":
        y = _math.silu_grad(x)
    elif FUNCTION == "log":
        y = _noise.log_unit(x)
    elif FUNCTION == "clip":
        y = _math.clip(x, -0.5, 0.5)
    elif FUNCTION == "negated":
        y = _math.negated(x)
    elif FUNCTION == "sin":
        y, _ = _noise.sincos_turn(x.to(tl.uint32, bitcast=True))
    else:
        _, y = _noise.sincos_turn(x.to(tl.uint32, bitcast=True))
    tl.store(y_ptr + i, y, mask=i < n)


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    _math.store_image(y_ptr + i, _math.load_image(x_ptr + i, i < n), i < n)


@triton.jit
def _philox_kernel(counter_ptr, key_ptr, out_ptr):
    c0, c1, c2, c3 = (tl.load(counter_ptr + word).to(tl.uint32) for word in range(4))
    r0, r1, r2, r3 = _noise.philox4x32_10(tl.load(key_ptr), c0, c1, c2, c3)
    tl.store(out_ptr, r0.to(tl.int64))
    tl.store(out_ptr + 1, r1.to(tl.int64))
    tl.store(out_ptr + 2, r2.to(tl.int64))
    tl.store(out_ptr + 3, r3.to(tl.int64))


@triton.jit
def _sum_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    x = tl.load(x_ptr + row * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(out_ptr + row, _math.sum_over_columns(x))


def apply(function: str, x: torch.Tensor) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=torch.float32)
    _unary_kernel[(1,)](x, y, x.numel(), BLOCK=triton.next_power_of_2(x.numel()), FUNCTION=function)
    return y


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, y, x.numel(), BLOCK=triton.next_power_of_2(x.numel()))
    return y


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in every bit, the sign of zeros included; any NaN equals any NaN."""
    nan = expected.isnan()
    assert torch.equal(got.isnan(), nan)
    assert torch.equal(got[~nan], expected[~nan])
    assert torch.equal(torch.signbit(got[~nan]), torch.signbit(expected[~nan]))


def many_floats() -> torch.Tensor:
    """Floats of every exponent and sign, subnormals, infinities and NaN, and a fine net over [-130, 130]."""
    bits = torch.arange(-(2**31), 2**31, 65537, dtype=torch.int64).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), -126.0, 126.0])
    return torch.cat([bits, torch.linspace(-130, 130, 60001), special])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("function", ["exp", "silu", "silu_grad"])
def test_functions_have_the_bits_of_the_reference(function):
    x = many_floats()
    assert_same_bits(apply(function, x), getattr(reference, function)(x))


def test_log_and_sincos_have_the_bits_of_the_specification():
    words = np.random.default_rng(0).integers(0, 2**32, 50000, dtype=np.uint32)
    words = np.concatenate([words, np.array([0, 1, 2**29 - 1, 2**29, 2**30, 2**31, 2**32 - 1], dtype=np.uint32)])
    u = (words.astype(np.float32) * np.float32(2**-32) + np.float32(2**-33)).astype(np.float32)
    assert_same_bits(apply("log", torch.from_numpy(u)), torch.from_numpy(spec.log_unit(u)))
    sin, cos = spec.sincos_turn(words)
    turns = torch.from_numpy(words.view(np.int32))
    assert_same_bits(apply("sin", turns), torch.from_numpy(sin))
    assert_same_bits(apply("cos", turns), torch.from_numpy(cos))


def test_philox_gives_the_published_answers():
    """Random123's known answers for Philox4x32-10."""
    for word, expected in (
        (0, ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]),
        (2**32 - 1, ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]),
    ):
        out = torch.empty(4, dtype=torch.int64)
        key = torch.tensor([-1 if word else 0], dtype=torch.int64)
        _philox_kernel[(1,)](torch.full((4,), word, dtype=torch.int64), key, out)
        assert [f"{value:08x}" for value in out.tolist()] == expected


def test_clip_keeps_nan_and_negation_flips_zeros():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.7, -0.7, 0.25, -0.0])
    assert_same_bits(apply("clip", x), torch.tensor([float("nan"), 0.5, -0.5, 0.5, -0.5, 0.25, -0.0]))
    assert_same_bits(apply("negated", torch.tensor([0.0, -0.0, 1.5])), torch.tensor([-0.0, 0.0, -1.5]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_casts_round_to_nearest_even_and_keep_subnormals():
    every_half = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        x = every_half.view(dtype)
        assert_same_bits(cast(x, torch.float32), x.float())
        assert_same_bits(cast(many_floats(), dtype).float(), many_floats().to(dtype).float())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_bytes_round_half_to_even_and_saturate():
    every_byte = torch.arange(256).to(torch.uint8)
    assert_same_bits(cast(every_byte, torch.float32), every_byte.float() / 127.5 - 1)
    assert torch.equal(cast(cast(every_byte, torch.float32), torch.uint8), every_byte)
    x = torch.cat([torch.linspace(-1.1, 1.1, 5001), many_floats()])
    assert torch.equal(cast(x, torch.uint8), reference._byte(x))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sums_are_rounded_about_once():
    x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-20, 20, 16)[:, None]
    x = torch.cat([x, torch.ones(3, 1024)])[:16]
    x[14, 5], x[15, 5] = float("inf"), float("nan")
    out = torch.empty(16)
    _sum_kernel[(1,)](x, out, ROWS=16, COLUMNS=1024)
    exact = x.double().sum(1)
    assert out[14] == float("inf")
    assert out[15].isnan()
    # Adding neighbours first leaves an error of a few roundings of single terms, whatever the length of the sum.
    bound = 2.0**-24 * exact.abs() + 2.0**-20 * x.double().abs().amax(1)
    assert ((out.double() - exact).abs() <= bound)[:14].all()


def test_float_bits_and_streams_travel_as_int32():
    assert launch.float_bits(1.0) == 0x3F800000
    assert np.int32(launch.float_bits(-0.1)).view(np.float32) == np.float32(-0.1)
    assert launch.int32(2**31 + 3) == -(2**31) + 3
    assert launch.int32(7) == 7


# ---- many programs ---------------------------------------------------------------------------------------------------

CASES = [
    pytest.param((3, 2, 2, 8), False, id="whole_quads"),
    pytest.param((3, 2, 2, 8), True, id="whole_quads_channels_last"),
    pytest.param((2, 3, 5, 3), False, id="odd"),
    pytest.param((2, 3, 5, 3), True, id="odd_channels_last"),
    pytest.param((2, 5, 4), True, id="sequence_channels_last"),
    pytest.param((9, 2), False, id="vectors"),
    pytest.param((1, 21), False, id="one_vector"),
    pytest.param((7,), False, id="numbers"),
]


@pytest.fixture
def tiny_programs(monkeypatch):
    """Programs of 4 quads, and a grid whose second axis ends at 2 so that the third is needed."""
    monkeypatch.setattr(launch, "INTERPRETED_QUADS", 4)
    monkeypatch.setattr(launch, "MAX_GRID_Y", 2)
    monkeypatch.setattr(add_bias_temb_module, "INTERPRETED_ELEMENTS", 16)
    monkeypatch.setattr(add_bias_temb_module, "SUMMED_PIXELS", 8)


def formatted(x: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last and x.dim() > 2 else x


def draw(shape: tuple[int, ...], channels_last: bool = False, seed: int = 0) -> torch.Tensor:
    return formatted(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), channels_last)


RNG = spec.make_rng(2**64 - 3, 2**33 + 5)
TABLE = torch.rand(20, 2, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("shape", "channels_last"), CASES)
class TestManyPrograms:
    def test_normal(self, tiny_programs, shape, channels_last):
        for op, dtype in (("normal", torch.float32), ("random_bits", torch.int64)):
            # Guard values on both sides show a store outside the tensor.
            memory = torch.full((draw(shape).numel() + 64,), 77).to(dtype)
            inside = memory[32:-32].view(draw(shape, channels_last).permute(*order(shape, channels_last)).shape)
            out = inside.permute(*inverse(order(shape, channels_last)))
            expected = torch.empty(shape, dtype=dtype)
            getattr(backend, op)(out, RNG, 2**31 + 1)
            getattr(reference, op)(expected, RNG, 2**31 + 1)
            assert torch.equal(out, expected)
            assert (memory[:32] == 77).all()
            assert (memory[-32:] == 77).all()

    def test_q_sample(self, tiny_programs, shape, channels_last):
        x0, t = draw(shape, channels_last), torch.arange(shape[0]) + 15
        for noise, offset in ((None, 0.1), (draw(shape, channels_last, 3), 0.0)):
            args = (x0, t, TABLE, noise, RNG, 2**31, offset, "v", torch.float32)
            for got, expected in zip(backend.q_sample(*args), reference.q_sample(*args), strict=True):
                assert_same_bits(got, expected)
        args = (x0, draw(shape, channels_last, 4), t, TABLE, "v", torch.float32, True, True)
        for got, expected in zip(backend.q_sample_backward(*args), reference.q_sample_backward(*args), strict=True):
            assert_same_bits(got, expected)

    def test_noise_mse(self, tiny_programs, shape, channels_last):
        pred, x0, t = draw(shape, channels_last), draw(shape, channels_last, 1), torch.arange(shape[0])
        args = (pred, x0, t, TABLE, None, RNG, 2**31, 0.1, "v", "huber", 0.3)
        torch.testing.assert_close(backend.noise_mse(*args), reference.noise_mse(*args), rtol=3e-7, atol=0)
        g = draw((shape[0],), seed=2)
        assert_same_bits(backend.noise_mse_backward(g, *args), reference.noise_mse_backward(g, *args))

    def test_the_loss_of_a_sample_does_not_depend_on_its_batch(self, tiny_programs, shape, channels_last):
        pred = draw(shape, channels_last)
        rest = (None, None, None, None, RNG, 2**31, 0.0, "eps", "mse", 1.0)
        assert torch.equal(backend.noise_mse(pred, *rest)[:1], backend.noise_mse(pred[:1], *rest))

    def test_ddpm_step(self, tiny_programs, shape, channels_last):
        table = torch.tensor([[1.01, 0.5, 0.3, 0.7, 0.01, 0.1, 0.2, 1.0], [1.2, 0.4, 0.0, 0.9, -0.1, -0.2, 0.0, 0.5]])
        t_of_row = torch.tensor([7, 0], dtype=torch.int32)
        other = not channels_last
        for row in (0, 1, 2):
            results = []
            for module in (backend, reference):
                x, x0_out = draw(shape, channels_last), torch.zeros_like(draw(shape, channels_last))
                copy_out = formatted(torch.zeros(shape, dtype=torch.bfloat16), other)
                bad_row = torch.tensor([-1], dtype=torch.int32)
                module.ddpm_step(
                    *(x, draw(shape, channels_last, 1), table, t_of_row, torch.tensor([row]), RNG, None),
                    *(draw(shape, channels_last, 2), torch.tensor([1.5]), draw(shape, channels_last, 3)),
                    *(draw(shape, channels_last, 4), None, torch.rand(shape[0]).fill_(0.7), x0_out, copy_out, bad_row),
                )
                results.append((x, x0_out, copy_out, bad_row))
            for got, expected in zip(*results, strict=True):
                assert_same_bits(got.float(), expected.float())


def order(shape: tuple[int, ...], channels_last: bool) -> list[int]:
    """The dimensions of a tensor from slowest to fastest in memory."""
    dims = list(range(len(shape)))
    return [0, *dims[2:], 1] if channels_last and len(shape) > 2 else dims


def inverse(permutation: list[int]) -> list[int]:
    return [permutation.index(i) for i in range(len(permutation))]


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_a_step_without_noise_keeps_the_sign_of_zeros(given):
    table = torch.tensor([[1.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]])
    for zero in (0.0, -0.0):
        x, m = torch.full((1, 6), zero), torch.full((1, 6), -1.0 if str(zero) == "-0.0" else 1.0)
        noise = torch.full((1, 6), float("nan")) if given else None
        t_of_row, row = torch.tensor([0], dtype=torch.int32), torch.tensor([0])
        backend.ddpm_step(x, m, table, t_of_row, row, RNG, noise, *[None] * 9)
        assert_same_bits(x, torch.full((1, 6), zero))


@pytest.mark.parametrize(("shape", "channels_last"), CASES[:-1])
@pytest.mark.parametrize("act", ["none", "silu"])
def test_add_bias_temb_in_many_programs(tiny_programs, shape, channels_last, act):
    h, g = draw(shape, channels_last), draw(shape, channels_last, 1)
    bias, temb = draw(shape[1:2], seed=2), draw(shape[:2], seed=3)
    assert_same_bits(backend.add_bias_temb(h, bias, temb, act), reference.add_bias_temb(h, bias, temb, act))
    got = backend.add_bias_temb_backward(g, h, bias, act, True, True, True)
    expected = reference.add_bias_temb_backward(g, h, bias, act, True, True, True)
    assert_same_bits(got[0], expected[0])
    for mine, true in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(mine, true, rtol=1e-6, atol=1e-6)


# ---- what works where ------------------------------------------------------------------------------------------------


def test_a_sample_too_large_for_32_bits_is_refused():
    out = torch.empty(1, 2**31, device="meta")
    with pytest.raises(ValueError, match="native backend"):
        backend.normal(out, RNG, 0)
