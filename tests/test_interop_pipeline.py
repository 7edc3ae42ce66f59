"""diffusers' own pipelines, unchanged, with our scheduler and our network in every combination: the same images.

The network is trained for a moment, so that its trajectories end in pictures and not in what noise is amplified to.
"""

import copy
import itertools
import json
import pickle
from collections.abc import Iterator

import pytest

pytest.importorskip("diffusers", reason="pip install 'ddpm_fast[diffusers]'")
pytest.importorskip("sklearn", reason="pip install 'ddpm_fast[demo]'")

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits

import ddpm_fast
from ddpm_fast import inference
from ddpm_fast.interop.diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel, from_diffusers, to_diffusers

CONFIG = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "block_out_channels": (32,),
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 8,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Layers this small gain nothing from a second thread and wait for it where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained() -> diffusers.UNet2DModel:
    """diffusers' network after 120 steps on 8x8 digits."""
    torch.manual_seed(0)
    digits = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    unet, scheduler = diffusers.UNet2DModel(**CONFIG), diffusers.DDPMScheduler()
    optimizer = torch.optim.Adam(unet.parameters(), 3e-3)
    losses = []
    for _ in range(120):
        x0 = digits[torch.randint(len(digits), (32,))]
        noise, t = torch.randn_like(x0), torch.randint(1000, (32,))
        loss = F.mse_loss(unet(scheduler.add_noise(x0, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.3  # it has learned something: untrained it is 1
    return unet.eval()


def ours(unet: diffusers.UNet2DModel) -> UNet2DModel:
    mine = UNet2DModel(**CONFIG)
    mine.load_state_dict(unet.state_dict())
    return mine.eval()


def run(unet, scheduler, steps: int, generator=None, n: int = 2, **options) -> torch.Tensor:
    """What the pipeline gives, before rounding: in [0, 1]."""
    pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = generator or torch.Generator().manual_seed(1)
    return pipeline(n, generator, steps, output_type="pt", **options).images


def assert_same_images(got: torch.Tensor, want: torch.Tensor) -> None:
    """At most 1 level of 255 apart, and 2e-3 on the model's scale of 2, which is 1e-3 on [0, 1]."""
    assert want.std() > 0.1
    assert (got - want).abs().max() <= 1e-3
    levels = [(images * 255).round().to(torch.int64) for images in (got, want)]
    assert (levels[0] - levels[1]).abs().max() <= 1


@pytest.fixture(scope="module")
def a_thousand_of_theirs(trained) -> torch.Tensor:
    return run(trained, diffusers.DDPMScheduler(variance_type="fixed_large"), 1000)


class TestTrajectories:
    @pytest.mark.parametrize("our_unet", [False, True])
    def test_a_thousand_ddpm_steps(self, trained, a_thousand_of_theirs, our_unet):
        scheduler = DDPMScheduler(variance_type="fixed_large")
        assert_same_images(run(ours(trained) if our_unet else trained, scheduler, 1000), a_thousand_of_theirs)

    @pytest.mark.parametrize(("our_unet", "our_scheduler"), [(False, True), (True, False), (True, True)])
    def test_fifty_ddim_steps(self, trained, our_unet, our_scheduler):
        want = run(trained, diffusers.DDIMScheduler(), 50)
        scheduler = DDIMScheduler() if our_scheduler else diffusers.DDIMScheduler()
        assert_same_images(run(ours(trained) if our_unet else trained, scheduler, 50), want)

    def test_the_sampler_of_a_saved_folder(self, trained, a_thousand_of_theirs, tmp_path):
        """As it comes, with a fused plan: a thousand DDPM steps, and fifty of DDIM by asking for them."""
        scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
        diffusers.DDPMPipeline(unet=trained, scheduler=scheduler).save_pretrained(tmp_path)
        fifty_of_theirs = run(trained, diffusers.DDIMScheduler(), 50)
        for want, asked in ((a_thousand_of_theirs, {}), (fifty_of_theirs, {"method": "ddim", "steps": 50})):
            sampler = ddpm_fast.Sampler.from_pretrained(tmp_path, **asked)
            assert sampler.fused
            assert_same_images(sampler.sample(2, generator=torch.Generator().manual_seed(1)), want)

    def test_the_ddim_pipeline(self, trained):
        results = []
        for scheduler in (diffusers.DDIMScheduler(), DDIMScheduler()):
            pipeline = diffusers.DDIMPipeline(trained, scheduler)
            pipeline.scheduler = scheduler  # its constructor makes one of diffusers' own from the config
            pipeline.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(2)
            images = pipeline(2, generator, eta=0.7, num_inference_steps=50, output_type="np").images
            results.append(torch.from_numpy(images))
        assert_same_images(*results)

    @pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
    @pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
    def test_fewer_steps_a_list_of_generators_and_pictures(self, trained, spacing, variance_type):
        options = {"timestep_spacing": spacing, "variance_type": variance_type}
        pictures = []
        for cls in (diffusers.DDPMScheduler, DDPMScheduler):
            pipeline = diffusers.DDPMPipeline(trained, cls(**options))
            pipeline.set_progress_bar_config(disable=True)
            generators = [torch.Generator().manual_seed(i) for i in range(3)]
            pictures.append(pipeline(3, generators, 20).images)
        for a, b in zip(*pictures, strict=True):
            assert a.mode == b.mode
            assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1

    def test_compat_is_bit_for_bit(self, trained):
        want = run(trained, diffusers.DDPMScheduler(), 20)
        assert torch.equal(run(trained, DDPMScheduler(compat=True), 20), want)

    def test_a_seeded_image_does_not_depend_on_its_batch(self, trained):
        """The pipeline draws x_T from its generators; all later noise is keyed by the image."""
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        pipeline = diffusers.DDPMPipeline(trained, DDPMScheduler(seed=5))
        pipeline.set_progress_bar_config(disable=True)
        with pytest.raises(ValueError, match="generator must be None"):
            pipeline(3, generators, 10)
        x = torch.cat([torch.randn(1, 1, 8, 8, generator=generator) for generator in generators])

        def sample(first: int, last: int) -> torch.Tensor:
            scheduler, state = DDPMScheduler(seed=5), x[first:last]
            scheduler.set_timesteps(10)
            scheduler.first_sample = first
            for t in scheduler.timesteps:
                with torch.no_grad():
                    state = scheduler.step(trained(state, t).sample, t, state).prev_sample
            return state

        whole = sample(0, 3)
        for i in range(3):
            assert (sample(i, i + 1) - whole[i]).abs().max() < 1e-4  # the network's own dependence on the batch


class TestFolders:
    def test_a_saved_pipeline_is_as_theirs(self, trained, tmp_path):
        """Loads anywhere, with diffusers' classes; ours are passed in to be used again."""
        mine = diffusers.DDPMPipeline(unet=ours(trained), scheduler=DDPMScheduler(beta_end=0.03))
        theirs = diffusers.DDPMPipeline(unet=trained, scheduler=diffusers.DDPMScheduler(beta_end=0.03))
        mine.save_pretrained(tmp_path / "mine")
        theirs.save_pretrained(tmp_path / "theirs")
        for name in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json"):
            texts = [json.loads((tmp_path / who / name).read_text()) for who in ("mine", "theirs")]
            assert texts[0] == texts[1]
        weights = "unet/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "mine" / weights).read_bytes() == (tmp_path / "theirs" / weights).read_bytes()
        again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "mine")
        assert type(again.unet) is diffusers.UNet2DModel
        assert again.scheduler.config.beta_end == 0.03
        used = diffusers.DDPMPipeline.from_pretrained(
            tmp_path / "theirs",
            unet=UNet2DModel.from_pretrained(tmp_path / "theirs", subfolder="unet"),
            scheduler=DDPMScheduler.from_pretrained(tmp_path / "theirs", subfolder="scheduler"),
        )
        assert (type(used.unet), type(used.scheduler)) == (UNet2DModel, DDPMScheduler)
        results = [run(pipeline.unet, pipeline.scheduler, 10) for pipeline in (again, used, theirs)]
        assert_same_images(results[1], results[0])
        assert torch.equal(results[0], results[2])

    @pytest.mark.parametrize("safe", [True, False])
    def test_networks_go_both_ways_bit_for_bit(self, trained, tmp_path, safe):
        mine = ours(trained)
        mine.save_pretrained(tmp_path / "mine", safe_serialization=safe)
        trained.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
        for cls, folder in itertools.product((UNet2DModel, diffusers.UNet2DModel), ("mine", "theirs")):
            loaded = cls.from_pretrained(tmp_path / folder)
            assert not loaded.training
            for key, value in trained.state_dict().items():
                assert torch.equal(loaded.state_dict()[key], value)
        half = UNet2DModel.from_pretrained(tmp_path / "theirs", torch_dtype=torch.bfloat16)
        assert half.dtype == torch.bfloat16

    def test_old_attention_names(self, trained, tmp_path):
        from ddpm_fast.interop._unets import old_keys

        trained.save_pretrained(tmp_path, safe_serialization=False)
        torch.save(old_keys(trained.state_dict()), tmp_path / "diffusion_pytorch_model.bin")
        assert any("query" in key for key in old_keys(trained.state_dict()))
        loaded = UNet2DModel.from_pretrained(tmp_path, use_safetensors=False)
        for key, value in trained.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)


class TestNetwork:
    def test_is_one_of_theirs(self, trained):
        mine = ours(trained)
        assert isinstance(mine, diffusers.UNet2DModel)
        theirs = diffusers.UNet2DModel(**CONFIG)
        assert {**mine.config, "_use_default_values": 0} == {**theirs.config, "_use_default_values": 0}
        assert mine.config.sample_size == 8
        assert UNet2DModel.from_config(trained.config).config.block_out_channels == (32,)
        assert list(mine.state_dict()) == list(trained.state_dict())
        torch.manual_seed(0)
        fresh = UNet2DModel(**CONFIG)
        torch.manual_seed(0)
        assert all(map(torch.equal, fresh.state_dict().values(), diffusers.UNet2DModel(**CONFIG).state_dict().values()))

    def test_calls_are_theirs(self, trained):
        mine = ours(trained)
        x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for t in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor([1, 500, 999])):
                got, want = mine(x, t), trained(x, t)
                assert type(got) is type(want)
                assert (got.sample - want.sample).abs().max() <= 2e-5 * want.sample.abs().max()
                assert torch.equal(mine(x, t, return_dict=False)[0], got.sample)
        with pytest.raises(ValueError, match="label"):
            mine(x, 7, torch.tensor([1, 2, 3]))
        labelled = UNet2DModel(**CONFIG, num_class_embeds=4)
        assert labelled(x, 7, class_labels=torch.tensor([0, 1, 3])).sample.shape == x.shape
        with pytest.raises(ValueError, match="label"):
            labelled(x, 7)

    def test_defaults_are_theirs(self):
        with torch.device("meta"):
            mine, theirs = UNet2DModel(), diffusers.UNet2DModel()
        assert [(k, v.shape) for k, v in mine.state_dict().items()] == [
            (k, v.shape) for k, v in theirs.state_dict().items()
        ]

    def test_blocks_that_are_not_covered(self):
        blocks = {"down_block_types": ("SkipDownBlock2D",)}
        with pytest.raises(ValueError, match="SkipDownBlock2D"):
            UNet2DModel(**{**CONFIG, **blocks})

    def test_conversions(self, trained):
        mine = ours(trained)
        x = torch.randn(1, 1, 8, 8)
        with torch.no_grad():
            want = mine(x, 5).sample
            assert torch.equal(from_diffusers(mine)(x, 5), want)
            assert (to_diffusers(mine)(x, 5).sample - want).abs().max() < 1e-4
            for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
                assert torch.equal(other(x, 5).sample, want)

    def test_fused(self, trained):
        mine = ours(trained)
        x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(300)
        if not inference.knows(from_diffusers(mine)):
            with pytest.raises(TypeError, match="no fused plan"):
                mine.enable_fused()
            return
        want = mine(x, t).sample.detach()
        mine.enable_fused()
        with torch.no_grad():
            got = mine(x, t).sample
            assert got.dtype == x.dtype
            assert (got - want).abs().max() <= 2e-5 * want.abs().max()
            mine.conv_out.bias += 1.0  # a plan sees that weights change
            assert (mine(x, t).sample - want - 1).abs().max() <= 1e-4
            assert (copy.deepcopy(mine)(x, t).sample - want - 1).abs().max() <= 1e-4
        assert mine(x, t).sample.requires_grad
        mine.train()
        with torch.no_grad():
            mine(x, t)
        mine.eval().disable_fused()
        with torch.no_grad():
            assert (mine(x, t).sample - want - 1).abs().max() <= 1e-4
