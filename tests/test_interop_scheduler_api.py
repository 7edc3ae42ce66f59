"""The drop-in schedulers beside diffusers' own: configs, files, timesteps, noising, copies, changes and errors."""

import copy
import inspect
import json
import pickle

import pytest

pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")

import diffusers
import torch
from scheduler_pairs import PAIRS, close, images, pair

from ddpm_fast.interop import diffusers as ours
from ddpm_fast.interop._scheduler_output import maker

SPACINGS = ("leading", "trailing", "linspace")
OPTIONS = {
    "num_train_timesteps": 300, "beta_schedule": "scaled_linear", "beta_end": 0.03, "clip_sample_range": 2.0,
    "prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True,
}  # fmt: skip


def settled(config) -> dict:
    """The order of this list is that of a set of strings."""
    return {**config, "_use_default_values": sorted(config.get("_use_default_values", []))}


@pytest.mark.parametrize("kind", PAIRS)
class TestConfig:
    def test_is_theirs(self, kind):
        theirs, mine = PAIRS[kind]
        assert issubclass(mine, theirs)
        assert mine.__name__ == theirs.__name__
        for options in ({}, OPTIONS):
            assert settled(mine(**options).config) == settled(theirs(**options).config)
        assert settled(mine(500, 1e-3).config) == settled(theirs(500, 1e-3).config)
        made = mine(compat=True, **OPTIONS), mine(seed=4, **OPTIONS)
        assert all(settled(scheduler.config) == settled(theirs(**OPTIONS).config) for scheduler in made)
        wanted = list(inspect.signature(theirs.__init__).parameters.values())
        assert list(inspect.signature(mine.__init__).parameters.values())[: len(wanted)] == wanted

    def test_files_go_both_ways(self, kind, tmp_path):
        theirs, mine = PAIRS[kind]
        mine(**OPTIONS).save_pretrained(tmp_path / "mine")
        theirs(**OPTIONS).save_pretrained(tmp_path / "theirs")
        texts = [(tmp_path / name / "scheduler_config.json").read_text() for name in ("mine", "theirs")]
        assert texts[0] == texts[1]
        assert json.loads(texts[0])["_class_name"] == theirs.__name__
        for cls, folder in ((theirs, "mine"), (mine, "theirs"), (mine, "mine")):
            loaded = cls.from_pretrained(tmp_path / folder)
            assert type(loaded) is cls
            assert {**loaded.config, "_use_default_values": 0} == {**theirs(**OPTIONS).config, "_use_default_values": 0,
                "_class_name": theirs.__name__, "_diffusers_version": diffusers.__version__}  # fmt: skip
        chosen = mine.from_pretrained(tmp_path / "theirs", seed=5)
        assert (chosen.seed, chosen.compat) == (5, False)
        assert mine.from_pretrained(tmp_path / "theirs", compat=True, clip_sample=False).compat

    def test_from_config(self, kind):
        mine = PAIRS[kind][1]
        for theirs in (diffusers.DDPMScheduler, diffusers.DDIMScheduler, diffusers.DPMSolverMultistepScheduler):
            source = theirs(beta_end=0.03, prediction_type="v_prediction")
            got = mine.from_config(source.config, compat=True)
            want = PAIRS[kind][0].from_config(source.config)
            assert settled(got.config) == settled(want.config)
            assert got.compat
            assert not mine.from_config(source.config).compat
        got, unused = mine.from_config(mine().config, return_unused_kwargs=True, seed=7, nonsense=1)
        assert got.seed == 7
        assert unused["nonsense"] == 1
        back = PAIRS[kind][0].from_config(mine(seed=3, beta_end=0.03).config)
        assert back.config.beta_end == 0.03

    def test_choices_are_checked(self, kind):
        mine = PAIRS[kind][1]
        with pytest.raises(ValueError, match="seed"):
            mine(seed=-1)
        with pytest.raises(ValueError, match="compat=True"):
            mine(seed=1, compat=True)
        with pytest.raises(TypeError, match="compat"):
            mine(compat="yes")
        with pytest.raises(NotImplementedError):
            mine(beta_schedule="nonsense")


@pytest.mark.parametrize("kind", PAIRS)
class TestTimesteps:
    @pytest.mark.parametrize("spacing", SPACINGS)
    def test_are_theirs(self, kind, spacing):
        for T, counts in ((1000, (1, 2, 7, 10, 50, 333, 1000)), (100, (3, 50, 100))):
            for steps in counts:
                theirs, mine = pair(kind, steps, num_train_timesteps=T, timestep_spacing=spacing)
                assert torch.equal(theirs.timesteps, mine.timesteps)
                assert theirs.timesteps.dtype == mine.timesteps.dtype
                assert theirs.num_inference_steps == mine.num_inference_steps
        theirs, mine = pair(kind, 20, timestep_spacing=spacing, steps_offset=1)
        assert torch.equal(theirs.timesteps, mine.timesteps)
        assert len(mine) == len(theirs)
        signatures = [inspect.signature(scheduler.set_timesteps).parameters for scheduler in (theirs, mine)]
        assert list(signatures[0]) == list(signatures[1])

    def test_any_way_of_naming_one(self, kind):
        mine = pair(kind, 10)[1]
        m, x = images()
        row = 3
        t = int(mine.timesteps[row])
        want = mine.step(m, mine.timesteps[row], x, generator=torch.Generator().manual_seed(0)).prev_sample
        ways = [
            t, torch.tensor(t), torch.tensor([t]), torch.tensor(t, dtype=torch.int32), mine.timesteps.numpy()[row],
            mine.timesteps[row : row + 1], mine.timesteps[1:][row - 1], mine.timesteps.clone()[row],
            list(mine.timesteps)[row], mine.timesteps.flip(0).flip(0)[row],
        ]  # fmt: skip
        for way in ways:
            got = mine.step(m, way, x, generator=torch.Generator().manual_seed(0)).prev_sample
            assert torch.equal(got, want)

    def test_follow_what_is_done_to_the_scheduler(self, kind):
        """A list put in place of the timesteps, one written to, another prediction type, other alphas_cumprod."""
        m, x = images()

        def agree(t):
            one, two = (torch.Generator().manual_seed(0) for _ in range(2))
            got, want = mine.step(m, t, x, generator=two), theirs.step(m, t, x, generator=one)
            close(got.prev_sample, want.prev_sample)
            close(got.pred_original_sample, want.pred_original_sample)

        theirs, mine = pair(kind, 20)
        agree(950)
        for scheduler in (theirs, mine):
            scheduler.timesteps = scheduler.timesteps[5:]
        agree(mine.timesteps[0])
        for scheduler in (theirs, mine):
            scheduler.timesteps -= 3
        agree(mine.timesteps[2])
        for scheduler in (theirs, mine):
            scheduler.register_to_config(prediction_type="v_prediction")
        agree(mine.timesteps[2])
        for scheduler in (theirs, mine):
            scheduler.alphas_cumprod = scheduler.alphas_cumprod.clone()
        agree(mine.timesteps[2])
        for scheduler in (theirs, mine):
            scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5
        agree(mine.timesteps[2])
        t = torch.tensor([500, 20])
        close(mine.add_noise(x, m, t), theirs.add_noise(x, m, t))
        for scheduler in (theirs, mine):
            scheduler.set_timesteps(7)
        agree(mine.timesteps[-1])

    def test_in_inference_mode(self, kind):
        m, x = images()
        with torch.inference_mode():
            theirs, mine = pair(kind, 5)
            t = mine.timesteps[2]
            close(mine.step(m, t, x, generator=torch.Generator().manual_seed(1)).prev_sample,
                  theirs.step(m, t, x, generator=torch.Generator().manual_seed(1)).prev_sample)  # fmt: skip
        m = m.requires_grad_()
        mine.step(m, t, x).pred_original_sample.sum().backward()
        assert m.grad is not None

    def test_copies_stand_alone(self, kind):
        mine = pair(kind, 10)[1]
        m, x = images()
        mine.step(m, mine.timesteps[4], x)
        for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), copy.copy(mine)):
            assert type(other) is type(mine)
            one, two = (torch.Generator().manual_seed(0) for _ in range(2))
            want = mine.step(m, mine.timesteps[4], x, generator=one).prev_sample
            assert torch.equal(other.step(m, other.timesteps[4], x, generator=two).prev_sample, want)

    def test_the_same_steps_again_are_not_computed_again(self, kind):
        scheduler, (m, x) = pair(kind)[1], images()

        def prev_sample(one, row):
            return one.step(m, one.timesteps[row], x, generator=torch.Generator().manual_seed(0)).prev_sample

        def rows(steps):
            scheduler.set_timesteps(steps)
            prev_sample(scheduler, 1)
            return scheduler._line.rows

        first = rows(10)
        assert rows(10) is first
        assert rows(12) is not first
        assert torch.equal(prev_sample(scheduler, 3), prev_sample(pair(kind, 12)[1], 3))


@pytest.mark.parametrize("kind", PAIRS)
class TestNoising:
    @pytest.mark.parametrize("name", ["add_noise", "get_velocity"])
    def test_is_theirs(self, kind, name):
        theirs, mine = pair(kind)
        x0, eps = images(n=4)
        for t in ([0, 1, 500, 999], [7], 7):
            timesteps = torch.tensor(t)
            for noise, clean in (
                (eps, x0),
                (eps.double(), x0.double()),
                (eps.double(), x0),
                (eps[:1], x0),
                (eps, x0[:1]),
            ):
                got, want = (getattr(s, name)(clean, noise, timesteps) for s in (mine, theirs))
                close(got, want)
            for noise, clean in ((eps, x0.half()), (eps.bfloat16(), x0), (eps.bfloat16(), x0.half())):
                got, want = (getattr(s, name)(clean, noise, timesteps) for s in (mine, theirs))
                assert got.dtype == want.dtype
                close(got, getattr(mine, name)(clean.float(), noise.float(), timesteps).to(got.dtype), 1e-6)
            got, want = (getattr(s, name)(x0, eps, timesteps.int()) for s in (mine, theirs))
            close(got, want)
        for shape, t in (((4, 7), [1, 2, 3, 4]), ((4,), [1, 2, 3, 4]), ((), [3]), ((2, 3, 4, 5, 6), [8, 9])):
            clean, noise = torch.randn(shape), torch.randn(shape)
            got, want = (getattr(s, name)(clean, noise, torch.tensor(t)) for s in (mine, theirs))
            close(got, want)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_keeps_the_noise(self, kind, dtype):
        """Theirs rounds alphas_cumprod first, and near t = 0 adds no noise at all."""
        theirs, mine = pair(kind)
        t = torch.arange(1000)
        zeros, ones = torch.zeros(1000, 2, dtype=dtype), torch.ones(1000, 2, dtype=dtype)
        schedule = mine._schedule()
        sigma = torch.from_numpy(schedule.sqrt_one_minus_alphas_cumprod.copy())[:, None]
        signal = torch.from_numpy(schedule.sqrt_alphas_cumprod.copy())[:, None]
        assert (theirs.add_noise(zeros, ones, t)[:2] == 0).all()
        half_ulp = torch.finfo(dtype).eps / 2
        pairs = [
            (mine.add_noise(zeros, ones, t), sigma),
            (mine.add_noise(ones, zeros, t), signal),
            (mine.get_velocity(ones, zeros, t), -sigma),
            (mine.get_velocity(zeros, ones, t), signal),
        ]
        for got, want in pairs:
            assert got.dtype == dtype
            assert ((got.double() - want).abs() <= half_ulp * 1.001 * want.abs()).all()

    def test_gradients(self, kind):
        theirs, mine = pair(kind)
        grads = []
        for scheduler in (theirs, mine):
            x0, eps = (value.requires_grad_() for value in images())
            t = torch.tensor([3, 400])
            (scheduler.add_noise(x0, eps, t).square().sum() + scheduler.get_velocity(x0, eps, t).sum()).backward()
            grads.append((x0.grad, eps.grad))
        for a, b in zip(*grads, strict=True):
            close(b, a, 1e-3)

    def test_errors_are_theirs(self, kind):
        theirs, mine = pair(kind)
        x0, eps = images()
        for scheduler in (theirs, mine):
            with pytest.raises(IndexError):
                scheduler.add_noise(x0, eps, torch.tensor([0, 1000]))
            with pytest.raises(IndexError):
                scheduler.add_noise(x0, eps, torch.tensor([0.5, 1.0]))
            with pytest.raises(RuntimeError):
                scheduler.add_noise(x0, eps, torch.tensor([1, 2, 3]))
            with pytest.raises(RuntimeError):
                scheduler.get_velocity(x0, eps[:, :2], torch.tensor([1, 2]))


class TestErrors:
    def test_ddpm(self):
        theirs, mine = pair("ddpm", 50)
        m, x = images()
        for scheduler in (theirs, mine):
            for t in (5, 1000, -1, 5.0, torch.tensor(5)):
                with pytest.raises(IndexError):
                    scheduler.step(m, t, x)
            with pytest.raises(RuntimeError):
                scheduler.step(m[..., :4], 960, x)
            with pytest.raises(RuntimeError):
                scheduler.step(torch.cat([m, m], 1), 960, x)  # a learned variance, but variance_type is fixed
            with pytest.raises(RuntimeError):
                scheduler.step(m, torch.tensor([960, 940]), x)
            with pytest.raises(ValueError, match="descending"):
                scheduler.set_timesteps(timesteps=[3, 5])
            with pytest.raises(ValueError, match="cannot be larger"):
                scheduler.set_timesteps(1001)
        with pytest.raises(TypeError, match="timestep must be an integer"):
            mine.step(m, "5", x)
        for scheduler in (theirs, mine):
            scheduler.register_to_config(prediction_type="nonsense")
            with pytest.raises(ValueError, match="nonsense"):
                scheduler.step(m, 960, x)

    def test_the_message_names_the_timesteps(self):
        mine = pair("ddpm", 50)[1]
        m, x = images()
        with pytest.raises(IndexError, match=r"timestep 5 is not one of .* 50 timesteps \(980, 960, 940 \.\.\.\)"):
            mine.step(m, 5, x)

    def test_a_failed_step_draws_nothing(self):
        mine = pair("ddpm", 50)[1]
        m, x = images()
        generator = torch.Generator().manual_seed(0)
        before = generator.get_state()
        for arguments in ((m, 5, x), (m[..., :4], 960, x)):
            with pytest.raises((IndexError, RuntimeError)):
                mine.step(*arguments, generator=generator)
        assert torch.equal(generator.get_state(), before)

    def test_ddim(self):
        theirs, mine = pair("ddim")
        m, x = images()
        for scheduler in (theirs, mine):
            with pytest.raises(ValueError, match="set_timesteps"):
                scheduler.step(m, 5, x)
            scheduler.set_timesteps(50)
            for t in (1000, 5.0):
                with pytest.raises(IndexError):
                    scheduler.step(m, t, x)
            with pytest.raises(ValueError, match=r"generator.* variance_noise|both generator"):
                scheduler.step(m, 980, x, eta=0.5, generator=torch.Generator(), variance_noise=m)
            scheduler.step(m, 980, x, eta=0.0, generator=torch.Generator(), variance_noise=m)
        with pytest.raises(ValueError, match=r"eta=30"):
            mine.step(m, 980, x, eta=30.0)

    def test_without_diffusers(self, monkeypatch):
        import builtins
        import sys

        real = builtins.__import__

        def missing(name, *args, **kwargs):
            if name == "diffusers":
                raise ImportError("No module named 'diffusers'")
            return real(name, *args, **kwargs)

        monkeypatch.delitem(sys.modules, "ddpm_fast.interop.diffusers")
        monkeypatch.setattr(builtins, "__import__", missing)
        with pytest.raises(ImportError, match=r"pip install 'ddpm_fast\[diffusers\]'"):
            real("ddpm_fast.interop.diffusers")


class TestOutputs:
    def test_are_theirs_in_every_way(self):
        from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput

        a, b = torch.zeros(2), torch.ones(2)
        quick = maker(DDPMSchedulerOutput, "prev_sample", "pred_original_sample")(a, b)
        theirs = DDPMSchedulerOutput(prev_sample=a, pred_original_sample=b)
        assert type(quick) is type(theirs)
        assert list(quick.items()) == list(theirs.items())
        assert vars(quick) == vars(theirs)
        assert quick.to_tuple() == theirs.to_tuple()
        assert quick[0] is a
        assert quick["pred_original_sample"] is b
        quick.prev_sample = b
        assert quick["prev_sample"] is b
        leaves = torch.utils._pytree.tree_flatten(theirs)[1]
        assert (
            torch.utils._pytree.tree_flatten(maker(type(theirs), "prev_sample", "pred_original_sample")(a, b))[1]
            == leaves
        )
        assert list(pickle.loads(pickle.dumps(quick))) == list(theirs)

    def test_another_kind_of_class_is_called(self):
        class Other(dict):
            def __init__(self, *, one, two):
                super().__init__(both=(one, two))

        assert maker(Other, "one", "two")(1, 2) == {"both": (1, 2)}

    def test_tuples(self):
        for kind in PAIRS:
            mine = pair(kind, 10)[1]
            m, x = images()
            result = mine.step(m, 500, x, return_dict=False)
            assert type(result) is tuple
            assert len(result) == 2


def test_public_names():
    assert set(ours.__all__) >= {"DDIMScheduler", "DDPMScheduler"}
