"""What is random in training, as a function of (seed, position).

The position is the number of the image drawn since training began: batch k of B images holds positions kB ... kB+B-1.
Batches cross the ends of epochs and nothing is dropped. None of it depends on how a batch is cut into micro-batches or
shared among processes, so a run is continued from one integer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..noise import STREAM_MODEL_DROPOUT, STREAM_PERMUTATION, STREAM_SELF_COND, STREAM_TRAIN_T

_SORTED_TOGETHER = 4096  # images; the epochs of small data are sorted several at a time
_LOW = 0xFFFFFFFF
_KEPT = 2  # blocks of epochs: a batch crosses from one to the next, and loading runs ahead of training


class Order:
    """Which image of n is drawn at each position: position p is image order_e[p % n] in epoch e = p // n, order_e being
    the stable argsort of the n words random_bits(seed, sample e, STREAM_PERMUTATION).
    """

    def __init__(self, seed: int, n: int) -> None:
        if n < 1:
            raise ValueError(f"training needs at least one image, got {n}")
        self.seed, self.n = seed, n
        self._epochs = max(1, _SORTED_TOGETHER // n)
        self._blocks: dict[int, Tensor] = {}

    def indices(self, first: int, count: int) -> Tensor:
        """int64 (count,): the images at positions first ... first + count - 1, on the CPU."""
        if first < 0 or count < 0:
            raise ValueError(f"positions are counted from 0, got first {first}, count {count}")
        parts, span = [], self._epochs * self.n
        while count:
            block, start = divmod(first, span)
            taken = min(count, span - start)
            parts.append(self._block(block)[start : start + taken])
            first, count = first + taken, count - taken
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)

    def _block(self, block: int) -> Tensor:
        """The orders of the epochs of a block, one after the other."""
        if block not in self._blocks:
            first = block * self._epochs
            keys = ops.random_bits(
                self._epochs, (self.n,), seed=self.seed, first_sample=first, stream=STREAM_PERMUTATION
            )
            while len(self._blocks) >= _KEPT:
                del self._blocks[next(iter(self._blocks))]  # the oldest
            self._blocks[block] = keys.argsort(dim=1, stable=True).flatten()
        return self._blocks[block]


def timesteps(rng: Tensor, n: int, T: int) -> Tensor:
    """int64 (n,) on the device of rng, uniform in 0 ... T-1: (r T) >> 32 of 32 random bits r per image.

    rng: int64[2], (seed, position of the first image), see `ddpm_fast.noise.make_rng`.
    """
    bits = ops.random_bits(n, (1,), rng=rng, stream=STREAM_TRAIN_T, device=rng.device)
    return (bits[:, 0] * T) >> 32


def coins(rng: Tensor, n: int, stream: int, p: float) -> Tensor:
    """bool (n,) on the device of rng, each true with probability p: r < p 2^32."""
    bits = ops.random_bits(n, (1,), rng=rng, stream=stream, device=rng.device)
    return bits[:, 0] < math.ceil(p * 2**32)


def batch_coin(seed: int, first: int, p: float) -> bool:
    """One coin for a whole step, keyed by its first position: whether it is self-conditioned."""
    return _word(seed, first, STREAM_SELF_COND) < math.ceil(p * 2**32)


def dropout_seed(seed: int, first: int) -> int:
    """Of torch's generator, for what the network itself draws (dropout) in the micro-batch that starts at `first`."""
    return _word(seed, first, STREAM_MODEL_DROPOUT)


def _word(seed: int, sample: int, stream: int) -> int:
    """The first word of `random_bits(seed, sample, 1, stream, 1)` in Python's integers: one is not worth an op."""
    c0, c1, c2, c3 = 0, sample & _LOW, (sample >> 32) & _LOW, stream
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + 0x9E3779B9) & _LOW, (k1 + 0xBB67AE85) & _LOW
    return c0
