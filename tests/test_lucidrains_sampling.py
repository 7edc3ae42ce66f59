"""Images of lucidrains' GaussianDiffusion beside ours, and what ours adds: seeds, samplers, a right `interpolate`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lucidrains_pairs import images, make_unet, pair, plain_models, seeded
from torch import nn

from ddpm_fast.interop import _lucidrains_sampling
from ddpm_fast.interop.lucidrains import GaussianDiffusion, Unet
from ddpm_fast.sampler import Sampler

DEFAULT = torch.default_generator
# Twenty steps of a network whose float32 sums may be in another order.
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(autouse=True)
def one_thread():
    with plain_models():
        yield


@pytest.fixture
def as_it_is(monkeypatch) -> None:
    """Networks without a fused plan, whose trials would take longer than the test."""
    monkeypatch.setattr(_lucidrains_sampling.inference, "DTYPES", ())


@pytest.mark.usefixtures("as_it_is")
class TestBesideThePackage:
    @pytest.mark.parametrize("objective", ["pred_noise", "pred_x0", "pred_v"])
    @pytest.mark.parametrize("self_condition", [False, True])
    def test_every_state_of_ddpm(self, lucidrains, objective, self_condition) -> None:
        options = {"objective": objective, "of_unet": {"self_condition": self_condition}, "beta_schedule": "cosine"}
        theirs, ours = pair(lucidrains, timesteps=20, **options)
        expected = seeded(lambda: theirs.sample(3, return_all_timesteps=True))
        got = seeded(lambda: ours.sample(3, return_all_timesteps=True, generator=DEFAULT))
        assert got.shape == (3, 21, 3, 8, 8)
        torch.testing.assert_close(got, expected, **CLOSE)
        assert got[:, :-1].abs().max() > 1  # as theirs, not clamped
        torch.testing.assert_close(seeded(lambda: ours.sample(3, generator=DEFAULT)), expected[:, -1], **CLOSE)

    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    @pytest.mark.parametrize("steps", [1, 7, 19])
    def test_every_state_of_ddim(self, lucidrains, steps, eta) -> None:
        options = {"sampling_timesteps": steps, "ddim_sampling_eta": eta, "of_unet": {"self_condition": steps == 7}}
        theirs, ours = pair(lucidrains, timesteps=20, beta_schedule="cosine", **options)
        assert ours.is_ddim_sampling
        expected = seeded(lambda: theirs.sample(2, return_all_timesteps=True))
        got = seeded(lambda: ours.sample(2, return_all_timesteps=True, generator=DEFAULT))
        assert got.shape == (2, steps + 1, 3, 8, 8)
        torch.testing.assert_close(got, expected, **CLOSE)

    @pytest.mark.parametrize("steps", [None, 5])
    def test_one_call_after_another(self, lucidrains, steps) -> None:
        theirs, ours = pair(lucidrains, timesteps=20, sampling_timesteps=steps, beta_schedule="cosine")
        expected = seeded(lambda: [theirs.sample(2), theirs.sample(1), torch.randn(3)])
        got = seeded(lambda: [ours.sample(2, generator=DEFAULT), ours.sample(1, generator=DEFAULT), torch.randn(3)])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    def test_either_loop_of_any_shape(self, lucidrains) -> None:
        theirs, ours = pair(lucidrains, timesteps=20, beta_schedule="cosine", auto_normalize=False)
        for name in ("p_sample_loop", "ddim_sample"):  # DDIM over all T too
            expected = seeded(lambda n=name: getattr(theirs, n)((2, 3, 4, 8)))
            got = seeded(lambda n=name: getattr(ours, n)((2, 3, 4, 8), generator=DEFAULT))
            torch.testing.assert_close(got, expected, **CLOSE)

    def test_timesteps_of_ddim_are_theirs_to_the_last(self) -> None:
        for T in (10, 100, 1000):
            for steps in sorted({*range(1, min(T, 60)), 250 % T + 1, T // 2, T - 1}):
                grid = torch.linspace(-1, T - 1, steps=steps + 1).int().tolist()
                assert _lucidrains_sampling.ddim_times(T, steps) == grid[:0:-1]


class TestSeeds:
    @pytest.fixture
    def diffusion(self, as_it_is):
        torch.manual_seed(0)
        return GaussianDiffusion(Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8), image_size=4, timesteps=10)

    def test_an_image_is_a_function_of_its_seed(self, diffusion) -> None:
        whole = diffusion.sample(4, seed=7)
        assert whole.shape == (4, 3, 4, 4)
        torch.testing.assert_close(diffusion.sample(2, seed=7, first_sample=2), whole[2:], rtol=0, atol=1e-5)
        states = diffusion.sample(4, True, seed=7)
        torch.testing.assert_close(states[:, -1], whole, rtol=0, atol=1e-6)
        assert torch.equal(states[:, 0], (seven := diffusion.sample(4, True, seed=7))[:, 0])
        assert seven.requires_grad is False

    def test_torchs_seed_governs_the_default(self, diffusion) -> None:
        a, b, c = (seeded(diffusion.sample, seed) for seed in (1, 1, 2))
        assert a.shape[0] == 16
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        for seed in (1, 2):
            states = seeded(lambda: diffusion.sample(2, True), seed)
            assert torch.equal(states, seeded(lambda: diffusion.sample(2, True), seed))

    def test_generators_exclude_seeds(self, diffusion) -> None:
        with pytest.raises(ValueError, match="generator draws all noise: it excludes seed and first_sample"):
            diffusion.sample(2, seed=1, generator=DEFAULT)
        each = [torch.Generator().manual_seed(i) for i in range(3)]
        one = diffusion.sample(1, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(diffusion.sample(3, generator=each)[1:2], one, rtol=0, atol=1e-5)

    def test_training_mode_is_given_back(self, diffusion) -> None:
        diffusion.train()
        diffusion.sample(1, seed=0)
        assert all(part.training for part in diffusion.modules())


class TestSampler:
    @pytest.fixture
    def diffusion(self, as_it_is):
        torch.manual_seed(0)
        return GaussianDiffusion(
            Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8), image_size=(4, 8), timesteps=20, objective="pred_x0"
        )

    def test_is_the_one_that_sample_uses(self, diffusion) -> None:
        sampler = diffusion.sampler()
        assert isinstance(sampler, Sampler)
        assert diffusion.sampler() is sampler
        assert (sampler.like, sampler.choices.method, sampler.choices.prediction) == ("lucidrains", "ddpm", "x0")
        expected = diffusion.sample(3, seed=2)
        assert torch.equal(sampler.sample(3, seed=2), expected)  # its shape is known, its output unit_unclamped
        assert sampler.last_seed == 2

    def test_follows_what_is_changed(self, diffusion) -> None:
        sampler = diffusion.sampler()
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling = 5, True
        fewer = diffusion.sampler()
        assert (len(sampler), len(fewer), fewer.choices.method) == (20, 5, "ddim")
        diffusion.ddim_sampling_eta = 0.5
        assert diffusion.sampler().choices.eta == 0.5
        before = diffusion.sample(1, seed=0)
        with torch.no_grad():
            diffusion.betas.mul_(0.9)
        assert diffusion.sampler().schedule is not sampler.schedule
        assert not torch.equal(diffusion.sample(1, seed=0), before)
        diffusion.model = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8)
        assert diffusion.sampler().model is diffusion.model

    def test_takes_any_argument_of_sampler(self, diffusion) -> None:
        full = diffusion.sample(2, seed=0)
        half = diffusion.sampler(dtype=torch.bfloat16)
        assert half is not diffusion.sampler()
        diffusion.model.to(torch.bfloat16)
        assert (half.sample(2, seed=0) - full).abs().max() < 0.2
        diffusion.model.to(torch.float32)
        assert diffusion.sampler(steps=5).choices.method == "ddim"
        solver = diffusion.sampler(steps=6, method="dpmsolver++", clip=False)
        assert (len(solver), solver.choices.method) == (6, "dpmsolver++")
        diffusion.sampling_timesteps, diffusion.is_ddim_sampling, diffusion.ddim_sampling_eta = 5, True, 0.5
        assert diffusion.sampler(method="dpmsolver++").choices.eta == 0.0
        assert len(diffusion.sampler(eta=1.0)) == 5
        assert len(diffusion._samplers) <= _lucidrains_sampling.KEPT_SAMPLERS

    def test_of_the_models_range(self) -> None:
        net = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8)
        one, other = (
            GaussianDiffusion(net, image_size=4, timesteps=5, auto_normalize=auto).sample(2, seed=0)
            for auto in (True, False)
        )
        torch.testing.assert_close(one, (other + 1) / 2, rtol=0, atol=1e-5)


class TestFused:
    def test_a_plan_runs_the_packages_network_and_ours(self, lucidrains) -> None:
        theirs, ours = pair(lucidrains, timesteps=12, of_unet={"self_condition": True})
        assert ours.sampler().fused
        expected = seeded(lambda: theirs.sample(2))
        torch.testing.assert_close(seeded(lambda: ours.sample(2, generator=DEFAULT)), expected, rtol=0, atol=1e-4)
        plain, chunked = ours.sampler(fused=False), ours.sampler(chunk=2)
        assert not plain.fused
        assert chunked.fused
        torch.testing.assert_close(plain.sample(2, seed=0), ours.sample(2, seed=0), rtol=0, atol=1e-4)
        torch.testing.assert_close(plain.sample(3, seed=0), chunked.sample(3, seed=0), rtol=0, atol=1e-4)

    def test_doubles_are_not_fused(self) -> None:
        net = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8).double()
        diffusion = GaussianDiffusion(net, image_size=4, timesteps=5)
        assert not diffusion.sampler().fused
        assert diffusion.sample(1, seed=0).dtype == torch.float32


@pytest.mark.usefixtures("as_it_is")
class TestInterpolate:
    @pytest.mark.parametrize("self_condition", [False, True])
    @pytest.mark.parametrize("t", [None, 0, 7])
    def test_noises_to_t_and_denoises_from_t(self, lucidrains, t, self_condition) -> None:
        theirs, ours = pair(
            lucidrains, timesteps=12, beta_schedule="cosine", of_unet={"self_condition": self_condition}
        )
        x1, x2 = images(2), images(2, seed=5)
        got = seeded(lambda: ours.interpolate(x1, x2, t, 0.3, generator=DEFAULT))

        def by_hand():
            """With the package's own parts, in the package's order."""
            top = 11 if t is None else t
            noised = [theirs.q_sample(theirs.normalize(x), torch.full((2,), top)) for x in (x1, x2)]
            x, told = 0.7 * noised[0] + 0.3 * noised[1], None
            for step in range(top, -1, -1):
                x, x0 = theirs.p_sample(x, step, told)
                told = x0 if self_condition else None
            return theirs.unnormalize(x)

        torch.testing.assert_close(got, seeded(by_hand), **CLOSE)

    def test_gives_the_images_back_where_there_is_no_noise_to_speak_of(self) -> None:
        class Perfect(nn.Module):
            channels, out_dim, self_condition = 3, 3, False

            def forward(self, x, t):
                return images(2) * 2 - 1

        diffusion = GaussianDiffusion(Perfect(), image_size=8, timesteps=20, objective="pred_x0")
        for t in (0, 5, 19):
            got = diffusion.interpolate(images(2), images(2, seed=1), t, 0.0, seed=0)
            torch.testing.assert_close(got, images(2), rtol=0, atol=1e-5)

    def test_is_a_function_of_its_seed(self, lucidrains) -> None:
        _, ours = pair(lucidrains, timesteps=6)
        a, b, c = (ours.interpolate(images(2), images(2, seed=1), 3, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(a, b)
        assert not torch.equal(a, c)
        d, e = (seeded(lambda: ours.interpolate(images(2), images(2, seed=1), 3)) for _ in range(2))
        assert torch.equal(d, e)

    def test_says_what_is_wrong(self, lucidrains) -> None:
        _, ours = pair(lucidrains, timesteps=6)
        with pytest.raises(ValueError, match=r"x1 and x2 must have one shape, got \(2, 3, 8, 8\) and \(1, 3, 8, 8\)"):
            ours.interpolate(images(2), images(1))
        with pytest.raises(ValueError, match=r"t must be in 0\.\.5, got 6"):
            ours.interpolate(images(2), images(2), 6)


class TestSubclasses:
    """Somebody else's step is what their samples are made of."""

    @pytest.mark.parametrize("steps", [None, 4])
    def test_with_parts_of_their_own(self, lucidrains, steps) -> None:
        def halved(base):
            class Halved(base):
                def model_predictions(self, *args, **kwargs):
                    found = super().model_predictions(*args, **kwargs)
                    return found._replace(pred_x_start=0.5 * found.pred_x_start)

            return Halved

        net = make_unet(lucidrains, self_condition=True)
        made = [
            halved(base)(net, image_size=8, timesteps=10, sampling_timesteps=steps, beta_schedule="cosine")
            for base in (lucidrains.GaussianDiffusion, GaussianDiffusion)
        ]
        expected, got = (seeded(lambda d=d: d.sample(2, return_all_timesteps=True)) for d in made)
        torch.testing.assert_close(got, expected, **CLOSE)
        assert seeded(lambda: made[1].interpolate(images(2), images(2), 3)).isfinite().all()
        with pytest.raises(ValueError, match="Halved has steps of its own, whose noise is torch's: leave out seed"):
            made[1].sample(2, seed=0)

    def test_with_a_loop_of_their_own(self) -> None:
        class Grey(GaussianDiffusion):
            def p_sample_loop(self, shape, return_all_timesteps=False):
                return torch.full(shape, 0.5)

        diffusion = Grey(Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8), image_size=4, timesteps=3)
        assert torch.equal(diffusion.sample(2), torch.full((2, 3, 4, 4), 0.5))
        with pytest.raises(TypeError, match="seed"):
            diffusion.sample(2, seed=0)

    @pytest.mark.parametrize("objective", ["pred_v", "pred_noise", "pred_x0"])
    def test_with_a_forward_process_of_their_own(self, lucidrains, objective) -> None:
        def changed(base):
            class Changed(base):
                def q_sample(self, x_start, t, noise=None):
                    return 0.5 * super().q_sample(x_start, t, noise)

                def predict_v(self, x_start, t, noise):
                    return 0.5 * super().predict_v(x_start, t, noise)

            return Changed

        net = make_unet(lucidrains)
        made = [
            changed(base)(net, image_size=8, timesteps=10, objective=objective)
            for base in (lucidrains.GaussianDiffusion, GaussianDiffusion)
        ]
        expected, got = (seeded(lambda d=d: d(images(4))) for d in made)
        torch.testing.assert_close(got, expected, **CLOSE)

    @pytest.mark.parametrize("steps", [None, 4])
    def test_a_network_of_ones_own_is_given_the_condition_by_position(self, lucidrains, steps) -> None:
        class Network(torch.nn.Module):
            channels = out_dim = 3
            self_condition = True

            def __init__(self):
                super().__init__()
                self.gain = torch.nn.Parameter(torch.tensor(0.3))

            def forward(self, x, t, cond):
                return self.gain * x if cond is None else self.gain * (x - cond)

        options = {"image_size": 8, "timesteps": 10, "sampling_timesteps": steps, "beta_schedule": "cosine"}
        theirs, ours = (kind(Network(), **options) for kind in (lucidrains.GaussianDiffusion, GaussianDiffusion))
        ours.train()
        expected = seeded(lambda: theirs.sample(2))
        got = seeded(lambda: ours.sample(2, generator=torch.default_generator))
        torch.testing.assert_close(got, expected, **CLOSE)
        assert ours.training

    def test_without_any_are_fused(self) -> None:
        class Named(GaussianDiffusion):
            pass

        diffusion = Named(Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8), image_size=4, timesteps=3)
        assert diffusion.sample(1, seed=0).shape == (1, 3, 4, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("steps", [None, 5])
def test_on_a_gpu_too(lucidrains, steps) -> None:
    theirs, ours = pair(lucidrains, timesteps=12, sampling_timesteps=steps, of_unet={"self_condition": True})
    theirs, ours = theirs.cuda(), ours.cuda()
    on_gpu = torch.cuda.default_generators[torch.cuda.current_device()]
    expected = seeded(lambda: theirs.sample(2, return_all_timesteps=True))
    got = seeded(lambda: ours.sample(2, return_all_timesteps=True, generator=on_gpu))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(ours.sample(2, seed=0), ours.cpu().sample(2, seed=0), rtol=0, atol=1e-3)
    x = images(2).cuda()
    losses = [seeded(lambda d=d: d(x)) for d in (theirs.cuda(), ours.cuda())]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


def test_a_thousand_steps_of_a_trained_network(lucidrains) -> None:
    """The image, in bytes, is at most one level apart at any pixel."""
    torch.manual_seed(0)
    net = lucidrains.Unet(16, dim_mults=(1,), attn_dim_head=8, attn_heads=1, channels=1)
    ours = GaussianDiffusion(net, image_size=8)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 8), torch.linspace(-1, 1, 8), indexing="ij")
    centre = torch.rand(64, 2, 1, 1) - 0.5
    blobs = torch.exp(-6 * ((x - centre[:, :1]) ** 2 + (y - centre[:, 1:]) ** 2))
    optimiser = torch.optim.Adam(net.parameters(), lr=4e-3)
    losses = []
    for _ in range(100):
        loss = ours(blobs[torch.randint(64, (16,))])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-10:]) < 0.3 * losses[0]
    theirs = lucidrains.GaussianDiffusion(net, image_size=8)
    net.eval()
    expected = seeded(lambda: theirs.sample(2))
    got = seeded(lambda: ours.sample(2, generator=DEFAULT))
    assert expected.clamp(0, 1).std() > 0.1  # pictures of something

    def pixels(image):
        return (image.clamp(0, 1) * 255).round().int()

    apart = (pixels(got) - pixels(expected)).abs()
    assert apart.max() <= 1
