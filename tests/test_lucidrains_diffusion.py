"""lucidrains' GaussianDiffusion beside ours: buffers, formulas, losses and gradients from the same random numbers."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from lucidrains_pairs import gradients, images, make_unet, normals, pair, plain_models, seeded

from ddpm_fast.interop.lucidrains import GaussianDiffusion, Unet
from ddpm_fast.schedule import Schedule

OBJECTIVES = ("pred_noise", "pred_x0", "pred_v")
SCHEDULES = ("linear", "cosine", "sigmoid")
# float32 formulas in the same order, or sums in another.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


@pytest.fixture(autouse=True)
def one_thread():
    with plain_models():
        yield


class TestConstruction:
    def test_has_the_packages_signature(self, lucidrains) -> None:
        def arguments(method):
            # schedule_fn_kwargs: {} there, None here, which is as good and not shared
            found = inspect.signature(method).parameters.values()
            return {p.name: (p.kind, p.default or None) for p in found if p.name != "self"}

        theirs, ours = lucidrains.GaussianDiffusion, GaussianDiffusion
        mine = arguments(ours.__init__)
        assert mine.pop("loss_type") == (inspect.Parameter.KEYWORD_ONLY, "l2")
        assert mine == arguments(theirs.__init__)
        names = (
            *("forward", "p_losses", "q_sample", "q_posterior", "model_predictions", "p_mean_variance", "p_sample"),
            *("predict_start_from_noise", "predict_noise_from_start", "predict_v", "predict_start_from_v"),
            *("random_times", "noise_assignment", "p_sample_loop", "ddim_sample", "sample", "interpolate"),
        )
        for name in names:
            taken, expected = arguments(getattr(ours, name)), arguments(getattr(theirs, name))
            assert dict(list(taken.items())[: len(expected)]) == expected, name
            added = list(taken)[len(expected) :]
            assert set(added) <= {"seed", "first_sample", "generator"}

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize("min_snr", [False, True])
    def test_buffers_are_the_packages(self, lucidrains, objective, schedule, min_snr) -> None:
        theirs, ours = pair(
            lucidrains, objective=objective, beta_schedule=schedule, min_snr_loss_weight=min_snr, timesteps=1000
        )
        expected = dict(theirs.named_buffers(recurse=False))
        got = dict(ours.named_buffers(recurse=False))
        assert list(got) == list(expected)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for name, value in expected.items():
            assert got[name].dtype == torch.float32
            # The package rounds the ends of its sigmoid to float32, where alphas_cumprod at the last t are made of
            # their difference; ours are float64 throughout.
            rtol = 4e-5 if schedule == "sigmoid" else 2e-7
            torch.testing.assert_close(got[name], value, rtol=rtol, atol=0, msg=lambda m, name=name: f"{name}: {m}")

    @pytest.mark.parametrize(
        ("schedule", "options"),
        [("cosine", {"s": 0.02}), ("sigmoid", {"start": 0, "end": 3, "tau": 0.7}), ("sigmoid", {"clamp_min": 1e-4})],
    )
    def test_schedule_arguments(self, lucidrains, schedule, options) -> None:
        theirs, ours = pair(lucidrains, beta_schedule=schedule, schedule_fn_kwargs=options)
        torch.testing.assert_close(ours.betas, theirs.betas, rtol=1e-5, atol=0)

    def test_state_dicts_go_both_ways_and_the_schedule_follows(self, lucidrains) -> None:
        theirs, _ = pair(lucidrains, beta_schedule="linear", objective="pred_noise")
        ours = GaussianDiffusion(make_unet(lucidrains, seed=1), image_size=8, timesteps=100)
        before = ours.schedule
        assert ours.sampler().schedule is before
        ours.load_state_dict(theirs.state_dict())
        assert ours.schedule is not before
        torch.testing.assert_close(torch.tensor(ours.schedule.betas), theirs.betas.double(), rtol=1e-6, atol=0)
        assert ours.sampler().schedule is ours.schedule
        x, t = normals(), torch.tensor([0, 3, 50, 99])
        torch.testing.assert_close(ours.q_sample(x, t, x), theirs.q_sample(x, t, x), rtol=1e-6, atol=1e-6)
        again, _ = pair(lucidrains)
        again.load_state_dict(ours.state_dict())
        assert torch.equal(again.betas, theirs.betas)

    def test_its_own_betas_keep_their_digits(self, lucidrains) -> None:
        _, ours = pair(lucidrains)
        before = ours.schedule
        ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        assert ours.schedule is before
        ours.to(torch.bfloat16)  # which says nothing about a schedule
        assert ours.schedule is before

    def test_copies_and_pickles_without_its_samplers(self) -> None:
        net = Unet(8, dim_mults=(1,), attn_heads=1, attn_dim_head=8)
        ours = GaussianDiffusion(net, image_size=8, timesteps=100, sampling_timesteps=3)
        expected = ours.sample(2, seed=0)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert not other._samplers
            assert torch.equal(other.sample(2, seed=0), expected)
            other.betas.mul_(0.5)
            assert other.schedule != ours.schedule


class TestFormulas:
    @pytest.mark.parametrize("schedule", SCHEDULES)
    def test_of_x0_eps_and_v(self, lucidrains, schedule) -> None:
        theirs, ours = both = pair(lucidrains, beta_schedule=schedule)
        ours.load_state_dict(theirs.state_dict())
        x, y, t = normals(), normals(seed=2), torch.tensor([0, 1, 50, 99])
        for name in ("predict_start_from_noise", "predict_noise_from_start", "predict_v", "predict_start_from_v"):
            assert torch.equal(getattr(ours, name)(x, t, y), getattr(theirs, name)(x, t, y)), name
        for got, expected in zip(ours.q_posterior(x, y, t), theirs.q_posterior(x, y, t), strict=True):
            assert torch.equal(got, expected)
        torch.testing.assert_close(ours.q_sample(x, t, y), theirs.q_sample(x, t, y), rtol=1e-6, atol=1e-6)
        drawn = [seeded(lambda d=d: d.q_sample(x, t)) for d in both]
        torch.testing.assert_close(*drawn, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("self_condition", [False, True])
    @torch.no_grad()
    def test_of_the_network(self, lucidrains, objective, self_condition) -> None:
        theirs, ours = pair(lucidrains, objective=objective, of_unet={"self_condition": self_condition})
        ours.load_state_dict(theirs.state_dict())
        x, t = normals(), torch.tensor([0, 1, 50, 99])
        told = normals(seed=3).clamp(-1, 1) if self_condition else None
        for clip in (False, True):
            for rederive in (False, True):
                got, expected = (d.model_predictions(x, t, told, clip, rederive) for d in (ours, theirs))
                assert got._fields == ("pred_noise", "pred_x_start")
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a, b, **CLOSE)
            got, expected = (d.p_mean_variance(x, t, told, clip_denoised=clip) for d in (ours, theirs))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, **CLOSE)
        for step in (0, 1, 60):
            got, expected = (seeded(lambda d=d, s=step: d.p_sample(x, s, told)) for d in (ours, theirs))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, **CLOSE)


class TestLoss:
    @pytest.mark.parametrize("objective", OBJECTIVES)
    @pytest.mark.parametrize("schedule", SCHEDULES)
    @pytest.mark.parametrize(("min_snr", "offset"), [(False, 0.0), (True, 0.1)])
    def test_is_the_packages_from_the_same_seed(self, lucidrains, objective, schedule, min_snr, offset) -> None:
        theirs, ours = pair(
            lucidrains,
            objective=objective,
            beta_schedule=schedule,
            min_snr_loss_weight=min_snr,
            offset_noise_strength=offset,
        )
        ours.load_state_dict(theirs.state_dict())
        expected, got = (seeded(lambda d=d: d(images())) for d in (theirs, ours))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        for a, b in zip(gradients(ours, got), gradients(theirs, expected), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-9)

    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_of_a_self_conditioned_network(self, lucidrains, objective) -> None:
        theirs, ours = pair(lucidrains, objective=objective, of_unet={"self_condition": True})
        ours.load_state_dict(theirs.state_dict())
        told = []
        for seed in range(4):  # either side of the coin
            calls = 0

            def count(*_):
                nonlocal calls
                calls += 1

            with ours.model.init_conv.register_forward_hook(count):
                expected, got = (seeded(lambda d=d: d(images()), seed) for d in (theirs, ours))
            told.append(calls)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        assert set(told) == {2, 4}

    def test_with_given_times_noise_and_no_reduction(self, lucidrains) -> None:
        theirs, ours = pair(lucidrains, beta_schedule="linear")
        times, noise = torch.tensor([0, 9, 60, 99]), normals()
        expected = theirs(images(), times=times, noise=noise.clone(), loss_reduction="none")
        got = ours(images(), times=times, noise=noise, loss_reduction="none")
        assert got.shape == (4,)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
        kept = noise.clone()
        offset = [
            seeded(lambda d=d: d.p_losses(images() * 2 - 1, times, noise.clone(), 0.3, "none")) for d in (theirs, ours)
        ]
        torch.testing.assert_close(*offset, rtol=1e-5, atol=0)
        ours(images(), times=times, noise=noise, offset_noise_strength=0.3)
        assert torch.equal(noise, kept)  # theirs adds to the caller's tensor

    @pytest.mark.parametrize("loss_type", ["l1", "l2", "huber"])
    @pytest.mark.parametrize("objective", OBJECTIVES)
    def test_of_each_type_is_its_formula(self, lucidrains, loss_type, objective) -> None:
        ours = GaussianDiffusion(make_unet(lucidrains), image_size=8, objective=objective, loss_type=loss_type)
        x0, t, eps = images() * 2 - 1, torch.tensor([0, 300, 700, 999]), normals()
        x_t = ours.q_sample(x0, t, eps)
        target = {"pred_noise": eps, "pred_x0": x0, "pred_v": ours.predict_v(x0, t, eps)}[objective]
        d = (ours.model(x_t, t) - target).double().abs()
        values = {"l1": d, "l2": d * d, "huber": torch.where(d < 1, 0.5 * d * d, d - 0.5)}[loss_type]
        expected = values.flatten(1).mean(1) * ours.loss_weight[t].double()
        got = ours.p_losses(x0, t, eps, loss_reduction="none")
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-9)
        got = ours.p_losses(x0, t, eps)
        torch.testing.assert_close(got.double(), expected.mean(), rtol=1e-5, atol=1e-9)

    def test_reaches_images_that_are_learned(self, lucidrains) -> None:
        theirs, ours = pair(lucidrains, beta_schedule="linear")
        found = []
        for diffusion in (theirs, ours):
            x = images().requires_grad_()
            seeded(lambda d=diffusion, x=x: d(x)).backward()
            found.append(x.grad)
        assert found[0].abs().max() > 0
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5 * float(found[0].abs().max()))

    def test_of_bytes_is_that_of_the_images(self, lucidrains) -> None:
        ours = GaussianDiffusion(make_unet(lucidrains), image_size=8)
        pixels = (images() * 255).round().to(torch.uint8)
        got, expected = seeded(lambda: ours(pixels)), seeded(lambda: ours(pixels / 255))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)

    def test_in_the_models_range(self, lucidrains) -> None:
        theirs, ours = pair(lucidrains, auto_normalize=False, beta_schedule="linear")
        expected, got = (seeded(lambda d=d: d(images() * 2 - 1)) for d in (theirs, ours))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)

    def test_under_autocast(self, lucidrains) -> None:
        _, ours = pair(lucidrains)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = seeded(lambda: ours(images()))
        half.backward()
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, seeded(lambda: ours(images())), rtol=0.05, atol=0)

    @pytest.mark.no_poison
    def test_compiled(self) -> None:
        diffusion = GaussianDiffusion(Odd(), image_size=8, timesteps=100)
        compiled = torch.compile(diffusion, backend="eager")
        given = {"times": torch.tensor([1, 5, 50, 99]), "noise": normals()}
        assert torch.equal(compiled(images(), **given), diffusion(images(), **given))

    def test_in_double(self) -> None:
        ours = GaussianDiffusion(Odd(), image_size=8, timesteps=100)
        times = torch.tensor([1, 5, 50, 99])
        single = ours(images(), times=times, noise=normals())
        double = ours.double()(images().double(), times=times, noise=normals().double())
        assert double.dtype == torch.float64
        torch.testing.assert_close(double, single.double(), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("min_snr", [False, True])
def test_a_schedule_that_ends_without_signal_has_a_loss(min_snr) -> None:
    """Twenty linear betas end in 1: snr = 0 there, where the package's weight of eps is 0 / 0."""
    options = {"min_snr_loss_weight": min_snr, "beta_schedule": "linear", "objective": "pred_noise"}
    diffusion = GaussianDiffusion(Odd(), image_size=8, timesteps=20, **options)
    assert diffusion.loss_weight[-1] == 1
    assert diffusion(torch.rand(2, 3, 8, 8), times=torch.tensor([0, 19])).isfinite()


class TestImmiscible:
    def test_the_target_is_the_noise_in_x_t(self, lucidrains) -> None:
        theirs, ours = pair(lucidrains, immiscible=True, objective="pred_noise", beta_schedule="linear")
        x0, t, noise = images(16) * 2 - 1, torch.full((16,), 60), normals(16)
        order = ours.noise_assignment(x0, noise)
        assert torch.equal(order, theirs.noise_assignment(x0, noise))
        assert sorted(order.tolist()) == list(range(16))
        assert (order != torch.arange(16)).any()

        def perfect(diffusion):
            """The loss of a network that knows the noise in x_t exactly."""

            def answer(x, t, *_):
                return diffusion.predict_noise_from_start(x, t, x0)

            net, diffusion.model.forward = diffusion.model.forward, answer
            try:
                return float(diffusion.p_losses(x0, t, noise.clone()))
            finally:
                diffusion.model.forward = net

        assert perfect(ours) < 1e-8
        assert perfect(theirs) > 0.5  # it is asked for the noise of some other image

    def test_distances_add_up_to_less(self, lucidrains) -> None:
        _, ours = pair(lucidrains, immiscible=True)
        x0, noise = images(12) * 2 - 1, normals(12)
        order = ours.noise_assignment(x0, noise)
        assert (x0 - noise[order]).flatten(1).norm(dim=1).sum() < (x0 - noise).flatten(1).norm(dim=1).sum()
        drawn = seeded(lambda: ours.q_sample(x0, torch.full((12,), 99)))
        eps = seeded(lambda: torch.randn_like(x0))
        expected = ours.q_sample(x0, torch.full((12,), 99), eps[ours.noise_assignment(x0, eps)])
        assert torch.equal(drawn, expected)

    def test_needs_scipy_and_says_so(self, lucidrains, monkeypatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
        with pytest.raises(ImportError, match="immiscible=True needs scipy"):
            GaussianDiffusion(make_unet(lucidrains), image_size=8, immiscible=True)


class Odd(torch.nn.Module):
    """What any network must have."""

    channels, out_dim, self_condition, downsample_factor = 3, 3, False, 4

    def forward(self, x, t):
        return 0.1 * x


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"objective": "eps"}, "objective must be one of pred_noise, pred_x0, pred_v, got 'eps'"),
            ({"beta_schedule": "quad"}, "beta_schedule must be one of linear, cosine, sigmoid, got 'quad'"),
            ({"beta_schedule": ["linear"]}, r"beta_schedule must be one of .*, got \['linear'\]"),
            ({"loss_type": "mse"}, "loss_type must be one of l2, l1, huber, got 'mse'"),
            ({"schedule_fn_kwargs": {"s": 1}}, "schedule_fn_kwargs: 'sigmoid' takes start, end, tau, clamp_min, got s"),
            ({"beta_schedule": "linear", "schedule_fn_kwargs": {"s": 1}}, "'linear' takes none, got s"),
            ({"image_size": 30}, r"multiples of 4, the model's downsample_factor, got \(30, 30\); .* \(32, 32\)"),
            ({"image_size": (8, 10)}, r"got \(8, 10\)"),
            ({"timesteps": 0}, "timesteps must be at least 1, got 0"),
            ({"sampling_timesteps": 101}, "sampling_timesteps must be at most timesteps = 100, got 101"),
            ({"sampling_timesteps": 0}, "sampling_timesteps must be at least 1, got 0"),
            ({"ddim_sampling_eta": -1.0}, "ddim_sampling_eta must be a finite number of at least 0, got -1"),
            ({"offset_noise_strength": float("nan")}, "offset_noise_strength must be a finite number"),
            ({"min_snr_loss_weight": True, "min_snr_gamma": 0}, "min_snr_gamma must be above 0"),
            ({"timesteps": 10, "beta_schedule": "linear"}, r"betas must lie in \(0, 1\]"),
        ],
    )
    def test_at_construction(self, options, words) -> None:
        with pytest.raises(ValueError, match=words):
            GaussianDiffusion(Odd(), **{"image_size": 8, "timesteps": 100, **options})

    def test_networks_that_do_not_fit(self) -> None:
        with pytest.raises(TypeError, match=r"Linear has no channels, out_dim, self_condition"):
            GaussianDiffusion(torch.nn.Linear(1, 1), image_size=8)
        for name, value, words in (
            ("out_dim", 6, "out_dim must be model.channels = 3, got 6; LearnedGaussianDiffusion is for"),
            ("out_dim", 4, "out_dim must be model.channels = 3, got 4"),
            ("random_or_learned_sinusoidal_cond", True, "learned sinusoidal time features"),
        ):
            net = Odd()
            setattr(net, name, value)
            with pytest.raises(ValueError, match=words):
                GaussianDiffusion(net, image_size=8)
        with pytest.raises(TypeError, match=r"image_size must be an int or \(H, W\), got \(8, 8, 8\)"):
            GaussianDiffusion(Odd(), image_size=(8, 8, 8))

    def test_images(self) -> None:
        diffusion = GaussianDiffusion(Odd(), image_size=(8, 12), timesteps=100)
        with pytest.raises(ValueError, match=r"img must have shape \(B, 3, 8, 12\), got \(2, 3, 8, 8\)"):
            diffusion(torch.zeros(2, 3, 8, 8))
        with pytest.raises(TypeError, match=r"img must be float in \[0, 1\] or uint8, got torch.int64"):
            diffusion(torch.zeros(2, 3, 8, 12, dtype=torch.int64))
        with pytest.raises(TypeError, match=r"img must be float, got torch\.uint8"):
            GaussianDiffusion(Odd(), image_size=8, auto_normalize=False)(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
        with pytest.raises(ValueError, match=r"t must be in \[0, 100\).*got 100"):
            diffusion(torch.zeros(1, 3, 8, 12), times=torch.tensor([100]))
        with pytest.raises(ValueError, match="loss_reduction must be one of mean, none, got 'sum'"):
            diffusion(torch.zeros(1, 3, 8, 12), loss_reduction="sum")
        diffusion.objective = "pred_eps"
        for call in (lambda: diffusion(torch.zeros(1, 3, 8, 12)), lambda: diffusion.sample(1)):
            with pytest.raises(
                ValueError, match="objective must be one of pred_noise, pred_x0, pred_v, got 'pred_eps'"
            ):
                call()
        diffusion.objective = "pred_v"
        diffusion.model.forward = lambda x, t: x[:, :1]
        with pytest.raises(ValueError, match=r"the model must return shape \(1, 3, 8, 12\), got \(1, 1, 8, 12\)"):
            diffusion(torch.zeros(1, 3, 8, 12))

    def test_any_network_with_the_attributes_will_do(self) -> None:
        diffusion = GaussianDiffusion(Odd(), image_size=(8, 12), timesteps=20)
        assert diffusion(torch.rand(2, 3, 8, 12)).isfinite()
        assert diffusion.sample(2, seed=0).shape == (2, 3, 8, 12)
        assert diffusion.schedule == Schedule.sigmoid_alphas_cumprod(20)
