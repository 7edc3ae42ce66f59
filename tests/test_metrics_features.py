"""KID and precision/recall against their definitions in plain loops, their properties, and their bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ddpm_fast.metrics import kernel_distance, kid, precision_recall

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(n, d=5, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(size=(n, d)) + shift


def mmd_by_definition(x, y):
    def k(a, b):
        return (np.dot(a, b) / len(a) + 1) ** 3

    within = [np.mean([k(a, b) for i, a in enumerate(v) for j, b in enumerate(v) if i != j]) for v in (x, y)]
    return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


@pytest.mark.parametrize("block", [1, 40, 1 << 22])
def test_kernel_distance_is_its_definition(monkeypatch, block):
    monkeypatch.setattr("ddpm_fast.metrics._rows.BLOCK_ELEMENTS", block)
    x, y = rows(13), rows(9, seed=1, shift=0.2)
    assert kernel_distance(x, y) == pytest.approx(mmd_by_definition(x, y), rel=1e-11)
    assert kernel_distance(torch.from_numpy(x).float(), y.astype(np.float32)) == pytest.approx(
        mmd_by_definition(x.astype(np.float32).astype(float), y.astype(np.float32).astype(float)), rel=1e-11
    )


def test_kid_of_one_whole_subset_is_the_kernel_distance():
    x, y = rows(30), rows(30, seed=1)
    whole = kid(x, y, subsets=1, subset_size=1000)
    assert whole.mean == pytest.approx(kernel_distance(x, y), rel=1e-11)
    assert (whole.std, whole.subsets, whole.subset_size) == (0.0, 1, 30)


def test_kid_is_right_on_average_and_a_function_of_the_seed():
    x, y = rows(400), rows(300, seed=1, shift=0.3)
    found = kid(x, y, subsets=60, subset_size=100, seed=4)
    assert found == kid(torch.from_numpy(x), y, subsets=60, subset_size=100, seed=4)
    assert found != kid(x, y, subsets=60, subset_size=100, seed=5)
    assert abs(found.mean - kernel_distance(x, y)) < 4 * found.standard_error
    assert found.std > 0
    same = [kernel_distance(rows(50, seed=2 * i), rows(50, seed=2 * i + 1)) for i in range(80)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(80)
    assert min(same) < 0


def balls_by_definition(fake, real, k):
    def radius(v):
        return [np.sort([np.linalg.norm(a - b) for j, b in enumerate(v) if j != i])[k - 1] for i, a in enumerate(v)]

    in_real = np.array([[np.linalg.norm(f - r) <= reach for r, reach in zip(real, radius(real), strict=True)]
                        for f in fake])  # fmt: skip
    in_fake = np.array([[np.linalg.norm(f - r) <= reach for f, reach in zip(fake, radius(fake), strict=True)]
                        for r in real])  # fmt: skip
    return in_real.any(1).mean(), in_fake.any(1).mean(), in_real.sum() / (k * len(fake)), in_real.any(0).mean()


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definition(monkeypatch, block, k):
    monkeypatch.setattr("ddpm_fast.metrics._rows.BLOCK_ELEMENTS", block)
    fake, real = rows(40, shift=0.5) * 0.7 + 100, rows(55, seed=1) + 100
    got = precision_recall(fake, torch.from_numpy(real), k=k)
    expected = balls_by_definition(fake, real, k)
    assert (got.precision, got.recall, got.density, got.coverage) == pytest.approx(expected, rel=1e-12)
    assert 0 < got.recall < got.precision <= 1


def test_precision_and_recall_of_known_sets():
    real = rows(200)
    same = precision_recall(real, real.copy())
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    apart = precision_recall(real + 1000, real)
    assert (apart.precision, apart.recall, apart.density, apart.coverage) == (0, 0, 0, 0)
    # A model that has collapsed onto a few images: precise, without recall.
    few = precision_recall(np.repeat(real[:5], 40, axis=0), real)
    assert few.precision == 1
    assert few.recall == 5 / 200  # balls of radius 0 hold the images that they are copies of


def test_bad_input():
    with pytest.raises(ValueError, match="y must have 5 elements a sample as x has, got 4"):
        kernel_distance(rows(5), rows(5, 4))
    with pytest.raises(ValueError, match="x must hold at least 2 samples, got 1"):
        kid(rows(1), rows(5))
    with pytest.raises(ValueError, match="x must be finite"):
        kid(rows(3) * np.nan, rows(5))
    with pytest.raises(ValueError, match="subsets must be at least 1 and subset_size at least 2, got 0 and 1000"):
        kid(rows(3), rows(5), subsets=0)
    with pytest.raises(ValueError, match="real must hold at least 4 samples, got 3"):
        precision_recall(rows(5), rows(3))
    with pytest.raises(ValueError, match="k must be an integer of at least 1, got 0"):
        precision_recall(rows(5), rows(5), k=0)
