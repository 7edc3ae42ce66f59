"""like="...": each peer's choices, and that an explicit argument wins over them."""

import dataclasses

import numpy as np
import pytest
import torch
from sampler_models import SHAPE, Net

from ddpm_fast.presets import DEFAULT, PRESETS, preset
from ddpm_fast.sampler import Sampler
from ddpm_fast.schedule import Schedule

LINEAR = Schedule.linear(1000)


def chosen(**arguments):
    return Sampler(Net(), LINEAR, **arguments).choices


def test_the_documented_default():
    choices = chosen()
    assert (choices.method, choices.prediction, choices.variance) == ("ddpm", "eps", "fixed_large")
    assert (choices.clip, choices.eta, choices.time_scale, choices.output) == (False, 0.0, "index", "model")
    assert len(choices.steps) == 1000
    assert list(chosen(steps=4).steps.timesteps) == [999, 749, 499, 249]


@pytest.mark.parametrize(
    ("like", "expected"),
    [
        ("tutorial", ("ddpm", "eps", "fixed_large", False, "index", "unit")),
        ("diffusers", ("ddpm", "eps", "fixed_small", 1.0, "index", "unit")),
        ("lucidrains", ("ddpm", "v", "fixed_small", 1.0, "index", "unit_unclamped")),
        ("openai", ("ddpm", "eps", "fixed_large", 1.0, "rescaled", "model")),
    ],
)
def test_choices_of_each_peer(like, expected):
    c = chosen(like=like)
    assert (c.method, c.prediction, c.variance, c.clip, c.time_scale, c.output) == expected


@pytest.mark.parametrize(
    ("like", "first", "last", "method"),
    [
        ("diffusers", [980, 960], [20, 0], "ddpm"),
        ("lucidrains", [999, 979], [39, 19], "ddim"),
        ("openai", [999, 979, 958], [20, 0], "ddpm"),
    ],
)
def test_fifty_steps_of_each_peer(like, first, last, method):
    choices = chosen(like=like, steps=50)
    timesteps = list(choices.steps.timesteps)
    assert (timesteps[: len(first)], timesteps[-2:], choices.method) == (first, last, method)


def test_only_diffusers_keeps_eps_when_x0_is_clipped():
    kept = {like: not chosen(like=like, method="ddim").rederive_eps for like in PRESETS}
    assert kept == {"tutorial": False, "diffusers": True, "lucidrains": False, "openai": False}
    table = chosen(like="diffusers", method="ddim", steps=10).steps.coefficients
    assert (table[:-1, 4] != 0).all()  # c3, the factor of the network's own output
    assert (chosen(like="openai", method="ddim", steps=10).steps.coefficients[:, 4] == 0).all()


def test_an_explicit_argument_wins():
    explicit = {
        "method": "ddim",
        "eta": 0.3,
        "prediction": "x0",
        "variance": "fixed_large",
        "clip": False,
        "rederive_eps": False,
        "time_scale": "rescaled",
    }
    for like in (None, *PRESETS):
        choices = chosen(like=like, steps=7, spacing="linspace", **explicit)
        assert {name: getattr(choices, name) for name in explicit} == explicit
        assert list(choices.steps.timesteps) == list(LINEAR.timesteps(7, "linspace"))
    assert chosen(like="diffusers", clip=0.5).clip == 0.5
    assert chosen(like="diffusers", thresholding=True).clip is False
    assert list(chosen(like="openai", steps="ddim4").steps.timesteps) == [750, 500, 250, 0]
    assert list(chosen(like="diffusers", steps=[7, 3]).steps.timesteps) == [7, 3]
    assert list(chosen(like="diffusers", steps=4, steps_offset=1).steps.timesteps) == [751, 501, 251, 1]
    assert len(chosen(like="lucidrains", steps=np.int64(9)).steps) == 9


def test_solvers_have_choices_of_their_own():
    for like in (None, *PRESETS):
        solver = chosen(like=like, method="dpmsolver++", steps=20)
        assert list(solver.steps.timesteps) == list(LINEAR.timesteps(20, "linspace_open"))
        assert solver.clip == (False if like == "diffusers" else preset(like).clip)
        assert chosen(like=like, method="dpmsolver++", steps=20, spacing="leading", clip=0.5).clip == 0.5
        assert len(chosen(like=like, method="dpmsolver++").steps) == 1000


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("clip", [False, 1.0])
def test_ddim_that_ends_at_the_first_timestep_is_diffusers(eta, clip):
    peer = pytest.importorskip("diffusers").DDIMScheduler(
        set_alpha_to_one=False, steps_offset=1, clip_sample=bool(clip)
    )
    peer.set_timesteps(10)
    net, x, z = Net().eval(), torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.ones(2, *SHAPE)
    choices = {"method": "ddim", "eta": eta, "clip": clip, "steps": 10, "steps_offset": 1, "set_alpha_to_one": False}
    sampler = Sampler(net, LINEAR, like="diffusers", **choices)
    assert sampler.timesteps == peer.timesteps.tolist()
    assert "set_alpha_to_one=False" in repr(sampler)
    for step in sampler.stream(2, SHAPE, x=x, noise=lambda row, t: z):
        with torch.no_grad():
            m = net(x, torch.full((2,), step.t))
        x = peer.step(m, step.t, x, eta=eta, variance_noise=z if eta else None).prev_sample
        assert (step.x - x).abs().max() <= 2e-5 * x.abs().max()


def test_schedules_of_each_peer():
    assert preset("tutorial").make_schedule() == preset("diffusers").make_schedule(1000) == LINEAR
    assert preset("diffusers").make_schedule(250) == Schedule.linear(250)
    assert preset("openai").make_schedule(250) == Schedule.linear(250, scale_betas=True)
    assert preset("lucidrains").make_schedule(250) == Schedule.sigmoid_alphas_cumprod(250)
    assert preset("lucidrains").make_schedule(250, "linear") == Schedule.linear(250, scale_betas=True)
    assert preset("openai").make_schedule(40, "cosine", s=0.1) == Schedule.cosine(40, s=0.1)


def test_the_table_is_frozen_and_names_are_checked():
    assert preset(None) is DEFAULT
    with pytest.raises(TypeError):
        PRESETS["mine"] = DEFAULT
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULT.clip = 1.0
    with pytest.raises(ValueError, match="like must be one of tutorial, diffusers, lucidrains, openai, got 'edm'"):
        preset("edm")


def test_schedules_by_the_names_of_each_peer():
    assert Schedule.like("lucidrains", 250) == Schedule.sigmoid_alphas_cumprod(250)
    assert Schedule.like("lucidrains", 250, "sigmoid", tau=0.9) == Schedule.sigmoid_alphas_cumprod(250, tau=0.9)
    assert Schedule.like("diffusers", 250, "sigmoid") == Schedule.sigmoid_betas(250)
    assert Schedule.like("diffusers", 250, "squaredcos_cap_v2") == Schedule.cosine(250)
    assert Schedule.like("diffusers", 250, "laplace") == Schedule.laplace(250)
    assert Schedule.like("openai", 250) == Schedule.like("lucidrains", 250, "linear")
    assert Schedule.like("openai", 250) != Schedule.like("tutorial", 250) == Schedule.linear(250)


@pytest.mark.parametrize("peer", ["tutorial", "openai"])
def test_a_peer_that_has_no_sigmoid_does_not_guess_which(peer):
    with pytest.raises(ValueError, match=r"schedule must be one of linear, .*, got 'sigmoid'"):
        Schedule.like(peer, 100, "sigmoid")
    with pytest.raises(ValueError, match="like must be one of tutorial, diffusers"):
        Schedule.like("keras", 100)
