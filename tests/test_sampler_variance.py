"""Networks that predict the variance too: learned and learned_range through the sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sampler_models import SHAPE, Net, threads
from torch import nn

from ddpm_fast import ops
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule

LINEAR = Schedule.linear(100)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


class Wide(nn.Module):
    """(x, t[, labels]) -> 2C channels: a prediction, and v around [-1, 1]."""

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.mean, self.spread = Net(num_classes=num_classes, seed=0), Net(num_classes=num_classes, seed=1)
        if num_classes is not None:
            self.num_classes = self.null_label = num_classes

    def forward(self, x, t, *labels):
        return torch.cat([self.mean(x, t, *labels), torch.tanh(self.spread(x, t, *labels))], dim=1)


@pytest.fixture
def net():
    return Wide().eval()


@torch.no_grad()
def by_formula(model, timesteps, x, noise, log_variance, clip=1.0):
    """Ho et al. 2020, eq. 6 and 7, in float64 but for the network; log_variance(v, beta, small) of a row."""
    x = x.double()
    for row, t in enumerate(timesteps):
        A = LINEAR.alphas_cumprod[t]
        P = LINEAR.alphas_cumprod[timesteps[row + 1]] if row + 1 < len(timesteps) else 1.0
        m, v = model(x.float(), torch.full((len(x),), int(t))).double().chunk(2, dim=1)
        x0 = ((x - (1 - A) ** 0.5 * m) / A**0.5).clamp(-clip, clip)
        beta = 1 - A / P
        x = P**0.5 * beta / (1 - A) * x0 + (A / P) ** 0.5 * (1 - P) / (1 - A) * x
        if P < 1:
            x = x + torch.exp(log_variance(v, beta, beta * (1 - P) / (1 - A)) / 2) * noise[row].double()
    return x


def between(v, beta, small):
    f = (v + 1) / 2  # Nichol & Dhariwal 2021, eq. 15
    return f * np.log(beta) + (1 - f) * np.log(small)


@pytest.mark.parametrize(("variance", "formula"), [("learned_range", between), ("learned", lambda v, *_: v)])
def test_equals_the_float64_formula(net, variance, formula):
    noise = torch.randn(12, 2, *SHAPE, generator=torch.Generator().manual_seed(2))
    x = ops.normal(2, SHAPE, seed=1)
    sampler = Sampler(net, LINEAR, steps=12, variance=variance, clip=1.0)
    expected = by_formula(net, sampler.timesteps, x, noise, formula)
    torch.testing.assert_close(sampler.sample(2, SHAPE, x=x, noise=noise).double(), expected, rtol=1e-5, atol=1e-5)
    fixed = Sampler(lambda x, t: net(x, t)[:, :3], LINEAR, steps=12, clip=1.0).sample(2, SHAPE, x=x, noise=noise)
    assert (fixed - expected).abs().max() > 0.01  # so the second half of the channels did matter


@pytest.mark.parametrize("steps", [10, None])
def test_learned_range_is_diffusers(net, steps):
    scheduler = pytest.importorskip("diffusers").DDPMScheduler(
        num_train_timesteps=100, variance_type="learned_range", clip_sample=True
    )
    scheduler.set_timesteps(steps or 100)
    x = ops.normal(2, SHAPE, seed=1)
    ours = Sampler(net, LINEAR, steps=steps, like="diffusers", variance="learned_range")
    assert ours.timesteps == scheduler.timesteps.tolist()
    stream = ours.stream(2, SHAPE, x=x, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for step in stream:
        with torch.no_grad():
            m = net(x, torch.full((2,), step.t))
        x = scheduler.step(m, step.t, x, generator=generator).prev_sample
        # Their tables are float32, in which 1 - alphas_cumprod loses digits near t = 0.
        torch.testing.assert_close(step.x, x, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["ddim", "dpmsolver++"])
@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_other_methods_leave_the_variance_aside(net, method, variance):
    options = {"steps": 7, "method": method, "clip": 1.0, "eta": 0.5 if method == "ddim" else None}
    half = Sampler(lambda x, t: net(x, t)[:, :3], LINEAR, **options).sample(2, SHAPE, seed=0)
    assert torch.equal(Sampler(net, LINEAR, variance=variance, **options).sample(2, SHAPE, seed=0), half)


@pytest.mark.parametrize("choices", [{}, {"thresholding": (0.9, 2.0)}, {"deterministic": True, "chunk": 2}])
def test_guidance_takes_the_labelled_variance(choices):
    net = Wide(num_classes=4).eval()
    labels = torch.tensor([0, 3, 2])

    def guided(x, t):
        chosen = labels[: len(x)] if len(x) == 3 else torch.zeros(len(x), dtype=torch.long)
        plain, full = net(x, t, torch.full((len(x),), 4)), net(x, t, chosen)
        return torch.cat([plain[:, :3] + 2.5 * (full - plain)[:, :3], full[:, 3:]], dim=1)

    options = {"steps": 9, "variance": "learned_range"}
    expected = Sampler(guided, LINEAR, **options, thresholding=choices.get("thresholding")).sample(3, SHAPE, seed=1)
    got = Sampler(net, LINEAR, **options, **choices).sample(3, SHAPE, seed=1, labels=labels, guidance=2.5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_chunks_half_precision_and_vectors(net):
    sampler = Sampler(net, LINEAR, steps=9, variance="learned_range", clip=1.0)
    whole = sampler.sample(5, SHAPE, seed=0)
    parts = Sampler(net, LINEAR, steps=9, variance="learned_range", clip=1.0, chunk=2).sample(5, SHAPE, seed=0)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)
    half = Sampler(Wide().bfloat16(), LINEAR, steps=9, variance="learned_range", clip=1.0).sample(5, SHAPE, seed=0)
    assert (half - whole).abs().mean() < 0.02
    vectors = Sampler(lambda x, t: torch.cat([0.1 * x, 0 * x], 1), LINEAR, steps=9, variance="learned_range")
    assert vectors.sample(4, (2,), seed=0).shape == (4, 2)


def test_a_network_with_the_wrong_number_of_channels_is_told(net):
    with pytest.raises(
        ValueError, match=r'got \(2, 6, 8, 8\); .*pass the Sampler variance="learned_range" or "learned"'
    ):
        Sampler(net, LINEAR).sample(2, SHAPE, seed=0)
    wrong = (
        r"must return shape \(2, 6, 8, 8\), a prediction like its input and a variance, got \(2, 3, 8, 8\); .*fixed_"
    )
    with pytest.raises(ValueError, match=wrong):
        Sampler(Net(), LINEAR, variance="learned").sample(2, SHAPE, seed=0)


def test_repr_names_the_variance(net):
    for method in ("ddpm", "ddim"):
        assert "variance='learned_range'" in repr(Sampler(net, LINEAR, method=method, variance="learned_range"))
