"""OpenAI's sampling and losses: `SpacedDiffusion` against the papers' formulas, in float64 but for the network."""

import copy
import pickle

import numpy as np
import pytest
import torch
from openai_unet import authority

from ddpm_fast.interop import openai
from ddpm_fast.interop.openai import (
    LossType,
    ModelMeanType,
    ModelVarType,
    SpacedDiffusion,
    create_gaussian_diffusion,
    from_openai,
    space_timesteps,
)

pytestmark = pytest.mark.usefixtures("one_thread")

T = 100
RANGE, LARGE, SMALL = ModelVarType.LEARNED_RANGE, ModelVarType.FIXED_LARGE, ModelVarType.FIXED_SMALL
SHAPE = (2, 3, 8, 8)


class Net(torch.nn.Module):
    """Something cheap that depends on all it is told, and remembers the times."""

    def __init__(self, learned=False, classes=None):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = torch.nn.Conv2d(3, 6 if learned else 3, 3, padding=1)
            self.labels = None if classes is None else torch.nn.Embedding(classes, 1)
        self.told = []

    def forward(self, x, t, y=None):
        self.told.append(t.clone())
        shift = torch.sin(t.float() / 50)[:, None, None, None]
        if y is not None:
            shift = shift + self.labels(y)[..., None, None]
        return torch.tanh(self.conv(x.float()) + shift).to(x.dtype)


def tables(betas, kept):
    """A, P and beta of the kept timesteps, ascending."""
    A = np.cumprod(1.0 - betas)[kept]
    P = np.append(1.0, A[:-1])
    return A, P, 1.0 - A / P


@torch.no_grad()
def by_formula(model, betas, kept, x, noise, *, kind="ddpm", variance=LARGE, x0=False, clip=True, eta=0.0, y=None):
    """Ho et al. 2020, eq. 7; Nichol & Dhariwal 2021, eq. 15; Song et al. 2020, eq. 12. noise: in the order of use."""
    A, P, beta = tables(betas, kept)
    x, kwargs = x.double(), {} if y is None else {"y": y}
    for row, i in enumerate(reversed(range(len(kept)))):
        m = model(x.float(), torch.full((len(x),), kept[i]), **kwargs).double()
        m, v = m.chunk(2, dim=1) if variance is RANGE else (m, None)
        data = m if x0 else (x - np.sqrt(1 - A[i]) * m) / np.sqrt(A[i])
        data = data.clamp(-1, 1) if clip else data
        z = noise[row].double() if i else torch.zeros_like(x)
        if kind == "ddim":
            sigma = eta * np.sqrt((1 - P[i]) / (1 - A[i]) * beta[i])
            eps = (x - np.sqrt(A[i]) * data) / np.sqrt(1 - A[i])
            x = np.sqrt(P[i]) * data + np.sqrt(max(1 - P[i] - sigma**2, 0)) * eps + sigma * z
            continue
        small = beta[i] * (1 - P[i]) / (1 - A[i])
        if variance is RANGE:
            low = np.log(small if i else beta[1] * (1 - P[1]) / (1 - A[1]))
            logvar = (v + 1) / 2 * np.log(beta[i]) + (1 - v) / 2 * low
        else:
            logvar = torch.tensor(np.log(beta[i] if variance is LARGE or not i else small))
        mean = np.sqrt(P[i]) * beta[i] / (1 - A[i]) * data + np.sqrt(A[i] / P[i]) * (1 - P[i]) / (1 - A[i]) * x
        x = mean + torch.exp(logvar / 2) * z
    return x


def drawn(seed, rows):
    """x_T and the noise of each row, as torch.randn gives them in turn."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=g), [torch.randn(SHAPE, generator=g) for _ in range(rows)]


def linear(steps):
    return np.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps)


def cosine(steps):
    u = np.arange(steps + 1) / steps
    signal = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - signal[1:] / signal[:-1], 0.999)


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


# -- training ---------------------------------------------------------------------------------------------------------


def kl(mean1, logvar1, mean2, logvar2):
    p, q = (torch.distributions.Normal(m, torch.exp(v / 2)) for m, v in ((mean1, logvar1), (mean2, logvar2)))
    return torch.distributions.kl_divergence(p, q)


def bound_by_formula(diffusion, net, data, x_t, t, variance):
    """The terms of the bound in bits, and the squared error of eps, in float64 but for the network."""
    A, P, beta = tables(linear(T), diffusion.timestep_map)
    terms = []
    for n, i in enumerate(t.tolist()):
        x, d = x_t[n : n + 1].double(), data[n : n + 1].double()
        told = torch.tensor([diffusion.timestep_map[i]])
        m = net(x_t[n : n + 1], told).double()
        m, v = m.chunk(2, dim=1) if variance is RANGE else (m, None)
        c1, c2 = np.sqrt(P[i]) * beta[i] / (1 - A[i]), np.sqrt(A[i] / P[i]) * (1 - P[i]) / (1 - A[i])
        j = max(i, 1)
        low = torch.tensor(np.log(beta[j] * (1 - P[j]) / (1 - A[j])))
        if variance is RANGE:
            logvar = (v + 1) / 2 * np.log(beta[i]) + (1 - v) / 2 * low
        else:
            logvar = torch.full_like(m, np.log(beta[i]) if i and variance is LARGE else float(low))
        mean = c1 * (x - np.sqrt(1 - A[i]) * m) / np.sqrt(A[i]) + c2 * x
        if i:
            value = kl(c1 * d + c2 * x, low.expand_as(x), mean, logvar)
        else:
            cdf = lambda z: 0.5 * (1 + torch.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))  # noqa: E731
            above, below = (
                cdf((d - mean + 1 / 255) / torch.exp(logvar / 2)),
                cdf((d - mean - 1 / 255) / torch.exp(logvar / 2)),
            )
            mass = torch.where(d < -0.999, above, torch.where(d > 0.999, 1 - below, above - below))
            value = -torch.log(mass.clamp(min=1e-12))
        terms.append(value.mean() / np.log(2))
    return torch.stack(terms)


@pytest.mark.parametrize("loss", list(LossType))
@pytest.mark.parametrize("variance", [LARGE, SMALL, RANGE])
def test_losses_by_formula(loss, variance):
    kept = space_timesteps(T, "20")
    given = {"betas": linear(T), "model_mean_type": ModelMeanType.EPSILON, "model_var_type": variance}
    diffusion, net = SpacedDiffusion(kept, **given, loss_type=loss), Net(variance is RANGE)
    data = (torch.randint(0, 256, (5, 3, 8, 8)) / 127.5 - 1).clamp(-1, 1)
    data[0, :, 0, :2] = torch.tensor([-1.0, 1.0])
    t, noise = torch.tensor([0, 1, 5, 12, 19]), torch.randn_like(data)
    A = torch.tensor(diffusion.alphas_cumprod)[t].view(-1, 1, 1, 1)
    x_t = (A.sqrt() * data + (1 - A).sqrt() * noise).float()
    got = diffusion.training_losses(net, data, t, noise=noise)
    with torch.no_grad():
        bound = bound_by_formula(diffusion, net, data, x_t, t, variance)
        told = torch.tensor(diffusion.timestep_map)[t]
        mse = ((net(x_t, told)[:, :3] - noise).double() ** 2).mean(dim=(1, 2, 3))
    close = {"rtol": 2e-4, "atol": 2e-5}
    if loss in (LossType.KL, LossType.RESCALED_KL):
        assert set(got) == {"loss"}
        torch.testing.assert_close(got["loss"].double(), bound * (20 if loss is LossType.RESCALED_KL else 1), **close)
        return
    torch.testing.assert_close(got["mse"].double(), mse, **close)
    if variance is not RANGE:
        assert set(got) == {"mse", "loss"}
        assert torch.equal(got["loss"], got["mse"])
        return
    vb = bound * (20 / 1000 if loss is LossType.RESCALED_MSE else 1)
    torch.testing.assert_close(got["vb"].double(), vb, **close)
    torch.testing.assert_close(got["loss"], got["mse"] + got["vb"])
    # the bound trains the variance and leaves the prediction alone
    got["vb"].sum().backward()
    assert float(net.conv.weight.grad[:3].abs().max()) == 0
    assert float(net.conv.weight.grad[3:].abs().max()) > 0
    net.zero_grad()
    diffusion.training_losses(net, data, t, noise=noise)["loss"].sum().backward()
    assert float(net.conv.weight.grad[:3].abs().max()) > 0


def test_bits_per_dimension_of_the_whole_process():
    diffusion = create_gaussian_diffusion(steps=T, timestep_respacing="10")
    data = torch.rand(2, 3, 8, 8) * 2 - 1
    torch.manual_seed(0)
    got = diffusion.calc_bpd_loop(Net(), data, clip_denoised=False)
    assert {name: tuple(v.shape) for name, v in got.items()} == {
        **dict.fromkeys(("total_bpd", "prior_bpd"), (2,)), **dict.fromkeys(("vb", "xstart_mse", "mse"), (2, 10))
    }  # fmt: skip
    torch.testing.assert_close(got["total_bpd"], got["vb"].sum(1) + got["prior_bpd"])
    torch.manual_seed(0)
    t = torch.full((2,), 9)
    noise = torch.randn_like(data)
    bound = bound_by_formula(diffusion, Net(), data, diffusion.q_sample(data, t, noise), t, LARGE)
    torch.testing.assert_close(got["vb"][:, 0].double(), bound.detach(), rtol=2e-4, atol=2e-5)
    A = diffusion.alphas_cumprod[9]
    prior = kl(
        (np.sqrt(A) * data).double(), torch.tensor(np.log(1 - A)), torch.zeros(()).double(), torch.zeros(()).double()
    )
    torch.testing.assert_close(got["prior_bpd"].double(), prior.mean(dim=(1, 2, 3)) / np.log(2), rtol=1e-3, atol=1e-6)
    mean, variance, logvar = diffusion.q_mean_variance(data, t)
    torch.testing.assert_close(mean.double(), np.sqrt(A) * data.double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(variance, logvar.exp())


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
