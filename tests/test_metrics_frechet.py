"""The Frechet distance against SciPy's matrix root and closed forms; streamed statistics against NumPy's."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

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


def filled(rows):
    found = FeatureStatistics()
    found.update(rows)
    return found


def test_statistics_merge():
    rows = np.random.default_rng(1).normal(size=(90, 5)) + 100
    whole, merged = filled(rows), FeatureStatistics()
    for part in np.split(rows, [7, 50]):
        merged.merge(filled(part))
    merged.merge(FeatureStatistics())
    assert merged.count == 90
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(merged.covariance, whole.covariance, rtol=1e-10, atol=1e-12)
    part = filled(rows[:7])
    before = part.covariance.copy()
    FeatureStatistics().merge(part)
    filled(rows).merge(part)
    np.testing.assert_array_equal(part.covariance, before)  # what is merged stays as it was


class FakeWorld:
    """Three processes that take turns in threads."""

    def __init__(self, size):
        self.size, self.slots, self.barrier = size, [None] * size, threading.Barrier(size)
        self.local = threading.local()

    @property
    def rank(self):
        return self.local.rank

    def sum(self, tensor):
        self.slots[self.rank] = tensor.clone()
        self.barrier.wait(10)
        total = torch.stack(self.slots).sum(0)
        self.barrier.wait(10)
        return tensor.copy_(total)


def test_statistics_are_gathered_over_processes():
    rows = np.random.default_rng(2).normal(size=(40, 4))
    world, parts = FakeWorld(3), [filled(rows[:25]), FeatureStatistics(), filled(rows[25:])]

    def run(rank):
        world.local.rank = rank
        parts[rank].gather(world)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(run, range(3)))
    for part in parts:
        assert part.count == 40
        np.testing.assert_array_equal(part.covariance, parts[0].covariance)
        np.testing.assert_allclose(part.covariance, np.cov(rows, rowvar=False), rtol=1e-10)
    parts[1] = filled(rows[:, :2])
    with ThreadPoolExecutor(3) as pool, pytest.raises(ValueError, match=r"one size, got \[4, 2, 4\]"):
        list(pool.map(run, range(3)))


def test_statistics_in_files(tmp_path):
    rows = np.random.default_rng(3).normal(size=(30, 4))
    found, path = filled(rows), tmp_path / "reference.npz"
    found.save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["reference.npz"]
    back = FeatureStatistics.load(path)
    np.testing.assert_array_equal(back.mean, found.mean)
    np.testing.assert_allclose(back.covariance, found.covariance, rtol=1e-14)
    back.update(rows)
    assert back.count == 60
    # As pytorch-fid writes it and reads it: mu and sigma.
    with np.load(path) as file:
        np.savez(tmp_path / "fid.npz", mu=file["mu"], sigma=file["sigma"])
    theirs = FeatureStatistics.load(tmp_path / "fid.npz")
    assert frechet_distance(theirs.mean, theirs.covariance, found.mean, found.covariance) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="came without a count of samples: nothing can be added"):
        theirs.update(rows)
    with pytest.raises(ValueError, match="came without a count of samples and cannot be merged"):
        back.merge(theirs)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file of feature statistics"):
        FeatureStatistics.load(tmp_path / "none.npz")
    bad = tmp_path / "bad.npz"
    for content, message in (
        (b"", "must be an .npz with mu"),
        (b"not a zip", "must be an .npz with mu"),
        ({"mu": np.zeros(3)}, "it has no sigma"),
        ({"mu": np.zeros(3), "sigma": np.zeros((2, 2))}, r"got shapes \(3,\) and \(2, 2\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.nan)}, "must hold finite values"),
        ({"mu": np.array([None]), "sigma": np.zeros((1, 1))}, "must be an .npz with mu"),
    ):
        if isinstance(content, bytes):
            bad.write_bytes(content)
        else:
            np.savez(bad, **content)
        with pytest.raises(ValueError, match=message):
            FeatureStatistics.load(bad)
    with pytest.raises(ValueError, match="a covariance needs at least 2 samples"):
        filled(np.zeros((1, 2))).save(tmp_path / "one.npz")
    with pytest.raises(FileNotFoundError):
        filled(np.zeros((3, 2))).save(tmp_path / "missing" / "x.npz")
