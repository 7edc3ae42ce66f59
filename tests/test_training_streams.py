"""What is random in training: against the NumPy specification, and the same however a run is cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ddpm_fast import noise
from ddpm_fast.training import streams

SEED = 2**63 + 17


@pytest.fixture(scope="module")
def orders():
    """The first 1000 epochs of 10 images, from the specification."""
    keys = [noise.random_bits(SEED, epoch, 1, noise.STREAM_PERMUTATION, 10)[0] for epoch in range(1000)]
    return np.concatenate([np.argsort(key, kind="stable") for key in keys])


def test_the_order_is_the_specifications(orders):
    order = streams.Order(SEED, 10)
    assert order.indices(0, 10_000).tolist() == orders.tolist()
    assert order.indices(0, 7).dtype == torch.int64
    assert order.indices(5, 0).tolist() == []


def test_the_order_does_not_depend_on_how_it_is_asked_for(orders):
    """Batches cross epochs, and blocks of epochs that are sorted together; nothing is dropped or drawn twice."""
    order = streams.Order(SEED, 10)
    for first, count in ((4085, 33), (0, 64), (9000, 1000), (4090, 1), (8150, 100), (17, 3)):
        assert order.indices(first, count).tolist() == orders[first : first + count].tolist()
    epochs = np.sort(orders.reshape(1000, 10), axis=1)
    assert (epochs == np.arange(10)).all()


def test_epochs_of_many_images_are_sorted_one_at_a_time():
    n = 5000
    order = streams.Order(3, n)
    keys = [noise.random_bits(3, epoch, 1, noise.STREAM_PERMUTATION, n)[0] for epoch in range(3)]
    expected = [np.argsort(key, kind="stable") for key in keys]
    assert order.indices(4990, 5020).tolist() == np.concatenate(expected)[4990:10010].tolist()
    assert len(order._blocks) == 2


def test_one_image_is_drawn_every_time():
    assert streams.Order(0, 1).indices(10**12, 100).tolist() == [0] * 100


@pytest.mark.parametrize("first", [0, 2**40])
def test_timesteps_and_coins_are_the_specifications(first, device):
    n, T = 300, 1000
    rng = noise.make_rng(SEED, first, device)

    def bits(stream):
        return noise.random_bits(SEED, first, n, stream, 1)[:, 0].astype(np.uint64)

    assert streams.timesteps(rng, n, T).tolist() == (bits(noise.STREAM_TRAIN_T) * T >> np.uint64(32)).tolist()
    for p in (0.0, 0.1, 0.5, 1.0):
        expected = bits(noise.STREAM_FLIP).astype(np.float64) < p * 2**32
        assert streams.coins(rng, n, noise.STREAM_FLIP, p).tolist() == expected.tolist()
        assert abs(expected.mean() - p) <= 4 * math.sqrt(p * (1 - p) / n)


@pytest.mark.parametrize(("seed", "begin"), [(9, 0), (SEED, 2**40 - 640)])
def test_what_a_step_draws_once(seed, begin):
    firsts = range(begin, begin + 6400, 64)
    words = [int(noise.random_bits(seed, first, 1, noise.STREAM_SELF_COND, 1)[0, 0]) for first in firsts]
    coins = [streams.batch_coin(seed, first, 0.5) for first in firsts]
    assert coins == [word < 2**31 for word in words]
    assert 30 < sum(coins) < 70
    seeds = [streams.dropout_seed(seed, first) for first in firsts]
    assert seeds == [int(noise.random_bits(seed, first, 1, noise.STREAM_MODEL_DROPOUT, 1)[0, 0]) for first in firsts]
    assert len(set(seeds)) == 100


def test_golden_values():
    """A run that was begun with an older release goes on with the same images, timesteps and coins."""
    order = streams.Order(0, 8)
    rng = noise.make_rng(0, 0)
    assert order.indices(0, 16).tolist() == GOLDEN["order"]
    assert streams.timesteps(rng, 6, 1000).tolist() == GOLDEN["timesteps"]
    assert streams.coins(rng, 12, noise.STREAM_FLIP, 0.5).int().tolist() == GOLDEN["flips"]
    assert streams.dropout_seed(0, 128) == GOLDEN["dropout seed"]


GOLDEN = {
    "order": [6, 0, 1, 2, 7, 4, 3, 5, 2, 4, 5, 7, 0, 6, 3, 1],
    "timesteps": [86, 679, 569, 668, 310, 945],
    "flips": [1, 1, 1, 0, 1, 1, 0, 0, 0, 1, 0, 1],
    "dropout seed": 215020897,
}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: streams.Order(0, 0), "at least one image, got 0"),
        (lambda: streams.Order(0, 3).indices(-1, 2), "counted from 0, got first -1, count 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
