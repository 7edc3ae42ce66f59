"""Each row of the presets' table beside the peer itself: schedules, timesteps, whole samples, and what is returned.

Small networks and few timesteps; the peer's own loop, with its own defaults, draws its noise from a generator that
`Sampler` is given too. OpenAI's package is not to be had: its row is held to the formulas of the published source.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lucidrains_pairs import SIDE, make_unet, seeded
from sampler_models import SHAPE, Net, tutorial_loop

from ddpm_fast import Sampler, Schedule, noise, ops

pytestmark = pytest.mark.usefixtures("one_thread")
DEFAULT = torch.default_generator
CLOSE = {"rtol": 0, "atol": 5e-4}  # diffusers' float32 tables, over all steps


def images_of(sampler: Sampler, n: int = 2, shape: tuple[int, ...] = SHAPE):
    """With the noise that the peer's loop draws; in the range that the peer returns."""
    return seeded(lambda: sampler.sample(n, shape, generator=DEFAULT, progress=False))


# -- diffusers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def diffusers():
    return pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")


@pytest.mark.parametrize("T", [40, 1000, 4000])
@pytest.mark.parametrize("name", [None, "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_diffusers_schedules(diffusers, name, T) -> None:
    theirs = diffusers.DDPMScheduler(T, **({} if name is None else {"beta_schedule": name}))
    np.testing.assert_allclose(Schedule.like("diffusers", T, name).betas, theirs.betas.double(), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 7, 10, 50, 333, 1000])
def test_diffusers_timesteps(diffusers, steps) -> None:
    theirs = diffusers.DDPMScheduler()
    theirs.set_timesteps(steps)
    mine = Sampler(Net(), Schedule.like("diffusers", 1000), like="diffusers", steps=steps)
    assert mine.timesteps == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [None, 9])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_diffusers_images(diffusers, method, steps) -> None:
    """What DDPMPipeline and DDIMPipeline return for their schedulers as they come."""
    T, net = 40, Net().eval()
    scheduler = {"ddpm": diffusers.DDPMScheduler, "ddim": diffusers.DDIMScheduler}[method](T)
    scheduler.set_timesteps(steps or T)

    @torch.no_grad()
    def theirs():
        x = torch.randn(2, *SHAPE)
        for t in scheduler.timesteps:
            drawn = {"generator": DEFAULT} if method == "ddpm" else {}
            x = scheduler.step(net(x, t.expand(2)), t, x, **drawn).prev_sample
        return (x / 2 + 0.5).clamp(0, 1)

    mine = Sampler(net, Schedule.like("diffusers", T), like="diffusers", steps=steps, method=method)
    torch.testing.assert_close(images_of(mine), seeded(theirs), **CLOSE)


# -- lucidrains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [40, 1000, 4000])
@pytest.mark.parametrize("name", [None, "linear", "cosine", "sigmoid"])
def test_lucidrains_schedules(lucidrains, name, T) -> None:
    given = {} if name is None else {"beta_schedule": name}
    theirs = lucidrains.GaussianDiffusion(make_unet(lucidrains), image_size=SIDE, timesteps=T, **given)
    mine = Schedule.like("lucidrains", T, name)
    # The ends of its sigmoid are float32, which the last betas show.
    rtol = 1e-4 if name in (None, "sigmoid") else 1e-6
    np.testing.assert_allclose(mine.betas, theirs.betas.double(), rtol=rtol, atol=1e-9)
    np.testing.assert_allclose(mine.alphas_cumprod, theirs.alphas_cumprod.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 7, 10, 50, 250])
def test_lucidrains_timesteps(lucidrains, steps) -> None:
    """Those that its network is told."""
    told = []

    class Told(torch.nn.Module):
        channels, out_dim, self_condition = 3, 3, False

        def forward(self, x, t, x_self_cond=None):
            told.append(int(t[0]))
            return torch.zeros_like(x)

    lucidrains.GaussianDiffusion(Told(), image_size=SIDE, sampling_timesteps=steps).sample(1)
    mine = Sampler(Told(), Schedule.like("lucidrains", 1000), like="lucidrains", steps=steps, device="cpu")
    assert mine.timesteps == told


@pytest.mark.parametrize("steps", [None, 6])
def test_lucidrains_images(lucidrains, steps) -> None:
    """Its own loop: v, sigmoid, the small variance, DDIM for fewer steps, and [0, 1] that is not clamped."""
    T, net = 24, make_unet(lucidrains)
    with torch.no_grad():
        net.final_conv.weight.mul_(8)  # so that there is something to clip
    theirs = lucidrains.GaussianDiffusion(net, image_size=SIDE, timesteps=T, sampling_timesteps=steps)
    mine = Sampler(net, Schedule.like("lucidrains", T), like="lucidrains", steps=steps)
    expected = seeded(lambda: theirs.sample(2))
    torch.testing.assert_close(images_of(mine, shape=(3, SIDE, SIDE)), expected, rtol=0, atol=2e-5)
    x = torch.full((1, 3), 1.5)
    assert theirs.unnormalize(x).max() == 1.25
    done = Sampler(lambda x, t: x, Schedule.like("lucidrains", T), like="lucidrains", shape=3, device="cpu")
    assert done.sample(1, x=x, start=T).max() == 1.25


# -- OpenAI ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [100, 1000, 4000])
def test_openai_schedules(T) -> None:
    u = np.arange(T + 1) / T
    signal = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    published = {
        None: np.linspace(0.1 / T, 20 / T, T),
        "linear": np.linspace(0.1 / T, 20 / T, T),
        "cosine": np.minimum(1 - signal[1:] / signal[:-1], 0.999),
    }
    for name, betas in published.items():
        np.testing.assert_allclose(Schedule.like("openai", T, name).betas, betas, rtol=1e-12)


@pytest.mark.parametrize("steps", [2, 7, 50, 250])
def test_openai_timesteps(steps) -> None:
    """One section: both ends, and equal strides that are summed up and rounded."""
    expected, at = [], 0.0
    for _ in range(steps):
        expected.append(round(at))
        at += 999 / (steps - 1)
    mine = Sampler(Net(), Schedule.like("openai", 1000), like="openai", steps=steps)
    assert mine.timesteps == expected[::-1]


@pytest.mark.parametrize("steps", [None, 11])
def test_openai_images(steps) -> None:
    """p_sample in float64: FIXED_LARGE, clipped, times of 0..1000; and what is returned is the network's range."""
    T, told, net = 40, [], Net().eval()

    def network(x, t):
        told.append(float(t[0]))
        return 3 * net(x, t)

    mine = Sampler(network, Schedule.like("openai", T), like="openai", steps=steps, device="cpu", dtype=torch.float32)
    got = mine.sample(2, SHAPE, seed=3)
    times, mine_told, schedule = mine.timesteps, told.copy(), Schedule.like("openai", T)
    np.testing.assert_allclose(mine_told, np.array(times) * 1000 / T, rtol=1e-6)
    x = ops.normal(2, SHAPE, seed=3).double()
    for t, end in zip(times, [*times[1:], None], strict=True):
        A, P = schedule.alphas_cumprod[t], 1.0 if end is None else schedule.alphas_cumprod[end]
        with torch.no_grad():
            eps = network(x.float(), torch.full((2,), t * 1000 / T)).double()
        x0 = ((x - math.sqrt(1 - A) * eps) / math.sqrt(A)).clamp(-1, 1)
        beta = 1 - A / P
        x = (math.sqrt(P) * beta * x0 + math.sqrt(A / P) * (1 - P) * x) / (1 - A)
        if end is not None:
            x = x + math.sqrt(beta) * ops.normal(2, SHAPE, seed=3, stream=noise.STREAM_X_T + 1 + t)
    assert (x.abs() == 1).any()  # something was clipped, in the last step too
    torch.testing.assert_close(got.double(), x, rtol=0, atol=2e-5)


# -- the tutorial ---------------------------------------------------------------------------------------------------


def test_tutorial_images() -> None:
    """Every timestep, nothing clipped, sqrt(beta) of noise; shown in [0, 1]."""
    T, net = 40, Net().eval()
    mine = Sampler(net, Schedule.like("tutorial", T), like="tutorial")
    drawn = {t: ops.normal(2, SHAPE, seed=3, stream=1 + t) for t in range(T)}
    *_, (_, x) = tutorial_loop(net, T, ops.normal(2, SHAPE, seed=3), drawn)
    expected = ((x + 1) / 2).clamp(0, 1)
    assert (expected == 0).any()
    torch.testing.assert_close(mine.sample(2, SHAPE, seed=3), expected, **CLOSE)
