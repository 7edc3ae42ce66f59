"""Bits per dimension against the paper's formulas written out in NumPy, and against a Gaussian in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ddpm_fast import Sampler, Schedule, UNet, noise
from ddpm_fast.metrics import bits_per_dim
from ddpm_fast.metrics._bound import decoder_nats
from ddpm_fast.metrics.bits import _strata, passes_for

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (2, 3, 3)
SCHEDULE = Schedule.linear(6, 0.01, 0.3)


def pictures(n=4, shape=SHAPE, seed=0):
    images = torch.randint(0, 256, (n, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[0, 0, 0, :2] = torch.tensor([0, 255], dtype=torch.uint8)
    return images


def toy(parts):
    """A smooth function of x and t with `parts` times the channels."""

    def model(x, t):
        level = t.to(x.dtype).view(-1, 1, 1, 1)
        outputs = [torch.tanh(x * 0.8 + 0.1 * level)]
        return torch.cat(outputs + [torch.sin(3 * x + level)] * (parts - 1), dim=1)

    return model


def phi(x):
    return 0.5 * math.erfc(-x / math.sqrt(2.0))


def by_the_paper(images, prediction, variance, seed, first_sample, clip):
    """Ho et al. 2020, eq. 5-13, term by term and image by image; noise by the documented streams."""
    betas = SCHEDULE.betas
    alphas = 1 - betas
    bar = np.cumprod(alphas)
    T, per_image = len(betas), []
    for i in range(len(images)):
        u = images[i].numpy().astype(np.float64)
        x0 = 2 * u / 255 - 1
        total = 0.5 * (bar[-1] * x0**2 + (1 - bar[-1]) - 1 - np.log(1 - bar[-1])).sum()
        for t in range(T):
            stream = noise.STREAM_BOUND_NOISE + t
            eps = noise.normal(seed, first_sample + i, 1, stream, x0.size).reshape(x0.shape).astype(np.float64)
            x_t = np.sqrt(bar[t]) * x0 + np.sqrt(1 - bar[t]) * eps
            fed = torch.tensor(x_t[None], dtype=torch.float32)
            m = toy(2 if variance.startswith("learned") else 1)(fed, torch.tensor([t]))[0].double().numpy()
            raw = m[2:] if len(m) > 2 else None
            m = m[:2]
            guess = {
                "eps": (x_t - np.sqrt(1 - bar[t]) * m) / np.sqrt(bar[t]),
                "x0": m,
                "v": np.sqrt(bar[t]) * x_t - np.sqrt(1 - bar[t]) * m,
            }[prediction]
            guess = guess.clip(-1, 1) if clip else guess
            before = bar[t - 1] if t else 1.0
            tilde = betas[t] * (1 - before) / (1 - bar[t])
            first = betas[1] * (1 - bar[0]) / (1 - bar[1])
            if variance == "learned":
                sigma2 = np.exp(raw)
            elif variance == "learned_range":
                share = (raw + 1) / 2
                sigma2 = np.exp(share * np.log(betas[t]) + (1 - share) * np.log(tilde if t else first))
            elif t == 0:
                sigma2 = first
            else:
                sigma2 = tilde if variance == "fixed_small" else betas[t]
            if t:
                c0, ct = np.sqrt(before) * betas[t] / (1 - bar[t]), np.sqrt(alphas[t]) * (1 - before) / (1 - bar[t])
                ours, theirs = c0 * x0 + ct * x_t, c0 * guess + ct * x_t
                kl = 0.5 * (np.log(sigma2 / tilde) + (tilde + (ours - theirs) ** 2) / sigma2 - 1)
                total += np.broadcast_to(kl, x0.shape).sum()
            else:
                sigma = np.broadcast_to(np.sqrt(sigma2), x0.shape)
                for value, mean, s in zip(u.ravel(), guess.ravel(), sigma.ravel(), strict=True):
                    x = 2 * value / 255 - 1
                    high = 1.0 if value == 255 else phi((x + 1 / 255 - mean) / s)
                    low = 0.0 if value == 0 else phi((x - 1 / 255 - mean) / s)
                    total -= math.log(high - low)
        per_image.append(total / math.log(2) / x0.size)
    return np.array(per_image)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize("clip", [False, True], ids=["unclipped", "clipped"])
def test_bits_are_the_papers(prediction, variance, clip):
    images = pictures()
    parts = 2 if variance.startswith("learned") else 1
    sampler = Sampler(toy(parts), SCHEDULE, prediction=prediction, variance=variance, clip=clip)
    got = bits_per_dim(sampler, images, seed=7, first_sample=2**33)
    expected = by_the_paper(images, prediction, variance, 7, 2**33, clip)
    np.testing.assert_allclose(got.total, expected, rtol=3e-6)
    assert got.exact
    assert got.passes == 6 == passes_for(sampler, None)
    assert got.mean == pytest.approx(expected.mean(), rel=3e-6)
    assert got.standard_error == pytest.approx(expected.std(ddof=1) / 2, rel=1e-4)


def test_bits_do_not_depend_on_the_batch():
    images, sampler = pictures(7), Sampler(toy(1), SCHEDULE)
    for timesteps in (None, 2):
        whole = bits_per_dim(sampler, images, timesteps=timesteps, seed=3)
        parts = [bits_per_dim(sampler, images[i : i + 3], timesteps=timesteps, seed=3, first_sample=i, batch_size=2)
                 for i in (0, 3, 6)]  # fmt: skip
        np.testing.assert_array_equal(np.concatenate([part.total for part in parts]), whole.total)


def test_strata_cover_every_term_once():
    for steps in (1, 2, 5, 99, 999):
        for wanted in (None, 1, 2, 7, 20, 5000):
            strata = _strata(steps, wanted)
            assert len(strata) == (steps if wanted is None else min(wanted, steps))
            assert [t for first, width in strata for t in range(first, first + width)] == list(range(1, steps + 1))
    assert _strata(0, None) == []


def test_a_subset_of_timesteps_is_right_on_average():
    schedule = Schedule.linear(50, 0.001, 0.2)
    images = pictures(1).expand(600, *SHAPE)  # one image, over and over: what differs is timesteps and noise
    sampler = Sampler(toy(1), schedule, variance="fixed_small")
    exact = bits_per_dim(sampler, images, seed=1, batch_size=600)
    some = bits_per_dim(sampler, images, timesteps=5, seed=2, batch_size=600)
    assert some.passes == 6
    assert not some.exact
    assert some.standard_error > exact.standard_error
    assert abs(some.mean - exact.mean) < 4 * math.hypot(some.standard_error, exact.standard_error)
    np.testing.assert_array_equal(some.prior, exact.prior)


def test_a_gaussian_in_closed_form():
    """x0 ~ N(m, s^2), rounded to pixel values, and its best denoiser: every term's mean is known."""
    m, s, schedule = 0.1, 0.25, Schedule.linear(200, 1e-4, 0.1)
    bar, betas = schedule.alphas_cumprod, schedule.betas
    draws = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * s + m
    images = ((draws + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    before = np.append(1.0, bar[:-1])
    left = s * s * (1 - bar) / (bar * s * s + 1 - bar)  # the variance of x0 given x_t
    c0, tilde = np.sqrt(before) * betas / (1 - bar), betas * (1 - before) / (1 - bar)
    A, best = torch.tensor(bar), torch.tensor(np.log(tilde + c0**2 * left))  # best: of x_{t-1} given x_t

    def mean(x, t):
        a = A[t].view(-1, 1, 1, 1)
        return (m + a.sqrt() * s * s / (a * s * s + 1 - a) * (x.double() - a.sqrt() * m)).float()

    def mean_and_variance(x, t):
        return torch.cat([mean(x, t), best[t].float().view(-1, 1, 1, 1).expand_as(x)], dim=1)

    got = bits_per_dim(Sampler(mean, schedule, prediction="x0", variance="fixed_small"), images, batch_size=4000)
    steps = (0.5 * c0[1:] ** 2 * left[1:] / tilde[1:]).sum() / math.log(2)
    prior = 0.5 * (bar[-1] * (m * m + s * s) - bar[-1] - np.log(1 - bar[-1])) / math.log(2)
    assert got.steps.mean() == pytest.approx(steps, rel=0.01)
    assert got.prior.mean() == pytest.approx(prior, rel=0.05)
    # With the best variances too the model is the Gaussian itself: the bound is the entropy of the pixels.
    learned = Sampler(mean_and_variance, schedule, prediction="x0", variance="learned")
    got = bits_per_dim(learned, images, batch_size=4000)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * s * s) - math.log2(1 / 127.5)
    assert got.standard_error < 0.02
    assert got.mean == pytest.approx(entropy, abs=4 * got.standard_error)


def test_the_decoder_keeps_its_digits_far_out():
    pixels = torch.tensor([[0, 128, 255, 128]], dtype=torch.uint8)
    mean, logvar = torch.tensor([[5.0, -4.0, -5.0, 4.0]]).double(), torch.full((1, 4), 2 * math.log(0.01)).double()
    got = [float(decoder_nats(pixels[:, i : i + 1], mean[:, i : i + 1], logvar[:, i : i + 1])) for i in range(4)]
    # -log of a Gaussian tail beyond z is z^2/2 + log(z sqrt(2 pi)) up to 1/z^2.
    for value, edge in zip(got, (5 + 1 - 1 / 255, 4 + 128 / 127.5 - 1 - 1 / 255, 6 - 1 / 255, 0), strict=True):
        if edge:
            z = edge / 0.01
            assert value == pytest.approx(z * z / 2 + math.log(z * math.sqrt(2 * math.pi)), rel=1e-6)
    assert math.isfinite(got[3])


def test_a_real_network_in_every_form():
    torch.manual_seed(0)
    net = UNet(1, 16, width=4, depth=1, num_classes=3)
    images, labels = pictures(5, (1, 8, 8)), torch.tensor([0, 1, 2, 0, 1])
    plain = bits_per_dim(Sampler(net, SCHEDULE), images, labels=labels, batch_size=2)
    fused = bits_per_dim(Sampler(net, SCHEDULE, fused=True), images, labels=labels, batch_size=2)
    np.testing.assert_allclose(fused.total, plain.total, rtol=1e-4)
    assert net.training
    done = []
    bits_per_dim(Sampler(net, SCHEDULE), images, labels=labels, timesteps=2, batch_size=2, progress=done.append)
    assert done == [6, 6, 3]


def test_respaced_is_the_bound_of_the_shorter_process():
    kept = [5, 3, 0]
    bar = SCHEDULE.alphas_cumprod[[0, 3, 5]]
    short = Schedule(1 - bar / np.append(1.0, bar[:-1]))
    images = pictures(3)

    def model(x, t):
        return torch.tanh(x)

    whole = bits_per_dim(Sampler(model, SCHEDULE, steps=kept), images)
    np.testing.assert_allclose(whole.total, bits_per_dim(Sampler(model, short), images).total, rtol=1e-6)


def test_bad_input():
    sampler = Sampler(toy(1), SCHEDULE)
    with pytest.raises(ValueError, match=r"images must be uint8 .* got torch.float32 of shape \(2, 2, 3, 3\)"):
        bits_per_dim(sampler, torch.zeros(2, *SHAPE))
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        bits_per_dim(sampler, pictures()[:0])
    with pytest.raises(ValueError, match="timesteps must be an integer of at least 1, got 0"):
        bits_per_dim(sampler, pictures(), timesteps=0)
    with pytest.raises(ValueError, match="batch_size must be an integer of at least 1, got True"):
        bits_per_dim(sampler, pictures(), batch_size=True)
    with pytest.raises(ValueError, match="bits per dimension are of method=\"ddpm\", got a sampler with method='ddim'"):
        bits_per_dim(Sampler(toy(1), SCHEDULE, method="ddim"), pictures())
    with pytest.raises(ValueError, match="got one with thresholding"):
        bits_per_dim(Sampler(toy(1), SCHEDULE, thresholding=True), pictures())
    with pytest.raises(ValueError, match="seed must be an integer"):
        bits_per_dim(sampler, pictures(), seed=-1)
