"""The energy distance against its definition in plain loops, its properties, and its bad input."""

import numpy as np
import pytest
import torch

from ddpm_fast import metrics
from ddpm_fast.metrics.energy import _distance_sum


def draw(n, *shape, seed=0, shift=0.0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)) + shift


def by_definition(x, y, unbiased):
    """2 E|X - Y| - E|X - X'| - E|Y - Y'|, pair by pair."""

    def mean(a, b, same):
        distances = [
            np.sqrt(((p - q) ** 2).sum())
            for i, p in enumerate(a)
            for j, q in enumerate(b)
            if not (same and unbiased and i == j)
        ]
        return np.mean(distances)

    x, y = (v.double().flatten(1).numpy() for v in (x, y))
    return 2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True)


@pytest.mark.parametrize("unbiased", [False, True], ids=["biased", "unbiased"])
@pytest.mark.parametrize("chunk", [1, 50, 1 << 22])
def test_energy_distance_is_its_definition(monkeypatch, unbiased, chunk):
    monkeypatch.setattr("ddpm_fast.metrics._rows.BLOCK_ELEMENTS", chunk)
    x, y = draw(13, 2, 3), draw(8, 2, 3, seed=1, shift=0.3)
    got = metrics.energy_distance(x, y, unbiased=unbiased)
    assert got == pytest.approx(by_definition(x, y, unbiased), rel=1e-12)
    assert got == pytest.approx(metrics.energy_distance(y, x, unbiased=unbiased), rel=1e-12)
    assert got == metrics.energy_distance(x.numpy(), y.numpy(), unbiased=unbiased)


def test_energy_distance_of_one_dimension_in_closed_form():
    # Points 0 and 1 against 3: 2 * (3 + 2) / 2 - (0 + 1 + 1 + 0) / 4 - 0.
    assert metrics.energy_distance([[0.0], [1.0]], [[3.0]]) == 4.5


def test_energy_distance_is_zero_for_equal_sets_and_keeps_its_digits():
    x = draw(40, 5) + 1000.0  # far from the origin, where distances by matrix products cancel
    assert metrics.energy_distance(x, x.flip(0)) == pytest.approx(0.0, abs=1e-12)
    assert metrics.energy_distance(x, x - 1000.0) > 1000


def test_the_unbiased_one_is_zero_on_average():
    values, biased = [], []
    for seed in range(60):
        x, y = draw(20, 3, seed=2 * seed), draw(30, 3, seed=2 * seed + 1)
        values.append(metrics.energy_distance(x, y, unbiased=True))
        biased.append(metrics.energy_distance(x, y))
    spread = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * spread
    # What the docstring says of the biased one: E|X - X'| (1/N + 1/M).
    apart = _distance_sum(draw(2000, 3).double(), draw(2000, 3, seed=9).double()) / 2000**2
    assert np.mean(biased) == pytest.approx(apart * (1 / 20 + 1 / 30), rel=0.1)


def test_energy_ratio():
    real = draw(400, 6)
    good = metrics.energy_ratio(draw(100, 6, seed=1), real)
    assert 0.7 < good < 1.4
    assert metrics.energy_ratio(draw(100, 6, seed=1, shift=0.5), real) > 3 * good
    collapsed = draw(1, 6, seed=1).expand(100, 6)
    assert metrics.energy_ratio(collapsed, real) > 10 * good
    # One split, from the distances themselves.
    samples = draw(50, 6, seed=2)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    some, rest = real[order[:50]], real[order[50:]]
    expected = metrics.energy_distance(samples, rest) / metrics.energy_distance(some, rest)
    assert metrics.energy_ratio(samples, real, splits=1, seed=5) == pytest.approx(expected, rel=1e-9)


def test_nearest_distance():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert metrics.nearest_distance(x, torch.tensor([[0.0, 1.0], [9.0, 9.0]])) == pytest.approx((1 + np.sqrt(18)) / 2)
    assert metrics.nearest_distance(x, x) == 5.0
    assert metrics.nearest_distance(x, x.clone()) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.energy_distance(draw(3), draw(3, 1)), "x must have shape (N, ...) with at least two"),
        (lambda: metrics.energy_distance(draw(3, 2), draw(3, 4)), "y must have 2 elements a sample as x has, got 4"),
        (lambda: metrics.energy_distance(draw(3, 2), draw(0, 2)), "y must hold at least 1 samples, got 0"),
        (
            lambda: metrics.energy_distance(draw(1, 2), draw(3, 2), unbiased=True),
            "x must hold at least 2 samples, got 1",
        ),
        (lambda: metrics.energy_distance(draw(3, 2) / 0, draw(3, 2)), "x must be finite"),
        (
            lambda: metrics.energy_ratio(draw(3, 2), draw(3, 2)),
            "real must hold more samples than samples' 3 (> 0), got 3",
        ),
        (lambda: metrics.energy_ratio(draw(3, 2), draw(5, 3)), "real must have 2 elements a sample, got 3"),
        (lambda: metrics.energy_ratio(draw(3, 2), draw(5, 2), splits=0), "splits must be at least 1, got 0"),
        (lambda: metrics.nearest_distance(draw(3, 2), draw(0, 2)), "y must hold at least 1 samples, got 0"),
        (lambda: metrics.nearest_distance(draw(3, 2), draw(3, 3)), "y must have 2 elements a sample as x has, got 3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
