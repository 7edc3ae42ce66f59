"""Schedules against formulas written out one timestep at a time, and what a Schedule promises as a value."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from ddpm_fast.schedule import Schedule


def sigmoid(y):
    return 1.0 / (1.0 + math.exp(-y))


def capped(signal, T, cap=0.999):
    """beta_t = 1 - signal((t + 1)/T) / signal(t/T), at most cap."""
    return [min(1.0 - signal((t + 1) / T) / signal(t / T), cap) for t in range(T)]


def laplace_signal(u):
    log_r = -0.5 * math.copysign(1.0, 0.5 - u) * math.log(1.0 - 2.0 * abs(0.5 - u) + 1e-6)
    return math.sqrt(math.exp(log_r) / (1.0 + math.exp(log_r)))


TEXTBOOK = {
    "linear": lambda T: [1e-4 + (0.02 - 1e-4) * t / (T - 1) for t in range(T)],
    "scaled_linear": lambda T: [(0.01 + (math.sqrt(0.02) - 0.01) * t / (T - 1)) ** 2 for t in range(T)],
    "cosine": lambda T: capped(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, T),
    "sigmoid_alphas_cumprod": lambda T: capped(lambda u: sigmoid(3.0) - sigmoid(6.0 * u - 3.0), T),
    "sigmoid_betas": lambda T: [1e-4 + (0.02 - 1e-4) * sigmoid(-6.0 + 12.0 * t / (T - 1)) for t in range(T)],
    "exponential": lambda T: capped(lambda u: math.exp(-12.0 * u), T),
    "laplace": lambda T: capped(laplace_signal, T),
}

# alphas_cumprod at the last of 1000 timesteps, computed once from the formulas above with 40 decimal digits.
LAST_ALPHA_CUMPROD = {
    "linear": 4.035829765376e-5,
    "scaled_linear": 0.0007334124595808,
    "cosine": 2.428766907034e-9,
    "sigmoid_alphas_cumprod": 3.002791997492e-7,
    "sigmoid_betas": 3.968181990533e-5,
    "exponential": 6.144212353328e-6,
    "laplace": 0.03162277660168,
}


def test_every_named_schedule_is_tested_here():
    assert set(Schedule.names()) == set(TEXTBOOK) == set(LAST_ALPHA_CUMPROD)


@pytest.mark.parametrize("T", [1000, 250, 33])
@pytest.mark.parametrize("name", sorted(TEXTBOOK))
def test_betas_follow_the_formula(name, T):
    schedule = Schedule.named(name, T)
    np.testing.assert_allclose(schedule.betas, TEXTBOOK[name](T), rtol=1e-9, atol=1e-15)
    assert schedule.betas.dtype == np.float64
    assert schedule.num_timesteps == len(schedule) == T


@pytest.mark.parametrize("name", sorted(TEXTBOOK))
def test_last_alpha_cumprod_is_the_golden_one(name):
    np.testing.assert_allclose(Schedule.named(name, 1000).alphas_cumprod[-1], LAST_ALPHA_CUMPROD[name], rtol=1e-9)


def test_the_two_sigmoids_are_different_schedules():
    over_signal, over_betas = Schedule.sigmoid_alphas_cumprod(), Schedule.sigmoid_betas()
    assert over_signal.alphas_cumprod[-1] == pytest.approx(3.0e-7, rel=0.01)
    assert over_betas.alphas_cumprod[-1] == pytest.approx(4.0e-5, rel=0.01)


def test_scaled_betas_are_multiplied_by_1000_over_T():
    np.testing.assert_allclose(Schedule.linear(250, scale_betas=True).betas, np.linspace(4e-4, 0.08, 250), rtol=1e-13)
    assert Schedule.linear(1000, scale_betas=True) == Schedule.linear(1000)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        Schedule.linear(10, scale_betas=True)  # the last beta would be 2


def test_options_reach_the_formula():
    assert Schedule.cosine(50, s=0.1) != Schedule.cosine(50)
    assert Schedule.cosine(50, max_beta=0.5).betas.max() == 0.5
    assert Schedule.exponential(50, rate=6.0).alphas_cumprod[-1] == pytest.approx(math.exp(-6.0))
    assert Schedule.named("linear", 10, beta_end=0.5).betas[-1] == 0.5
    tau = Schedule.sigmoid_alphas_cumprod(40, start=0.0, end=2.0, tau=0.5)
    by_hand = capped(lambda u: sigmoid(4.0) - sigmoid(4.0 * u), 40)
    np.testing.assert_allclose(tau.betas, by_hand, rtol=1e-9)


def test_derived_tables_agree_with_their_definitions():
    schedule = Schedule.cosine(200)
    signal = 1.0
    for t in range(200):
        assert schedule.alphas[t] == 1.0 - schedule.betas[t]
        assert schedule.alphas_cumprod_prev[t] == pytest.approx(signal, rel=1e-13)
        signal *= 1.0 - schedule.betas[t]
        assert schedule.alphas_cumprod[t] == pytest.approx(signal, rel=1e-13)
        assert schedule.sqrt_alphas_cumprod[t] == pytest.approx(math.sqrt(signal), rel=1e-13)
        assert schedule.one_minus_alphas_cumprod[t] == pytest.approx(1.0 - signal, rel=1e-10)
        assert schedule.sqrt_one_minus_alphas_cumprod[t] == pytest.approx(math.sqrt(1.0 - signal), rel=1e-10)
        assert schedule.snr[t] == pytest.approx(signal / (1.0 - signal), rel=1e-10)


def test_noise_level_keeps_its_digits_for_tiny_betas():
    schedule = Schedule.from_betas([1e-18, 1e-18, 0.5])
    np.testing.assert_allclose(schedule.one_minus_alphas_cumprod, [1e-18, 2e-18, 0.5], rtol=1e-12)
    table = schedule.step_table(prediction="v", clip=1.0)
    assert np.isfinite(table.coefficients).all()


def test_noising_table_is_float32_and_cached():
    schedule = Schedule.linear(100)
    table = schedule.noising_table()
    assert table.dtype == torch.float32
    assert table.shape == (100, 2)
    np.testing.assert_array_equal(table[:, 0].numpy(), schedule.sqrt_alphas_cumprod.astype(np.float32))
    np.testing.assert_array_equal(table[:, 1].numpy(), schedule.sqrt_one_minus_alphas_cumprod.astype(np.float32))
    assert schedule.noising_table("cpu") is table
    with torch.inference_mode():
        assert not Schedule.linear(5).noising_table().is_inference()


class TestZeroTerminalSnr:
    def test_ends_in_pure_noise_and_starts_as_before(self):
        plain = Schedule.scaled_linear(1000, 0.00085, 0.012)
        schedule = plain.rescale_zero_terminal_snr()
        assert schedule.has_zero_terminal_snr
        assert not plain.has_zero_terminal_snr
        assert schedule.betas[-1] == 1.0
        assert schedule.alphas_cumprod[-1] == 0.0
        assert schedule.one_minus_alphas_cumprod[-1] == 1.0
        assert schedule.betas[0] == plain.betas[0]

    def test_follows_algorithm_1(self):
        plain = Schedule.linear(50)
        root = [math.sqrt(math.prod(1.0 - b for b in plain.betas[: t + 1])) for t in range(50)]
        moved = [(r - root[-1]) * root[0] / (root[0] - root[-1]) for r in root]
        np.testing.assert_allclose(plain.rescale_zero_terminal_snr().sqrt_alphas_cumprod, moved, rtol=1e-11, atol=1e-14)

    def test_eps_prediction_is_refused_with_the_remedy(self):
        schedule = Schedule.linear(50).rescale_zero_terminal_snr()
        with pytest.raises(ValueError, match='prediction="v" or prediction="x0"'):
            schedule.step_table(prediction="eps")
        for prediction in ("v", "x0"):
            assert np.isfinite(schedule.step_table(prediction=prediction).coefficients[:, :7]).all()

    def test_one_timestep_cannot_be_rescaled(self):
        with pytest.raises(ValueError, match="at least 2 timesteps"):
            Schedule.from_betas([0.5]).rescale_zero_terminal_snr()


class TestValue:
    def test_is_immutable(self):
        schedule = Schedule.linear(10)
        with pytest.raises(ValueError, match="read-only"):
            schedule.betas[0] = 0.5
        with pytest.raises(AttributeError, match="immutable"):
            schedule.betas = np.ones(10)
        with pytest.raises(AttributeError, match="immutable"):
            del schedule.betas

    def test_does_not_share_memory_with_what_it_was_made_from(self):
        betas = np.full(4, 0.1)
        schedule = Schedule.from_betas(betas)
        betas[:] = 0.9
        assert (schedule.betas == 0.1).all()

    def test_equality_hash_and_copies(self):
        schedule = Schedule.linear(20)
        assert schedule == Schedule.from_betas(schedule.betas)
        assert hash(schedule) == hash(Schedule.linear(20))
        assert schedule != Schedule.linear(21)
        assert schedule != "linear"
        for twin in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
            assert twin == schedule
            assert repr(twin) == repr(schedule)

    def test_repr_of_a_named_schedule_makes_it_again(self):
        for name in Schedule.names():
            schedule = Schedule.named(name, 12)
            assert eval(repr(schedule), {"Schedule": Schedule}) == schedule  # our own repr
        assert "4 betas" in repr(Schedule.from_betas([0.1] * 4))

    @pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
    def test_betas_come_in_any_container(self, make):
        values = [0.25, 0.5, 1.0]
        np.testing.assert_array_equal(Schedule.from_betas(make(values)).betas, values)


class TestBadInput:
    @pytest.mark.parametrize(
        ("betas", "message"),
        [
            ([0.1, float("nan")], r"\(0, 1\], got nan at t = 1"),
            ([0.1, 1.5], r"\(0, 1\], got 1.5 at t = 1"),
            ([0.0, 0.1], r"\(0, 1\], got 0.0 at t = 0"),
            ([-0.1, 0.1], r"\(0, 1\], got -0.1 at t = 0"),
            ([0.1, float("inf")], r"\(0, 1\], got inf at t = 1"),
            ([0.1, 1.0, 0.1], r"only at the last timestep \(t = 2\), got 1 at t = 1"),
            ([0.999] * 200, r"no signal at t = 107 already"),
            ([[0.1, 0.2]], r"1-D .* got shape \(1, 2\)"),
            (0.1, r"1-D .* got shape \(\)"),
            ([], "at least one timestep"),
        ],
    )
    def test_betas(self, betas, message):
        with pytest.raises(ValueError, match=message):
            Schedule.from_betas(betas)

    def test_betas_that_are_not_numbers(self):
        with pytest.raises(TypeError, match="sequence of numbers, got str"):
            Schedule.from_betas("linear")

    @pytest.mark.parametrize("name", sorted(TEXTBOOK))
    def test_too_few_timesteps(self, name):
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            Schedule.named(name, 0)
        with pytest.raises(TypeError, match="must be an int, got float"):
            Schedule.named(name, 10.0)

    def test_unknown_name_lists_the_known_ones(self):
        with pytest.raises(ValueError, match=r"linear, scaled_linear, cosine.*got 'karras'"):
            Schedule.named("karras")
        with pytest.raises(ValueError, match="two sigmoids"):
            Schedule.named("sigmoid")

    def test_sigmoid_ends(self):
        with pytest.raises(ValueError, match="start < end and tau > 0"):
            Schedule.sigmoid_alphas_cumprod(start=3.0, end=-3.0)
        with pytest.raises(ValueError, match="start < end and tau > 0"):
            Schedule.sigmoid_alphas_cumprod(tau=0.0)

    def test_negative_ends_of_scaled_linear(self):
        with pytest.raises(ValueError, match="square roots"):
            Schedule.scaled_linear(beta_start=-1.0)
