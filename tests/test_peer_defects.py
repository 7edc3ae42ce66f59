"""What is wrong in the peers (docs/differences.md lists it) is right here, one test per defect.

Each test first shows the defect in the peer's own package, as far as it is installed, and then that ours has it not. A
peer that has put it right fails its half of the test: then the page has to say so.
"""

from __future__ import annotations

import importlib
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lucidrains_pairs import SIDE, class_of, images, make_unet, normals, pair, seeded
from sampler_models import SHAPE, Net
from trainer_models import pictures, small_diffusion

from ddpm_fast import Sampler, Schedule
from ddpm_fast.interop.lucidrains import LearnedGaussianDiffusion, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
DEFAULT = torch.default_generator
LINEAR = Schedule.linear(1000)
# Squares by the package's rule, that root ** 2 == n in floats, and by nothing else.
NO_SQUARES = [n for n in range(1, 2000) if math.sqrt(n) ** 2 == n and math.isqrt(n) ** 2 != n]


@pytest.fixture
def schedulers():
    """(kind, steps, **config) -> diffusers' scheduler and ours, with the steps set."""
    pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")
    return importlib.import_module("scheduler_pairs").pair


class TestLucidrains:
    def test_1_immiscible_noise_is_the_target_too(self, lucidrains) -> None:
        """A network that answers with the very noise in x_t has no loss."""
        x0, t, noise = images(16) * 2 - 1, torch.full((16,), 60), normals(16)
        theirs, ours = pair(lucidrains, immiscible=True, objective="pred_noise", beta_schedule="linear")
        kept = int((ours.noise_assignment(x0, noise) == torch.arange(16)).sum())  # images that keep their own noise
        assert kept < 4
        for diffusion, right in ((theirs, kept), (ours, 16)):
            diffusion.model.forward = lambda x, t, *_, d=diffusion: d.predict_noise_from_start(x, t, x0)
            each = diffusion.p_losses(x0, t, noise.clone(), loss_reduction="none")
            assert int((each < 1e-8).sum()) == right

    @pytest.mark.parametrize("n", [2, 3])
    def test_2_guidance_of_one_is_the_labelled_network(self, lucidrains, n) -> None:
        package = importlib.import_module("denoising_diffusion_pytorch.classifier_free_guidance")
        net = package.Unet(8, num_classes=4, cond_drop_prob=0.0, dim_mults=(1,), attn_heads=1, attn_dim_head=8).eval()
        theirs = package.GaussianDiffusion(net, image_size=SIDE, timesteps=4)
        x, t, labels = normals(n), torch.full((n,), 2), torch.arange(n)
        if n == 2:  # the batch is taken apart instead: what image 0 is told goes for both
            with torch.no_grad():
                expected = net(x, t, labels, cond_drop_prob=0.0)
                got = theirs.model_predictions(x, t, labels, cond_scale=1.0).pred_noise
            assert torch.equal(got, expected[0])
        else:
            with pytest.raises(ValueError, match="too many values to unpack"):
                theirs.model_predictions(x, t, labels, cond_scale=1.0)

        mine = Net(num_classes=4).eval()
        sampler, x = Sampler(mine, LINEAR, steps=5), normals(n)
        got = sampler.sample(n, SHAPE, x=x, seed=0, labels=labels, guidance=1.0)
        labelled = Sampler(lambda x, t: mine(x, t, labels), LINEAR, steps=5, device="cpu")
        torch.testing.assert_close(got, labelled.sample(n, SHAPE, x=x, seed=0), rtol=0, atol=1e-5)
        nearly = sampler.sample(n, SHAPE, x=x, seed=0, labels=labels, guidance=1.0 + 1e-6)
        torch.testing.assert_close(got, nearly, rtol=1e-3, atol=1e-3)

    def test_3_ddim_with_a_learned_variance(self, lucidrains) -> None:
        options = {"of_unet": {"learned_variance": True}, "timesteps": 12, "sampling_timesteps": 4}
        theirs, ours = pair(lucidrains, "LearnedGaussianDiffusion", objective="pred_noise", **options)
        with pytest.raises(NameError, match="partial"):
            theirs.sample(1)
        got = seeded(lambda: ours.sample(2, generator=DEFAULT))

        class Eps(torch.nn.Module):  # DDIM has no use for the variance: it is that of the network without
            channels, out_dim, self_condition = 3, 3, False

            def forward(self, x, t, x_self_cond=None):
                return ours.model(x, t)[:, :3]

        options.pop("of_unet")
        plain = lucidrains.GaussianDiffusion(Eps(), image_size=SIDE, objective="pred_noise", **options)
        torch.testing.assert_close(got, seeded(lambda: plain.sample(2)), rtol=0, atol=2e-5)

    def test_3_the_objective_of_a_learned_variance_is_the_noise(self, lucidrains) -> None:
        net = make_unet(lucidrains, learned_variance=True)
        theirs = class_of(lucidrains, "LearnedGaussianDiffusion")
        assert theirs(net, image_size=SIDE).objective == "pred_v"
        assert LearnedGaussianDiffusion(net, image_size=SIDE).objective == "pred_noise"

    def test_4_the_weighted_objective_samples(self, lucidrains) -> None:
        options = {"of_unet": {"out_dim": 8}, "timesteps": 8}
        theirs, ours = pair(lucidrains, "WeightedObjectiveGaussianDiffusion", **options)
        with pytest.raises(TypeError, match="x_self_cond"):
            theirs.sample(1)
        got = ours.sample(2, seed=0)
        assert got.shape == (2, 3, SIDE, SIDE)
        assert got.isfinite().all()

    @pytest.mark.parametrize("steps", [None, 4])
    def test_5_self_conditioning_on_signals(self, lucidrains, steps) -> None:
        """(N, C, L) beside the package's own 1-D classes, which could not do it in 2.3.1 and can in 2.3.4."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = lucidrains.Unet1D(8, dim_mults=(1, 2), channels=2, self_condition=True, attn_dim_head=8, attn_heads=1)
        net.eval()
        theirs = lucidrains.GaussianDiffusion1D(net, seq_length=16, timesteps=10, sampling_timesteps=steps)
        # The 1-D file's DDIM, unlike that for images, leaves eps as it was when it clips x0.
        choices = {"like": "lucidrains", "steps": steps, "prediction": "eps", "rederive_eps": False}
        mine = Sampler(net, Schedule.cosine(10), shape=(2, 16), **choices)
        assert mine.self_condition
        expected = seeded(lambda: theirs.sample(3))
        got = seeded(lambda: mine.sample(3, generator=DEFAULT))
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)
        untold = Sampler(net, Schedule.cosine(10), self_condition=False, **choices)
        other = seeded(lambda: untold.sample(3, (2, 16), generator=DEFAULT))
        assert (got - other).abs().max() > 1e-3  # the condition does something

    def test_10_interpolation_starts_where_the_noise_is(self, lucidrains) -> None:
        """A network that knows x0 gives it back; the package's hands its caller the range of the network."""
        clean = images(2)

        class Perfect(torch.nn.Module):
            channels, out_dim, self_condition = 3, 3, False

            def __init__(self) -> None:
                super().__init__()
                self.told = []

            def forward(self, x, t, *_):
                self.told.append(int(t[0]))
                return clean * 2 - 1

        told, results = [], []
        for package in (lucidrains, importlib.import_module("ddpm_fast.interop.lucidrains")):
            net = Perfect()
            diffusion = package.GaussianDiffusion(net, image_size=SIDE, timesteps=20, objective="pred_x0")
            results.append(diffusion.interpolate(clean, images(2, seed=1), 5, 0.0))
            told.append(net.told)
        assert told == [[4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]]
        torch.testing.assert_close(results[0], clean * 2 - 1, rtol=0, atol=1e-5)
        torch.testing.assert_close(results[1], clean, rtol=0, atol=1e-5)

    def test_10_squares_are_squares(self, lucidrains, tmp_path) -> None:
        wrong = [n for n in NO_SQUARES if lucidrains.denoising_diffusion_pytorch.has_int_squareroot(n)]
        assert wrong == NO_SQUARES
        assert 11 in wrong
        diffusion, folder = small_diffusion(lucidrains), pictures(tmp_path, 100)
        with pytest.raises(ValueError, match="num_samples must be a square, got 11"):
            Trainer(diffusion, folder, num_samples=11, results_folder=tmp_path / "results")

    def test_10_a_file_named_png_is_one(self, lucidrains, tmp_path) -> None:
        """The package's Trainer1D writes a tensor there."""
        package = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch_1d")
        source = Path(package.__file__).read_text(encoding="utf-8")
        assert any("torch.save(" in line and ".png" in line for line in source.splitlines())
        options = {"train_num_steps": 1, "save_and_sample_every": 1, "num_samples": 1, "results_folder": tmp_path / "r"}
        Trainer(small_diffusion(lucidrains), pictures(tmp_path, 100), **options).train()
        assert (tmp_path / "r" / "sample-1.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


class TestDiffusers:
    def test_6_fixed_large_log_is_a_number(self, schedulers) -> None:
        theirs, ours = schedulers("ddpm", 20, variance_type="fixed_large_log")
        large = schedulers("ddpm", 20, variance_type="fixed_large")[1]
        x, m = normals(2), normals(2, seed=2)
        assert theirs.step(m, 500, x).prev_sample.isnan().any()
        want, got = (s.step(m, 500, x, generator=torch.manual_seed(0)).prev_sample for s in (large, ours))
        assert torch.equal(got, want)

    @pytest.mark.parametrize(("dtype", "lost", "worst"), [("bfloat16", 10, 93), ("float16", 2, 25)])
    def test_7_noise_is_added_in_low_precision(self, schedulers, dtype, lost, worst) -> None:
        dtype = getattr(torch, dtype)
        t, sigma = torch.arange(1000), torch.from_numpy(LINEAR.sqrt_one_minus_alphas_cumprod.copy())
        zeros, ones = torch.zeros(1000, 1, dtype=dtype), torch.ones(1000, 1, dtype=dtype)
        theirs, ours = (s.add_noise(zeros, ones, t)[:, 0].double() for s in schedulers("ddpm"))
        assert (theirs[:lost] == 0).all()
        assert theirs[lost] > 0
        assert int(t[(theirs / sigma - 1).abs() > 0.01].max()) == worst
        assert ((ours / sigma - 1).abs() <= torch.finfo(dtype).eps / 2 * 1.001).all()  # one rounding of the result

    def test_8_ddim_arrives_at_the_next_timestep_of_the_list(self, schedulers) -> None:
        """With eta = 0 it keeps x0 and eps, so that where it should arrive is known."""
        theirs, ours = schedulers("ddim", 50, timestep_spacing="linspace", clip_sample=False)
        assert torch.equal(theirs.timesteps, ours.timesteps)
        ab, x0, eps = LINEAR.alphas_cumprod, normals(2), normals(2, seed=2)
        off = {}
        for t, end in itertools.pairwise(ours.timesteps.tolist()):
            x, want = (ab[at] ** 0.5 * x0 + (1 - ab[at]) ** 0.5 * eps for at in (t, end))
            for scheduler in (theirs, ours):
                apart = float((scheduler.step(eps, t, x).prev_sample - want).abs().max())
                off[scheduler] = max(apart, off.get(scheduler, 0.0))
        assert off[ours] < 2e-5
        assert off[theirs] > 1e-3

    def test_9_tables_keep_their_digits(self, schedulers) -> None:
        theirs, ours = schedulers("ddpm")
        exact = exact_tables()
        A = theirs.alphas_cumprod
        P = torch.cat([torch.ones(1), A[:-1]])
        far = {"beta": relative(1 - A / P, exact["beta"]), "noise": relative(1 - A, exact["noise"])}
        assert far["beta"] > 4e-4
        assert far["noise"] > 1.5e-4
        schedule = ours._schedule()
        beta = 1 - schedule.alphas_cumprod / schedule.alphas_cumprod_prev
        assert relative(schedule.betas, exact["beta"]) < 1e-15
        assert relative(beta, exact["beta"]) < 1e-11
        assert relative(schedule.one_minus_alphas_cumprod, exact["noise"]) < 1e-14
        assert relative(schedule.noising_table()[:, 1], np.sqrt(exact["noise"])) < 2.0**-23


def exact_tables():
    """beta and 1 - alphas_cumprod of the linear schedule, from 50 digits."""
    from decimal import Decimal, getcontext

    getcontext().prec = 50
    first, last, product, noise, betas = Decimal("1e-4"), Decimal("0.02"), Decimal(1), [], []
    for t in range(1000):
        beta = first + (last - first) * t / 999
        product *= 1 - beta
        betas.append(float(beta))
        noise.append(float(1 - product))
    return {"beta": np.array(betas), "noise": np.array(noise)}


def relative(values, exact) -> float:
    """The largest relative error."""
    return float(np.abs(np.asarray(values, np.float64) / exact - 1).max())
