"""The drop-in schedulers beside diffusers' own, in one process: what a step computes."""

import itertools

import pytest

pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")

import torch
from diffusers.schedulers import scheduling_ddpm
from scheduler_pairs import PAIRS, UNIT, close, images, in_float64, pair

from ddpm_fast import ops
from ddpm_fast.interop.diffusers import DDIMScheduler, DDPMScheduler
from ddpm_fast.noise import make_rng

PREDICTIONS = ("epsilon", "sample", "v_prediction")
FIXED = ("fixed_small", "fixed_small_log", "fixed_large")  # fixed_large_log is NaN there
SPACINGS = ("leading", "trailing", "linspace")


def generators(n: int = 2) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(7) for _ in range(n)]


class TestDDPM:
    @pytest.mark.parametrize("prediction_type", PREDICTIONS)
    @pytest.mark.parametrize("variance_type", FIXED)
    def test_steps_are_theirs(self, prediction_type, variance_type):
        m, x = images()
        for spacing, clip, bound in itertools.product(SPACINGS, (True, False), (1.0, 0.7)):
            theirs, mine = pair(
                "ddpm", 25, prediction_type=prediction_type, variance_type=variance_type, timestep_spacing=spacing,
                clip_sample=clip, clip_sample_range=bound,
            )  # fmt: skip
            drawn, also = generators()
            for t in mine.timesteps:
                before = m.clone(), x.clone()
                a, b = theirs.step(m, t, x, generator=drawn), mine.step(m, t, x, generator=also)
                assert type(b) is type(a)
                assert torch.equal(m, before[0])
                assert torch.equal(x, before[1])
                close(b.prev_sample, a.prev_sample)
                close(b.pred_original_sample, a.pred_original_sample)
            assert torch.equal(drawn.get_state(), also.get_state())

    @pytest.mark.parametrize("prediction_type", PREDICTIONS)
    @pytest.mark.parametrize("steps", [1000, 37])
    def test_is_closer_to_their_formulas_in_float64_than_they_are(self, prediction_type, steps, monkeypatch):
        """Each term of a step is rounded a few times: 8 half-ulps of the sum of the terms' sizes bound the error."""
        config = {"prediction_type": prediction_type, "variance_type": "fixed_large"}
        theirs, mine = pair("ddpm", steps, **config)
        exact = in_float64(pair("ddpm", steps, **config)[0], mine)
        m, x = images()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        with monkeypatch.context() as patched:
            patched.setattr(scheduling_ddpm, "randn_tensor", lambda *args, dtype, **kwargs: noise.to(dtype))
            patched.setattr(mine, "_drawn", lambda *args, **kwargs: (noise, None))
            wrong = {"theirs": 0.0, "mine": 0.0}
            for t in mine.timesteps[:: max(1, steps // 40)].tolist() + mine.timesteps[-3:].tolist():
                want = exact.step(m.double(), t, x.double())
                got = mine.step(m, t, x)
                prev = int(exact.previous_timestep(t))
                A = exact.alphas_cumprod[t]
                P = exact.alphas_cumprod[prev] if prev >= 0 else exact.one
                size_x0 = (x.abs() + m.abs()) / (A.sqrt() if prediction_type == "epsilon" else 1.0)
                size = P.sqrt() * (1 - A / P) / (1 - A) * size_x0 + x.abs() + noise.abs()
                assert ((got.pred_original_sample - want.pred_original_sample).abs() <= 8 * UNIT * size_x0).all()
                error = (got.prev_sample - want.prev_sample).abs()
                assert (error <= 8 * UNIT * size).all()
                wrong["mine"] = max(wrong["mine"], error.max().item())
                off = (theirs.step(m, t, x).prev_sample - want.prev_sample).abs()
                wrong["theirs"] = max(wrong["theirs"], off.max().item())
        assert wrong["mine"] < wrong["theirs"]

    @pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
    @pytest.mark.parametrize("spacing", SPACINGS)
    def test_learned_variance(self, variance_type, spacing):
        theirs, mine = pair("ddpm", 25, variance_type=variance_type, timestep_spacing=spacing)
        m, x = images()
        v = torch.rand(m.shape, generator=torch.Generator().manual_seed(2))  # a variance, or the place in a range
        drawn, also = generators()
        for t in mine.timesteps:
            both = torch.cat([m, v], dim=1)
            close(
                mine.step(both, t, x, generator=also).prev_sample, theirs.step(both, t, x, generator=drawn).prev_sample
            )
        assert torch.equal(drawn.get_state(), also.get_state())
        with pytest.raises(TypeError, match="6 channels"):
            mine.step(m, mine.timesteps[0], x)

    @pytest.mark.parametrize("kind", PAIRS)
    @pytest.mark.parametrize("prediction_type", PREDICTIONS)
    def test_dynamic_thresholding(self, kind, prediction_type):
        theirs, mine = pair(
            kind, 10, thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=1.5,
            prediction_type=prediction_type,
        )  # fmt: skip
        m, x = images()
        for t in mine.timesteps:
            # Two samples of unlike size, so that each needs its own bound.
            output = m * torch.tensor([0.5, 3.0]).reshape(2, 1, 1, 1)
            drawn, also = generators()
            a, b = theirs.step(output, t, x, generator=drawn), mine.step(output, t, x, generator=also)
            close(b.prev_sample, a.prev_sample)
            close(b.pred_original_sample, a.pred_original_sample)

    def test_without_set_timesteps_a_step_goes_down_by_one(self):
        theirs, mine = pair("ddpm")
        m, x = images()
        for t in (999, 500, 1, 0, torch.tensor(3), torch.tensor([4])):
            drawn, also = generators()
            close(mine.step(m, t, x, generator=also).prev_sample, theirs.step(m, t, x, generator=drawn).prev_sample)

    def test_custom_timesteps(self):
        theirs, mine = pair("ddpm")
        m, x = images()
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(timesteps=[900, 333, 20, 3])
        for t in mine.timesteps:
            drawn, also = generators()
            close(mine.step(m, t, x, generator=also).prev_sample, theirs.step(m, t, x, generator=drawn).prev_sample)
        assert mine.previous_timestep(333) == 20

    @pytest.mark.parametrize(
        "options",
        [
            {"beta_schedule": "scaled_linear"},
            {"beta_schedule": "squaredcos_cap_v2"},
            {"beta_schedule": "sigmoid"},
            {"beta_schedule": "laplace"},
            {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            {"trained_betas": torch.linspace(0.001, 0.1, 60).tolist(), "num_train_timesteps": 60},
            {"num_train_timesteps": 77, "timestep_spacing": "linspace"},
        ],
    )
    def test_other_schedules(self, options):
        theirs, mine = pair("ddpm", 10, prediction_type="v_prediction", **options)
        m, x = images()
        for t in mine.timesteps:
            drawn, also = generators()
            close(mine.step(m, t, x, generator=also).prev_sample, theirs.step(m, t, x, generator=drawn).prev_sample)


class TestDDIM:
    @pytest.mark.parametrize("prediction_type", PREDICTIONS)
    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    def test_steps_are_theirs(self, prediction_type, eta):
        m, x = images()
        for clip, rederive, to_one, offset in itertools.product((True, False), (True, False), (True, False), (0, 1)):
            theirs, mine = pair(
                "ddim", 25, prediction_type=prediction_type, clip_sample=clip, set_alpha_to_one=to_one,
                steps_offset=offset,
            )  # fmt: skip
            drawn, also = generators()
            for t in mine.timesteps:
                a = theirs.step(m, t, x, eta, rederive, drawn)
                b = mine.step(m, t, x, eta, rederive, also)
                assert type(b) is type(a)
                # From x0, eps is a difference divided by sqrt(1 - A), which is 1.7e-4 off in theirs and small near 0.
                close(b.prev_sample, a.prev_sample, 5e-4 if prediction_type == "sample" else 2e-4)
                close(b.pred_original_sample, a.pred_original_sample)
            assert torch.equal(drawn.get_state(), also.get_state())

    @pytest.mark.parametrize("prediction_type", PREDICTIONS)
    @pytest.mark.parametrize("steps", [50, 1000])
    def test_is_closer_to_their_formulas_in_float64_than_they_are(self, prediction_type, steps):
        """As for DDPM; eps itself is x0 and x taken apart, which divides by sqrt(1 - A)."""
        theirs, mine = pair("ddim", steps, prediction_type=prediction_type)
        exact = in_float64(pair("ddim", steps, prediction_type=prediction_type)[0], mine)
        m, x = images()
        worst = {"theirs": 0.0, "mine": 0.0}
        for t in mine.timesteps[:: steps // 50].tolist():
            want = exact.step(m.double(), t, x.double()).prev_sample
            A = exact.alphas_cumprod[t]
            scale = A.sqrt() if prediction_type == "epsilon" else (1 - A).sqrt() if prediction_type == "sample" else 1
            error = (mine.step(m, t, x).prev_sample - want).abs()
            assert (error <= 8 * UNIT * (x.abs() + m.abs()) / scale).all()
            worst["mine"] = max(worst["mine"], error.max().item())
            worst["theirs"] = max(worst["theirs"], (theirs.step(m, t, x).prev_sample - want).abs().max().item())
        assert worst["mine"] < worst["theirs"]

    def test_a_timestep_outside_the_list_goes_down_by_the_stride(self):
        theirs, mine = pair("ddim", 50)
        m, x = images()
        for t in (999, 501, torch.tensor(333), 19, 7, 0):
            close(mine.step(m, t, x).prev_sample, theirs.step(m, t, x).prev_sample)

    def test_given_noise(self):
        theirs, mine = pair("ddim", 50)
        m, x = images()
        noise = images(seed=5)[0]
        a, b = (s.step(m, 500, x, eta=0.8, variance_noise=noise).prev_sample for s in (theirs, mine))
        close(b, a)
        assert not torch.equal(b, mine.step(m, 500, x, eta=0.0).prev_sample)


class TestMemoryAndDtypes:
    @pytest.mark.parametrize("kind", PAIRS)
    @pytest.mark.parametrize("m_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_results_have_their_dtype(self, kind, m_dtype, x_dtype):
        """Theirs rounds every operation to the lower dtype: a few eps of it are the difference (1/sqrt(A) is 3.6)."""
        eps = max(torch.finfo(m_dtype).eps, torch.finfo(x_dtype).eps)
        for prediction_type in PREDICTIONS:
            theirs, mine = pair(kind, 10, prediction_type=prediction_type)
            m, x = images(dtype=m_dtype)[0], images(dtype=x_dtype)[1]
            drawn, also = generators()
            a, b = theirs.step(m, 500, x, generator=drawn), mine.step(m, 500, x, generator=also)
            assert torch.equal(drawn.get_state(), also.get_state())
            close(b.prev_sample, a.prev_sample, max(2e-4, 8 * eps))
            close(b.pred_original_sample, a.pred_original_sample, max(2e-4, 8 * eps))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("prediction_type", PREDICTIONS)
    def test_low_precision_is_rounded_once(self, dtype, prediction_type):
        """Half an ulp from their formulas in float64, and 1e-5 for float32 in between; theirs is further off."""
        theirs, mine = pair("ddim", 10, prediction_type=prediction_type)
        exact = in_float64(pair("ddim", 10, prediction_type=prediction_type)[0], mine)
        m, x = images(dtype=dtype)
        want = exact.step(m.double(), 500, x.double()).prev_sample
        off = [(s.step(m, 500, x).prev_sample.double() - want).abs() for s in (mine, theirs)]
        assert (off[0] <= torch.finfo(dtype).eps / 2 * want.abs() + 1e-5).all()
        assert off[0].max() < off[1].max()

    @pytest.mark.parametrize("kind", PAIRS)
    def test_any_memory_format_and_number_of_dimensions(self, kind):
        theirs, mine = pair(kind, 10)
        m, x = images()
        want = mine.step(m, 500, x, generator=generators()[0]).prev_sample
        last = torch.channels_last
        for n, y in [(m.to(memory_format=last), x.to(memory_format=last)), (m, x.to(memory_format=last)),
                     (m.flip(-1).flip(-1)[:], torch.cat([x, x], 3)[..., :6])]:  # fmt: skip
            got = mine.step(n, 500, y, generator=generators()[0]).prev_sample
            assert torch.equal(got, want)
        strided = mine.step(m, 500, x.to(memory_format=last)).prev_sample
        assert strided.is_contiguous(memory_format=last)
        shapes = [(5, 7), (2, 3, 4), (2, 3, 4, 5, 6), (0, 3, 4, 4)] + ([(9,), ()] if kind == "ddim" else [])
        for shape in shapes:
            n, y = torch.randn(shape), torch.randn(shape)
            a, b = (s.step(n, 500, y, generator=generators()[0]).prev_sample for s in (theirs, mine))
            close(b, a)
        a, b = (s.step(m[:1], 500, x, generator=generators()[0]).prev_sample for s in (theirs, mine))
        close(b, a)  # one model output for all samples broadcasts, its noise too

    @pytest.mark.parametrize("kind", PAIRS)
    @pytest.mark.parametrize("threshold", [False, True])
    def test_gradients_are_theirs(self, kind, threshold):
        theirs, mine = pair(kind, 10, thresholding=threshold)
        results = []
        for scheduler in (theirs, mine):
            m, x = (value.requires_grad_() for value in images())
            out = scheduler.step(m, 300, x, generator=generators()[0])
            (out.prev_sample.square().sum() + 3 * out.pred_original_sample.sum()).backward()
            results.append((m.grad, x.grad))
        for a, b in zip(*results, strict=True):
            close(b, a, 1e-3)

    @pytest.mark.no_poison
    def test_compiled(self):
        mine = pair("ddpm", 10)[1]
        m, x = images()
        want = mine.step(m, 500, x, generator=generators()[0]).prev_sample
        step = torch.compile(mine.step, backend="eager")
        assert torch.equal(step(m, 500, x, generator=generators()[0]).prev_sample, want)

    @pytest.mark.gpu
    @pytest.mark.parametrize("kind", PAIRS)
    def test_no_step_waits_for_the_gpu(self, kind):
        mine = pair(kind)[1]
        mine.set_timesteps(10, device="cuda")
        m, x = (value.cuda() for value in images())
        cpu = pair(kind, 10)[1]
        generator = torch.Generator("cuda").manual_seed(0)
        mine.step(m, mine.timesteps[0], x, generator=generator)  # tables are put there once
        for t in mine.timesteps:
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = mine.step(m, t, x, generator=generator)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            want = cpu.step(m.cpu(), t.cpu(), x.cpu())
            assert torch.equal(got.pred_original_sample.cpu(), want.pred_original_sample)


class TestNoise:
    @pytest.mark.parametrize("kind", PAIRS)
    @pytest.mark.parametrize("how", ["none", "one", "list", "list of one"])
    def test_is_drawn_where_theirs_is(self, kind, how):
        m, x = images()
        eta = {"eta": 1.0} if kind == "ddim" else {}
        ends = []
        for scheduler in pair(kind, 10):
            torch.manual_seed(3)
            many = [torch.Generator().manual_seed(i) for i in range(2)]
            given = {"none": None, "one": many[0], "list": many, "list of one": many[:1]}[how]
            results = [scheduler.step(m, t, x, generator=given, **eta).prev_sample for t in scheduler.timesteps]
            ends.append((results, torch.get_rng_state(), [generator.get_state() for generator in many]))
        for a, b in zip(ends[0][0], ends[1][0], strict=True):
            close(b, a)
        assert torch.equal(ends[0][1], ends[1][1])
        assert all(map(torch.equal, ends[0][2], ends[1][2]))

    def test_with_a_seed_it_belongs_to_the_image(self):
        mine = DDPMScheduler(seed=11, variance_type="fixed_large")
        mine.set_timesteps(20)
        m, x = images(n=4)
        state = torch.get_rng_state()
        whole = mine.step(m, 500, x).prev_sample
        mine.first_sample = 2
        assert torch.equal(mine.step(m[2:], 500, x[2:]).prev_sample, whole[2:])
        other = mine.step(m[2:].bfloat16(), 500, x[2:].bfloat16()).prev_sample.float()
        assert (other - whole[2:]).abs().max() < 0.1
        assert torch.equal(torch.get_rng_state(), state)
        noise = ops.normal(4, (3, 6, 6), rng=make_rng(11), stream=501)
        still = DDPMScheduler(variance_type="fixed_large")
        still.set_timesteps(20)
        still._drawn = lambda *args, **kwargs: (noise, None)
        assert torch.equal(still.step(m, 500, x).prev_sample, whole)
        with pytest.raises(ValueError, match="seed"):
            mine.step(m, 500, x, generator=torch.Generator())

    def test_with_a_seed_ddim(self):
        mine = DDIMScheduler(seed=3)
        mine.set_timesteps(20)
        m, x = images(n=3)
        whole = mine.step(m, 500, x, eta=1.0).prev_sample
        assert torch.equal(mine.step(m[:1], 500, x[:1], eta=1.0).prev_sample, whole[:1])
        assert not torch.equal(whole, mine.step(m, 500, x, eta=0.0).prev_sample)


@pytest.mark.parametrize("kind", PAIRS)
def test_compat_is_theirs_bit_for_bit(kind):
    for spacing in SPACINGS:
        theirs, mine = PAIRS[kind][0](timestep_spacing=spacing), PAIRS[kind][1](timestep_spacing=spacing, compat=True)
        m, x = images()
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(61)
        assert torch.equal(theirs.timesteps, mine.timesteps)
        for t in mine.timesteps[:60:7]:
            drawn, also = generators()
            a, b = theirs.step(m, t, x, generator=drawn), mine.step(m, t, x, generator=also)
            assert torch.equal(a.prev_sample, b.prev_sample)
            assert torch.equal(a.pred_original_sample, b.pred_original_sample)
        t = torch.tensor([3, 900])
        for name in ("add_noise", "get_velocity"):
            low = x.bfloat16(), m.bfloat16(), t
            assert torch.equal(getattr(theirs, name)(*low), getattr(mine, name)(*low))


class TestTheirDefects:
    def test_fixed_large_log_is_fixed_large(self):
        m, x = images()
        theirs, mine = pair("ddpm", 20, variance_type="fixed_large_log")
        large = pair("ddpm", 20, variance_type="fixed_large")[1]
        assert theirs.step(m, 500, x).prev_sample.isnan().any()
        want, got = (s.step(m, 500, x, generator=generators()[0]).prev_sample for s in (large, mine))
        assert torch.equal(got, want)

    @pytest.mark.parametrize("spacing", ["linspace", "trailing"])
    def test_a_ddim_step_arrives_at_the_next_timestep_of_the_list(self, spacing):
        """DDIM with eta = 0 keeps x0 and eps, so that x at any timestep is known."""
        theirs, mine = pair("ddim", 30, timestep_spacing=spacing, clip_sample=False)
        x0, eps = images()
        ab = mine._schedule().alphas_cumprod
        ends = [*mine.timesteps.tolist()[1:], None]
        off = 0.0
        for t, end in zip(mine.timesteps.tolist(), ends, strict=True):
            x = ab[t] ** 0.5 * x0 + (1 - ab[t]) ** 0.5 * eps
            want = x0 if end is None else ab[end] ** 0.5 * x0 + (1 - ab[end]) ** 0.5 * eps
            assert (mine.step(eps, t, x).prev_sample - want).abs().max() < 2e-5
            off = max(off, float((theirs.step(eps, t, x).prev_sample - want).abs().max()))
        assert off > 1e-3

    @pytest.mark.parametrize("kind", PAIRS)
    def test_trailing_lists_have_as_many_timesteps_as_were_asked_for(self, kind):
        theirs, mine = pair(kind, 61, timestep_spacing="trailing")
        assert theirs.timesteps[-1] == -1
        assert torch.equal(mine.timesteps, theirs.timesteps[:-1])
        m, x = images()
        assert mine.step(m, mine.timesteps[-1], x).prev_sample.isfinite().all()

    def test_zero_terminal_snr_with_eps_is_refused_where_it_has_no_meaning(self):
        mine = DDPMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
        mine.set_timesteps(10)
        m, x = images()
        with pytest.raises(ValueError, match=r"timestep 999 .* prediction_type='epsilon'"):
            mine.step(m, mine.timesteps[0], x)
        assert mine.step(m, mine.timesteps[1], x).prev_sample.isfinite().all()
