"""Bits per dimension: the variational bound of Ho et al. 2020 (eq. 5) of a model on uint8 images, summed in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .. import noise, ops
from ..sampler import Sampler
from ..sampling.inputs import Labels, labels_of
from ..sampling.model import attribute, eval_mode, prediction
from ..tables.levels import Levels
from ._bound import decoder_nats, gaussian_kl, prior_nats
from ._rows import FloatArray

BITS = math.log(2.0)


@dataclasses.dataclass(frozen=True)
class Bits:
    """The bound of every image, in bits per dimension, and its parts; float64 (N,) each.

    total = prior + steps + decoder. passes: network passes an image took. exact: whether all terms were summed.
    """

    prior: FloatArray
    steps: FloatArray
    decoder: FloatArray
    passes: int
    exact: bool

    @property
    def total(self) -> FloatArray:
        return self.prior + self.steps + self.decoder

    @property
    def mean(self) -> float:
        """Over the images: an upper bound on the negative log likelihood, of which it is an unbiased estimate."""
        return float(self.total.mean())

    @property
    def standard_error(self) -> float:
        """Of the mean: of the choice of images, of their timesteps and of their noise together. NaN for one image."""
        count = len(self.prior)
        return float(self.total.std(ddof=1)) / math.sqrt(count) if count > 1 else math.nan


def passes_for(sampler: Sampler, timesteps: int | None) -> int:
    """How many network passes an image takes in `bits_per_dim`."""
    steps = len(sampler) - 1
    return 1 + (steps if timesteps is None else min(timesteps, steps))


@torch.no_grad()
def bits_per_dim(
    sampler: Sampler,
    images: Tensor,
    *,
    labels: Labels | None = None,
    timesteps: int | None = None,
    seed: int = 0,
    first_sample: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> Bits:
    """The variational bound on -log2 p(x0) per dimension of the reverse process that `sampler` runs:

        L_T + sum over t > 0 of L_t + L_0    (Ho et al. 2020, eq. 5)
        L_T = KL(q(x_T | x0) || N(0, I)),  L_t = KL(q(x_{t-1} | x_t, x0) || p(x_{t-1} | x_t)),  L_0 = -log p(x0 | x_1)

    L_0 is of the discretised Gaussian decoder (eq. 13): the mass of p within 1/255 of x0, the outermost values reaching
    to infinity. With a fixed variance its scale is the posterior's of the next timestep, as in the authors' code, since
    the posterior's own is 0 there. One x_t is drawn for each term; its noise and the choice of timesteps are a function
    of (seed, index of the image), not of the batch.

    Args:
        sampler: method "ddpm"; its model, schedule, prediction, variance, clip, time_scale, dtype and `fused` are used.
            Fewer steps than T give the bound of that shorter process. A self-conditioned model is told zeros.
        images: uint8 (N, ...), the data.
        labels: an int, N ints, or a tensor (N,), for a conditional model.
        timesteps: None evaluates every term, T passes an image. A number K draws one term from each of K strata of
            timesteps, which are narrow near t = 0, and weighs it by the stratum's width: K + 1 passes, right on
            average, and with a standard error. L_T and L_0 are always exact.
        seed, first_sample: of the noise and the timesteps; image i is sample first_sample + i.
        batch_size: images a pass.
        progress: called with the number of network passes (image by image) that were done, after each batch.

    Raises ValueError or TypeError, before any pass, for what has no such bound.
    """
    rows = _Rows(sampler)
    if images.dtype != torch.uint8 or images.dim() < 2:
        raise ValueError(
            f"images must be uint8 (N, ...), since bits are of whole pixel values, got {images.dtype} "
            f"of shape {tuple(images.shape)}"
        )
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    for name, value, least in (("timesteps", timesteps, 1), ("batch_size", batch_size, 1)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    noise.make_rng(seed, first_sample)  # checks both
    given = labels_of(labels, len(images), rows.device, attribute(sampler.model, "num_classes"), False)
    strata = _strata(len(sampler) - 1, timesteps)
    parts = torch.zeros(3, len(images), dtype=torch.float64)
    with eval_mode(sampler.model):
        for first in range(0, len(images), batch_size):
            last = min(first + batch_size, len(images))
            x0 = images[first:last].to(rows.device)
            y = None if given is None else given[first:last]
            rng = noise.make_rng(seed, first_sample + first, rows.device)
            parts[:, first:last] = rows.bound(x0, y, rng, strata, min(batch_size, len(images))).cpu()
            if progress is not None:
                progress((last - first) * (len(strata) + 1))
    parts /= BITS * images[0].numel()
    prior, steps, decoder = parts.numpy()
    return Bits(prior, steps, decoder, len(strata) + 1, len(strata) == len(sampler) - 1)


def _strata(steps: int, wanted: int | None) -> list[tuple[int, int]]:
    """(first, width) of contiguous strata of the terms 1..steps, counted from the data, ever wider.

    Most of the sum is of the first few terms, which differ most from each other. With edges at (k / K)^4 the estimate
    deviates a third as much as with (k / K)^2 and a thirtieth as much as with equal strata (Gaussian data, T = 1000,
    K = 20, linear and cosine); higher powers gain nothing.
    """
    count = steps if wanted is None else min(wanted, steps)
    edges = [0]
    for k in range(1, count + 1):
        edges.append(min(max(edges[-1] + 1, round(steps * (k / count) ** 4)), steps - (count - k)))
    return [(1 + a, b - a) for a, b in itertools.pairwise(edges)]


class _Rows:
    """The terms of the bound of one sampler's process. Term i is of the row that arrives i steps before the data."""

    def __init__(self, sampler: Sampler) -> None:
        choices = sampler.choices
        if choices.method != "ddpm":
            raise ValueError(f'bits per dimension are of method="ddpm", got a sampler with method={choices.method!r}')
        if choices.thresholding is not None:
            raise ValueError("bits per dimension are of a process with clip or without; got one with thresholding")
        self.sampler, self.choices = sampler, choices
        self.device = sampler._device(None)
        self.plan = sampler._plan(self.device)
        here = choices.steps.timesteps
        levels = Levels(sampler.schedule, here, np.append(here[1:], -1))
        a, b = levels.x0_from(choices.prediction)
        c1 = levels.ddpm("fixed_small")[0]
        range_ = levels.logvar_range()
        # The posterior's variance is 0 in the last row; range_ has the next row's there, which the decoder takes.
        columns = {"a": a, "b": b, "c1": c1, "smallest": range_[:, 0], "largest": range_[:, 1]}
        self.columns = {name: torch.tensor(column, device=self.device) for name, column in columns.items()}
        self.times = torch.tensor(here.astype(np.int64), device=self.device)
        self.prior = float(levels.A[0]), float(levels.noise_A[0])

    def bound(self, x0: Tensor, labels: Tensor | None, rng: Tensor, strata: list[tuple[int, int]], size: int) -> Tensor:
        """float64 (3, n): nats of the prior, of the steps and of the decoder, summed over an image's dimensions."""
        n, last = len(x0), len(self.times) - 1
        exact = x0.double() / 127.5 - 1
        nats = torch.zeros(3, n, dtype=torch.float64, device=self.device)
        nats[0] = prior_nats(exact, *self.prior)
        # One block of bits for all strata: element k is stratum k's.
        words = ops.random_bits(n, (max(1, len(strata)),), rng=rng, stream=noise.STREAM_BOUND_T, device=self.device)
        for k, (first, width) in enumerate(strata):
            row = last - (first + ((words[:, k] * width) >> 32))
            x0_theta, logvar = self._predicted(x0, row, labels, rng, noise.STREAM_BOUND_NOISE + 1 + k, size)
            apart = self._at("c1", row, exact) * (exact - x0_theta)
            nats[1] += width * gaussian_kl(apart, self._at("smallest", row, exact), logvar)
        row = torch.full((n,), last, device=self.device)
        x0_theta, logvar = self._predicted(x0, row, labels, rng, noise.STREAM_BOUND_NOISE, size)
        nats[2] = decoder_nats(x0, x0_theta, logvar)
        return nats

    def _at(self, name: str, row: Tensor, like: Tensor) -> Tensor:
        return self.columns[name][row].view(-1, *[1] * (like.dim() - 1))

    def _predicted(
        self, x0: Tensor, row: Tensor, labels: Tensor | None, rng: Tensor, stream: int, size: int
    ) -> tuple[Tensor, Tensor]:
        """x0 as the network sees it in a freshly drawn x_t, and the log variance of its step; float64."""
        table = self.sampler.schedule.noising_table(self.device)
        x_t = ops.q_sample(x0, self.times[row], table, rng=rng, stream=stream)
        m = self._network(x_t, self.plan.t_model[row], labels, size).double()
        logvar: Tensor
        if self.choices.twice_the_channels:
            m, logvar = m.chunk(2, dim=1)
            if self.choices.variance == "learned_range":
                low, high = self._at("smallest", row, m), self._at("largest", row, m)
                logvar = low + (logvar + 1) / 2 * (high - low)
        else:
            logvar = self._at("smallest" if self.choices.variance == "fixed_small" else "largest", row, m)
            # The decoder's, whatever the variance of the other steps.
            logvar = torch.where(self._last(row, m), self._at("smallest", row, m), logvar)
        x0_theta = self._at("a", row, m) * x_t.double() - self._at("b", row, m) * m
        clip = self.choices.clip
        if clip:
            x0_theta = x0_theta.clamp(-float(clip), float(clip))
        return x0_theta, logvar

    def _last(self, row: Tensor, like: Tensor) -> Tensor:
        return (row == len(self.times) - 1).view(-1, *[1] * (like.dim() - 1))

    def _network(self, x: Tensor, t: Tensor, labels: Tensor | None, size: int) -> Tensor:
        """The network's output; a fused plan, which is of one batch size, is given a last batch filled up."""
        n, plan = len(x), self.plan
        if plan.fused is not None:
            fill = torch.arange(size, device=self.device).clamp(max=n - 1)
            given = () if labels is None else (labels[fill],)
            return plan.fused(x[fill], t[fill], *given)[:n]
        fed = x.to(plan.dtype)
        given = () if labels is None else (labels,)
        told = {"x_self_cond": torch.zeros_like(fed)} if plan.self_condition else {}
        return prediction(plan.model(fed, t, *given, **told), fed, 1 if plan.variance is None else 2)
