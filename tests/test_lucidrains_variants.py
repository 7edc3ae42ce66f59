"""A learned variance and the weighted objective beside the package's, and where the package's cannot run."""

from __future__ import annotations

import math

import pytest
import torch
from lucidrains_pairs import gradients, images, make_unet, normals, pair, plain_models, seeded

from ddpm_fast.interop import _lucidrains_sampling
from ddpm_fast.interop._lucidrains_learned import discretized_log_likelihood, normal_kl
from ddpm_fast.interop.lucidrains import GaussianDiffusion, LearnedGaussianDiffusion, WeightedObjectiveGaussianDiffusion

DEFAULT = torch.default_generator
LEARNED = {"of_unet": {"learned_variance": True}, "beta_schedule": "cosine"}
WEIGHTED = {"of_unet": {"out_dim": 8}, "beta_schedule": "cosine"}
NAMES = {"LearnedGaussianDiffusion": LEARNED, "WeightedObjectiveGaussianDiffusion": WEIGHTED}


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """One thread, and networks as they are."""
    monkeypatch.setattr(_lucidrains_sampling.inference, "DTYPES", ())
    with plain_models():
        yield


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("times", [[0, 0, 0, 0], [0, 1, 50, 99]])
def test_losses_and_gradients_are_the_packages(lucidrains, name, times) -> None:
    objective = {"objective": "pred_noise"}
    theirs, ours = pair(lucidrains, name, **NAMES[name], **objective)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    t = torch.tensor(times)
    pixels = (images() * 255).round() / 255
    pixels[:, :, :2] = 0.0  # the open bins at either end
    pixels[:, :, -2:] = 1.0
    for reduction in ("none", "mean"):
        expected, got = (seeded(lambda d=d, r=reduction: d(pixels, times=t, loss_reduction=r)) for d in (theirs, ours))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    for a, b in zip(gradients(ours, got), gradients(theirs, expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * float(b.abs().max()) + 1e-9)


@pytest.mark.parametrize("clip", [False, True])
@torch.no_grad()
def test_means_and_variances_are_the_packages(lucidrains, clip) -> None:
    x, t = normals(), torch.tensor([0, 1, 50, 99])
    for name, options in NAMES.items():
        theirs, ours = pair(lucidrains, name, **options)
        expected, got = (d.p_mean_variance(x=x, t=t, clip_denoised=clip) for d in (theirs, ours))
        assert len(got) == 4  # theirs: 3 of the weighted one, which its own p_sample cannot use
        for a, b in zip(got, expected, strict=False):
            torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-5)
        known = ours.p_mean_variance(x=x, t=t, clip_denoised=clip, model_output=ours.model(x, t))
        assert all(torch.equal(a, b) for a, b in zip(known, got, strict=True))


class TestLearned:
    def test_draws_the_packages_images(self, lucidrains) -> None:
        theirs, ours = pair(lucidrains, "LearnedGaussianDiffusion", timesteps=15, objective="pred_noise", **LEARNED)
        expected = seeded(lambda: theirs.sample(2, return_all_timesteps=True))
        got = seeded(lambda: ours.sample(2, True, generator=DEFAULT))
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        by_step = [seeded(lambda d=d: d.p_sample(normals(), 7)) for d in (theirs, ours)]
        for a, b in zip(*by_step, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)

    def test_ddim_runs_where_the_packages_does_not(self, lucidrains) -> None:
        options = {"timesteps": 15, "sampling_timesteps": 5, **LEARNED}
        theirs, ours = pair(lucidrains, "LearnedGaussianDiffusion", objective="pred_noise", **options)
        with pytest.raises(NameError, match="partial"):
            theirs.sample(1)
        got = seeded(lambda: ours.sample(2, generator=DEFAULT))

        class FirstHalf(torch.nn.Module):
            channels, out_dim, self_condition = 3, 3, False

            def forward(self, x, t, x_self_cond=None):
                return ours.model(x, t)[:, :3]

        options.pop("of_unet")
        plain = lucidrains.GaussianDiffusion(FirstHalf(), image_size=8, objective="pred_noise", **options)
        torch.testing.assert_close(got, seeded(lambda: plain.sample(2)), rtol=0, atol=2e-5)
        found = ours.model_predictions(normals(), torch.tensor([0, 1, 5, 14]), None, True, True)
        assert found._fields == ("pred_noise", "pred_x_start", "pred_variance")
        assert found.pred_x_start.abs().max() <= 1
        x_t = ours.q_sample(found.pred_x_start, torch.tensor([0, 1, 5, 14]), found.pred_noise)
        torch.testing.assert_close(x_t, normals(), rtol=1e-4, atol=1e-4)

    def test_offset_noise_min_snr_and_loss_type_count(self, lucidrains) -> None:
        """The package's own class takes the first two and leaves them out."""
        net = make_unet(lucidrains, learned_variance=True)
        t = torch.tensor([0, 20, 50, 80])

        def loss(**options):
            diffusion = LearnedGaussianDiffusion(net, 0.0, image_size=8, timesteps=100, **options)
            return seeded(lambda: diffusion(images(), times=t, loss_reduction="none"))

        usual = loss()
        assert (loss(offset_noise_strength=0.2) != usual).all()
        weights = LearnedGaussianDiffusion(net, image_size=8, timesteps=100, min_snr_loss_weight=True).loss_weight
        assert weights[0] < 1
        torch.testing.assert_close(loss(min_snr_loss_weight=True), usual * weights[t])
        assert (loss(loss_type="l1") != usual).all()

    def test_the_objective_is_eps_and_no_other(self, lucidrains) -> None:
        net = make_unet(lucidrains, learned_variance=True)
        assert LearnedGaussianDiffusion(net, image_size=8).objective == "pred_noise"
        with pytest.raises(ValueError, match="objective must be \"pred_noise\" with a learned variance, got 'pred_v'"):
            LearnedGaussianDiffusion(net, image_size=8, objective="pred_v")
        with pytest.raises(
            ValueError, match=r"out_dim must be twice model.channels, 6, got 3; .*learned_variance=True"
        ):
            LearnedGaussianDiffusion(make_unet(lucidrains), image_size=8)
        with pytest.raises(ValueError, match="LearnedGaussianDiffusion is for networks with a learned variance"):
            GaussianDiffusion(net, image_size=8)
        both = make_unet(lucidrains, learned_variance=True, self_condition=True)
        with pytest.raises(ValueError, match="does not serve a self-conditioned model"):
            LearnedGaussianDiffusion(both, image_size=8)

    def test_the_bound_is_its_formula_in_float64(self) -> None:
        generator = torch.Generator().manual_seed(0)
        m1, v1, m2, v2 = (torch.randn(4, 50, generator=generator, dtype=torch.float64) for _ in range(4))
        expected = torch.distributions.kl_divergence(
            torch.distributions.Normal(m1, (v1 / 2).exp()), torch.distributions.Normal(m2, (v2 / 2).exp())
        )
        torch.testing.assert_close(normal_kl(m1, v1, m2, v2), expected)
        # All 256 levels are all there is, and with a narrow normal one of them is.
        levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
        for scale in (0.5, 0.01):
            mean = torch.full_like(levels, 0.1)
            logs = discretized_log_likelihood(levels, mean, torch.full_like(levels, math.log(scale)))
            assert abs(float(logs.exp().sum()) - 1) < 1e-9
            by_erf = torch.distributions.Normal(0.1, scale)
            inner = slice(1, -1)
            mass = by_erf.cdf(levels + 1 / 255) - by_erf.cdf(levels - 1 / 255)
            assert (logs.exp() - mass)[inner].abs().max() < 5e-4  # the tanh approximation


class TestWeighted:
    def test_sample_works_where_the_packages_does_not(self, lucidrains) -> None:
        theirs, ours = pair(lucidrains, "WeightedObjectiveGaussianDiffusion", timesteps=12, **WEIGHTED)
        with pytest.raises(TypeError, match="x_self_cond"):
            theirs.sample(1)
        got = seeded(lambda: ours.sample(2, return_all_timesteps=True, generator=DEFAULT))

        def by_hand():
            """With the package's own mean and variance."""
            x = torch.randn(2, 3, 8, 8)
            states = [x]
            for t in range(11, -1, -1):
                mean, _, log_variance = theirs.p_mean_variance(x=x, t=torch.full((2,), t), clip_denoised=True)
                # Not randn_like: the mean does not lie contiguous, and the order in memory is that of drawing.
                x = mean + (0.5 * log_variance).exp() * (torch.randn(x.shape) if t else 0.0)
                states.append(x)
            return theirs.unnormalize(torch.stack(states, dim=1))

        with torch.no_grad():
            torch.testing.assert_close(got, seeded(by_hand), rtol=0, atol=2e-5)
            for t in (0, 9):
                image, x0 = seeded(lambda t=t: ours.p_sample(normals(), t))
                mean, _, log_variance = theirs.p_mean_variance(x=normals(), t=torch.full((4,), t), clip_denoised=True)
                noise = seeded(lambda: torch.randn(4, 3, 8, 8)) if t else 0.0
                torch.testing.assert_close(image, mean + (0.5 * log_variance).exp() * noise, rtol=0, atol=1e-5)
                assert x0.abs().max() <= 1

    def test_ddim_and_interpolate_too(self, lucidrains) -> None:
        net = make_unet(lucidrains, out_dim=8)
        diffusion = WeightedObjectiveGaussianDiffusion(net, image_size=8, timesteps=12, sampling_timesteps=4)
        assert diffusion.sampler() is diffusion.sampler()
        assert len(diffusion.sampler()) == 4
        one = diffusion.sample(2, seed=0)
        times = torch.tensor([0, 5])
        found = diffusion.model_predictions(normals(2), times, clip_x_start=True)
        x_t = diffusion.q_sample(found.pred_x_start, times, found.pred_noise)
        torch.testing.assert_close(x_t, normals(2), rtol=1e-4, atol=1e-4)
        assert one.isfinite().all()
        assert diffusion.interpolate(images(2), images(2, 1), 5, seed=0).shape == (2, 3, 8, 8)
        assert len(diffusion.state_dict()) == 13 + len(net.state_dict())

    def test_says_what_does_not_fit(self, lucidrains) -> None:
        diffusion = WeightedObjectiveGaussianDiffusion(make_unet(lucidrains, out_dim=8), image_size=8)
        with pytest.raises(ValueError, match="loss_reduction must be one of mean, none, got 'sum'"):
            diffusion(images(2), loss_reduction="sum")
        with pytest.raises(ValueError, match=r"out_dim must be twice model.channels and 2, 8, .* got 3; .*out_dim=8"):
            WeightedObjectiveGaussianDiffusion(make_unet(lucidrains), image_size=8)
        with pytest.raises(ValueError, match="min_snr_loss_weight is for one objective"):
            WeightedObjectiveGaussianDiffusion(make_unet(lucidrains, out_dim=8), image_size=8, min_snr_loss_weight=True)
