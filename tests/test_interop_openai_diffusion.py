"""OpenAI's sampling: `SpacedDiffusion` against the papers' formulas, in float64 but for the network."""

import copy
import pickle

import numpy as np
import pytest
import torch
from openai_process import LARGE, RANGE, SHAPE, SMALL, Net, T, by_formula, cosine, drawn, linear, tables
from openai_unet import authority

from ddpm_fast.interop import openai
from ddpm_fast.interop.openai import (
    ModelMeanType,
    SpacedDiffusion,
    create_gaussian_diffusion,
    from_openai,
    space_timesteps,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# -- what is kept, and what the network is told ---------------------------------------------------------------------


def test_betas_and_respacing_are_the_published_ones():
    np.testing.assert_allclose(openai.get_named_beta_schedule("linear", 250), linear(250), rtol=1e-14)
    np.testing.assert_allclose(openai.get_named_beta_schedule("cosine", 250), cosine(250), rtol=1e-12)
    assert space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    assert space_timesteps(300, [10, 15, 20]) == space_timesteps(300, "10,15,20")
    strides = np.cumsum([0.0] + [99 / 14] * 14)  # summed up, which decides at the tie of 49.5
    assert sorted(space_timesteps(300, "10,15,20"))[10:25] == [100 + round(s) for s in strides]
    assert space_timesteps(10, [10]) == set(range(10))
    assert sorted(space_timesteps(11, "2,3")) == [0, 5, 6, 8, 10]


@pytest.mark.parametrize("respacing", ["", "ddim20", "7", "3,5,4"])
@pytest.mark.parametrize("noise_schedule", ["linear", "cosine"])
def test_tables_of_what_is_kept(respacing, noise_schedule):
    diffusion = create_gaussian_diffusion(steps=T, noise_schedule=noise_schedule, timestep_respacing=respacing)
    kept = diffusion.timestep_map
    assert kept == sorted(space_timesteps(T, respacing or [T]))
    A, P, beta = tables({"linear": linear, "cosine": cosine}[noise_schedule](T), kept)
    small = beta * (1 - P) / (1 - A)
    close = {"rtol": 1e-9, "atol": 1e-14}
    np.testing.assert_allclose(diffusion.alphas_cumprod, A, **close)
    np.testing.assert_allclose(diffusion.alphas_cumprod_prev, P, **close)
    np.testing.assert_allclose(diffusion.alphas_cumprod_next, np.append(A[1:], 0), **close)
    np.testing.assert_allclose(diffusion.betas, beta, **close)
    np.testing.assert_allclose(diffusion.posterior_variance, small, **close)
    np.testing.assert_allclose(
        diffusion.posterior_log_variance_clipped, np.log(np.append(small[1], small[1:])), **close
    )
    np.testing.assert_allclose(diffusion.sqrt_recipm1_alphas_cumprod, np.sqrt(1 / A - 1), rtol=1e-8)
    np.testing.assert_allclose(diffusion.posterior_mean_coef2, np.sqrt(A / P) * (1 - P) / (1 - A), **close)


@pytest.mark.parametrize("way", ["sampler", "formula", "loss"])
def test_rescaled_times_are_of_the_original_process(way):
    """T = 50 kept at 5: the network is told 1000/50 times the timesteps of the 50, in floats; without, as they are."""
    for rescale in (True, False):
        diffusion = create_gaussian_diffusion(steps=50, timestep_respacing="5", rescale_timesteps=rescale)
        net, scale = Net(), 20.0 if rescale else 1
        if way == "loss":
            t = torch.arange(5)
            diffusion.training_losses(net, torch.zeros(5, 3, 8, 8), t)
            assert net.told[0].tolist() == [scale * diffusion.timestep_map[i] for i in t]
        else:
            diffusion.p_sample_loop(net, SHAPE, denoised_fn=(lambda x: x) if way == "formula" else None)
            assert [t.tolist() for t in net.told] == [[scale * t] * 2 for t in reversed(diffusion.timestep_map)]
        assert net.told[0].dtype == (torch.float32 if rescale else torch.int64)


# -- sampling ---------------------------------------------------------------------------------------------------------

CASES = {
    "large": {},
    "small": {"sigma_small": True},
    "learned_range": {"learn_sigma": True},
    "learned_range_respaced": {"learn_sigma": True, "timestep_respacing": "4,6"},
    "learned_range_cosine": {"learn_sigma": True, "noise_schedule": "cosine", "timestep_respacing": "12"},
    "x0": {"predict_xstart": True, "timestep_respacing": "10"},
    "rescaled": {"rescale_timesteps": True, "timestep_respacing": "ddim10"},
}


def expected_of(name, net, steps, **options):
    flags = CASES[name]
    betas = (cosine if flags.get("noise_schedule") == "cosine" else linear)(T)
    variance = RANGE if flags.get("learn_sigma") else SMALL if flags.get("sigma_small") else LARGE
    model = net
    if flags.get("rescale_timesteps"):
        model = lambda x, t, **kw: net(x, t.float() * 1000 / T, **kw)  # noqa: E731
    x, noise = drawn(3, len(steps))
    x0 = flags.get("predict_xstart", False)
    return by_formula(model, betas, steps, x, noise, variance=variance, x0=x0, **options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("clip", [True, False])
def test_loop_equals_the_float64_formula(name, clip):
    """The sampler's loop, its steps one by one, and the formula path, given the same noise."""
    diffusion = create_gaussian_diffusion(steps=T, **CASES[name])
    net = Net("learn_sigma" in CASES[name])
    expected = expected_of(name, net, diffusion.timestep_map, clip=clip)
    asked = {"shape": SHAPE, "clip_denoised": clip}
    loop = diffusion.p_sample_loop(net, **asked, generator=torch.Generator().manual_seed(3))
    *_, last = diffusion.p_sample_loop_progressive(net, **asked, generator=torch.Generator().manual_seed(3))
    plain = diffusion.p_sample_loop(net, **asked, denoised_fn=lambda x: x, generator=torch.Generator().manual_seed(3))
    assert loop.dtype == torch.float32
    for got in (loop, last["sample"], plain):
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=3e-5)
    assert torch.equal(last["sample"], loop)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ["large", "learned_range_respaced", "x0"])
def test_ddim_equals_the_float64_formula(name, eta):
    diffusion = create_gaussian_diffusion(steps=T, **CASES[name])
    net = Net("learn_sigma" in CASES[name])
    expected = expected_of(name, net, diffusion.timestep_map, kind="ddim", eta=eta)
    generator = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    loop = diffusion.ddim_sample_loop(net, SHAPE, eta=eta, generator=generator())
    plain = diffusion.ddim_sample_loop(net, SHAPE, eta=eta, denoised_fn=lambda x: x, generator=generator())
    *_, last = diffusion.ddim_sample_loop_progressive(net, SHAPE, eta=eta, generator=generator())
    for got in (loop, plain, last["sample"]):
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-5)


def test_given_x_T_labels_and_torch_seed():
    diffusion = create_gaussian_diffusion(steps=T, timestep_respacing="6")
    net, y = Net(classes=4), torch.tensor([1, 3])
    x = torch.randn(SHAPE)
    expected = by_formula(net, linear(T), diffusion.timestep_map, x, [torch.zeros(SHAPE)] * 6, kind="ddim", y=y)
    got = diffusion.ddim_sample_loop(net, SHAPE, noise=x, model_kwargs={"y": y})
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
    torch.manual_seed(1)
    first = diffusion.p_sample_loop(net, SHAPE, noise=x, model_kwargs={"y": y})
    torch.manual_seed(1)
    assert torch.equal(diffusion.p_sample_loop(net, SHAPE, noise=x, model_kwargs={"y": y}), first)
    assert not torch.equal(diffusion.p_sample_loop(net, SHAPE, noise=x, model_kwargs={"y": y}), first)


@pytest.mark.parametrize("updown", [False, True])
def test_our_networks_run_as_fused_plans_and_give_the_same(updown):
    theirs = authority("classes_scale_shift", out_channels=6, updown=updown)
    net = from_openai(theirs.state_dict(), num_heads=4, image_size=8)
    options = {"num_classes": 7, "num_heads": 4, "use_scale_shift_norm": True, "resblock_updown": updown}
    model = openai.UNetModel(8, 3, 32, 6, 1, (2,), channel_mult=(1, 2), **options)
    model.load_state_dict(theirs.state_dict())
    y = torch.tensor([1, 6])
    diffusion = create_gaussian_diffusion(steps=T, learn_sigma=True, timestep_respacing="5", rescale_timesteps=True)
    x, noise = drawn(3, 5)
    rescaled = lambda x, t, y: theirs(x, t.float() * 1000 / T, y)  # noqa: E731
    expected = by_formula(rescaled, linear(T), diffusion.timestep_map, x, noise, variance=RANGE, y=y)
    for ours in (net, model):
        for fused in (True, False):
            diffusion.fused = fused
            kwargs = {"model_kwargs": {"y": y}, "generator": torch.Generator().manual_seed(3)}
            got = diffusion.p_sample_loop(ours, SHAPE, **kwargs)
            torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-4)
            sampler = diffusion.sampler(ours, device="cpu")
            assert sampler.fused is fused
            assert diffusion.sampler(ours, device="cpu") is sampler
    assert model.training  # given back as it was
    diffusion.fused = True
    model.load_state_dict({key: torch.zeros_like(value) for key, value in theirs.state_dict().items()})
    anew = diffusion.p_sample_loop(model, SHAPE, model_kwargs={"y": y}, generator=torch.Generator().manual_seed(3))
    zero = lambda x, t, y: torch.zeros(2, 6, 8, 8)  # noqa: E731
    expected = by_formula(zero, linear(T), diffusion.timestep_map, x, noise, variance=RANGE, y=y)
    torch.testing.assert_close(anew.double(), expected, rtol=0, atol=3e-5)
    with pytest.raises(ValueError, match="labels"):
        diffusion.p_sample_loop(model, SHAPE)


def test_a_ddpm_unet_knows_y_in_every_way(capsys):
    net = from_openai(authority("classes").state_dict(), num_heads=1)
    diffusion, y = create_gaussian_diffusion(steps=T, timestep_respacing="3"), torch.tensor([1, 6])
    diffusion.fused = False
    x = torch.randn(SHAPE)
    asked = {"noise": x, "model_kwargs": {"y": y}, "device": "cpu"}
    expected = diffusion.ddim_sample_loop(net, SHAPE, **asked, progress=True)
    *_, last = diffusion.ddim_sample_loop_progressive(net, SHAPE, **asked, denoised_fn=lambda x: x, progress=True)
    torch.testing.assert_close(last["sample"], expected, rtol=0, atol=1e-5)
    assert "3/3" in capsys.readouterr().err
    t = torch.tensor([0, 2])
    assert diffusion.training_losses(net, x, t, model_kwargs={"y": y})["loss"].shape == (2,)
    other = diffusion.ddim_sample_loop(net, SHAPE, noise=x, model_kwargs={"y": y - 1})
    assert not torch.equal(other, expected)


def test_guidance_by_functions():
    """condition_mean and condition_score, and denoised_fn before the clip, in float64."""
    diffusion = create_gaussian_diffusion(steps=T, timestep_respacing="8", rescale_timesteps=True)
    net, seen = Net(), []

    def push(x, t, scale):
        seen.append(float(t[0]))
        return scale * torch.cos(x)

    A, P, beta = tables(linear(T), diffusion.timestep_map)
    for i in (7, 3, 0):
        x, t = torch.randn(SHAPE), torch.full((2,), i)
        told = torch.full((2,), diffusion.timestep_map[i] * 1000.0 / T)
        m, g = net(x, told).double(), 0.3 * torch.cos(x).double()
        data = ((x - np.sqrt(1 - A[i]) * m) / np.sqrt(A[i])).mul(0.5).clamp(-1, 1)
        c1, c2 = np.sqrt(P[i]) * beta[i] / (1 - A[i]), np.sqrt(A[i] / P[i]) * (1 - P[i]) / (1 - A[i])
        variance = beta[i] if i else beta[1] * (1 - P[1]) / (1 - A[1])
        given = {"denoised_fn": lambda x: x / 2, "cond_fn": push, "model_kwargs": {"scale": 0.3}}
        model = lambda x, t, scale: net(x, t)  # noqa: E731
        got = diffusion.p_sample(model, x, t, **given, generator=torch.Generator().manual_seed(1))
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)) * (i > 0)
        expected = c1 * data + c2 * x + variance * g + np.sqrt(variance) * z
        torch.testing.assert_close(got["sample"].double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(got["pred_xstart"].double(), data, rtol=0, atol=1e-5)
        assert seen[-1] == float(told[0])

        got = diffusion.ddim_sample(model, x, t, **given)
        eps = (x - np.sqrt(A[i]) * data) / np.sqrt(1 - A[i]) - np.sqrt(1 - A[i]) * g
        pushed = (x - np.sqrt(1 - A[i]) * eps) / np.sqrt(A[i])
        expected = np.sqrt(P[i]) * pushed + np.sqrt(1 - P[i]) * eps
        torch.testing.assert_close(got["sample"].double(), expected, rtol=0, atol=2e-5)


def test_ddim_forwards_and_back():
    """ddim_reverse_sample is ddim_sample read from right to left."""
    diffusion = create_gaussian_diffusion(steps=T)
    data = torch.rand(SHAPE) - 0.5

    def perfect(x, t):  # the eps that belongs to `data` in x
        A = torch.tensor(diffusion.alphas_cumprod)[t].view(-1, 1, 1, 1)
        return ((x - A.sqrt() * data) / (1 - A).sqrt()).float()

    x, t = diffusion.q_sample(data, torch.full((2,), 40)), torch.full((2,), 40)
    up = diffusion.ddim_reverse_sample(perfect, x, t)
    torch.testing.assert_close(up["pred_xstart"], data, rtol=0, atol=1e-4)
    back = diffusion.ddim_sample(perfect, up["sample"], t + 1)["sample"]
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="eta must be 0"):
        diffusion.ddim_reverse_sample(perfect, x, t, eta=0.1)


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_named():
    given = {"betas": linear(T), "model_mean_type": ModelMeanType.EPSILON, "model_var_type": LARGE}
    diffusion = SpacedDiffusion(range(T), **given)
    x, t, net = torch.zeros(SHAPE), torch.zeros(2, dtype=torch.int64), Net()
    cases = [
        (lambda: create_gaussian_diffusion(noise_schedule="sigmoid"), "noise_schedule must be linear or cosine"),
        (lambda: create_gaussian_diffusion(steps=100, timestep_respacing="101"), "timestep_respacing '101'.*1 to 100"),
        (lambda: create_gaussian_diffusion(steps=100, timestep_respacing="ddim30"), "no whole stride takes exactly 30"),
        (lambda: create_gaussian_diffusion(timestep_respacing="many"), "timestep_respacing 'many'.*must look like"),
        (lambda: SpacedDiffusion([], **given), "at least one timestep"),
        (lambda: SpacedDiffusion([T], **given), "must lie in 0..99"),
        (lambda: SpacedDiffusion([0], **{**given, "model_mean_type": ModelMeanType.PREVIOUS_X}), "PREVIOUS_X is not"),
        (lambda: SpacedDiffusion([0], **{**given, "model_var_type": "large"}), "model_var_type must be a ModelVarType"),
        (lambda: diffusion.q_sample(x, t + T), "t must lie in 0..99"),
        (lambda: diffusion.q_sample(x, t.float()), "t must be int64 or int32"),
        (lambda: diffusion.p_mean_variance(net, x, t[:1]), r"of shape \(2,\)"),
        (lambda: diffusion.p_mean_variance(Net(True), x, t), r"must return shape \(2, 3, 8, 8\).*got \(2, 6, 8, 8\)"),
        (lambda: diffusion.training_losses(net, x, t, noise=x[:1]), "noise must have shape"),
        (lambda: diffusion.p_sample_loop(net, 4), "shape must be that of a batch"),
        (lambda: diffusion.p_sample_loop(Net(True), SHAPE), "learned variance"),
        (lambda: diffusion.p_sample_loop(net, SHAPE, noise=x[:1]), "x must have"),
    ]
    for call, message in cases:
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_copies_leave_what_is_of_this_machine_behind():
    diffusion = create_gaussian_diffusion(steps=T, timestep_respacing="4")
    x = torch.randn(SHAPE)
    expected = diffusion.ddim_sample_loop(Net(), SHAPE, noise=x)
    for other in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert torch.equal(other.ddim_sample_loop(Net(), SHAPE, noise=x), expected)
