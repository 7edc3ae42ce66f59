"""The Frechet distance against SciPy's matrix root and closed forms; streamed statistics against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddpm_fast.metrics import FeatureStatistics, frechet_distance


def gaussian(d: int, seed: int, samples: int | None = None):
    """Mean and covariance of random features; singular if there are fewer samples than dimensions."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(samples or 4 * d, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)
    return rows.mean(0), np.cov(rows, rowvar=False)


@pytest.mark.parametrize("d", [1, 2, 7, 64])
def test_frechet_distance_is_its_definition(d):
    linalg = pytest.importorskip("scipy.linalg")
    (mu1, sigma1), (mu2, sigma2) = gaussian(d, 0), gaussian(d, 1)
    sigma1, sigma2 = np.atleast_2d(sigma1), np.atleast_2d(sigma2)
    root = np.real(linalg.sqrtm(sigma1 @ sigma2))
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    got = frechet_distance(mu1, sigma1, mu2, sigma2)
    assert got == pytest.approx(expected, rel=1e-9)
    assert got == pytest.approx(frechet_distance(mu2, sigma2, mu1, sigma1), rel=1e-9)


def test_frechet_distance_in_closed_form():
    # Of commuting covariances it is |mu1 - mu2|^2 + sum (sqrt(a) - sqrt(b))^2 over the shared axes.
    turn, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))
    a, b = np.array([4.0, 9.0, 0.0]), np.array([1.0, 0.0, 25.0])
    got = frechet_distance([1.0, 2, 3], turn @ np.diag(a) @ turn.T, [1.0, 0, 3], turn @ np.diag(b) @ turn.T)
    assert got == pytest.approx(4 + 1 + 9 + 25, rel=1e-7)


@pytest.mark.parametrize("samples", [None, 5], ids=["full rank", "singular"])
def test_a_distribution_is_no_distance_from_itself(samples):
    mu, sigma = gaussian(20, 2, samples)
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-6 * np.trace(sigma))
    assert frechet_distance(mu + 3, sigma, mu, sigma) == pytest.approx(9 * 20, rel=1e-6)


def test_statistics_come_a_batch_at_a_time():
    rng = np.random.default_rng(0)
    rows = (
        rng.normal(size=(101, 6)) @ rng.normal(size=(6, 6)) + 1e4
    )  # far from the origin, where sums of squares cancel
    found = FeatureStatistics()
    for batch in np.split(rows, [1, 1, 30, 64]):
        found.update(torch.from_numpy(batch))
    assert found.count == 101
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), rtol=1e-9, atol=1e-9)


def test_bad_input():
    eye, found = np.eye(2), FeatureStatistics()
    with pytest.raises(
        ValueError, match=r"mu2 and sigma2 must have shapes \(2,\) and \(2, 2\), got \(3,\) and \(2, 2\)"
    ):
        frechet_distance([0, 0], eye, [0, 0, 0], eye)
    with pytest.raises(ValueError, match="mu1 and sigma1 must be finite"):
        frechet_distance([0, np.nan], eye, [0, 0], eye)
    found.update(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="a covariance needs at least 2 samples, got 1"):
        _ = found.covariance
    with pytest.raises(ValueError, match="features must have 3 elements a sample as before, got 4"):
        found.update(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="features must be finite"):
        found.update(np.full((1, 3), np.inf))
