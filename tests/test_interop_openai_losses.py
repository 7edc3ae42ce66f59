"""OpenAI's losses and bits per dimension, against the papers' formulas, in float64 but for the network."""

import numpy as np
import pytest
import torch
from openai_process import LARGE, RANGE, SMALL, Net, T, linear, tables

from ddpm_fast.interop.openai import (
    LossType,
    ModelMeanType,
    SpacedDiffusion,
    create_gaussian_diffusion,
    space_timesteps,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
