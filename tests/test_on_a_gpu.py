"""Training and sampling on a GPU as a whole: beside the CPU, and an image alone beside the same one among others. And
which tests find a GPU at all.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

import conftest
import pytest
import torch
from plan_networks import ddpm_unet, rms_unet, unet
from test_trainer import mlp_trainer, pictures, unet_trainer

from ddpm_fast import Sampler, Schedule, Trainer, UNet

LINEAR = Schedule.linear(1000)
SHAPE = (3, 8, 8)
NETWORKS = {"UNet": unet, "DDPMUNet": ddpm_unet, "RMSNormUNet": rms_unet}


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.cpu() for name, value in trainer.state()[0].items() if value.is_floating_point()}


@pytest.mark.gpu
class TestTraining:
    def test_gives_the_weights_of_the_cpu(self):
        """Data, noise, timesteps and the optimiser's steps: all but the order of the sums in a product."""
        trainers = [mlp_trainer(device=device, accumulate=2) for device in ("cpu", "cuda")]
        for trainer in trainers:
            trainer.train()
        on_cpu, on_gpu = map(weights, trainers)
        assert next(trainers[1].model.parameters()).is_cuda
        assert on_cpu.keys() == on_gpu.keys()
        for name, value in on_cpu.items():
            torch.testing.assert_close(on_gpu[name], value, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("precision", [None, "bf16", "fp16"])
    def test_a_unet_learns(self, precision):
        torch.manual_seed(0)
        model = UNet(1, 16, width=16, depth=2, num_classes=3)
        trainer = Trainer(model, LINEAR, pictures(), device="cuda", images=2000, batch_size=20, precision=precision)
        losses = [trainer.step() for _ in range(100)]
        assert all(bool(value.isfinite().all()) for value in weights(trainer).values())
        assert sum(losses[-20:]) < 0.6 * sum(losses[:20])

    def test_a_run_that_is_cut_goes_on(self):
        whole = unet_trainer(device="cuda")
        whole.train()
        part = unet_trainer(device="cuda")
        part.train(16)
        following = unet_trainer(device="cuda")
        following.load_state(*part.state())
        following.train()
        assert following.images_seen == whole.images_seen
        assert following.state()[1] == whole.state()[1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NETWORKS)
class TestSampling:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("fused", [False, True], ids=["module", "fused"])
    def test_an_image_alone_has_the_bits_of_the_same_one_among_others(self, name, fused, dtype):
        net = NETWORKS[name]().cuda()
        if not fused:
            net = net.to(dtype)
        sampler = Sampler(net, LINEAR, steps=6, clip=1.0, fused=fused, dtype=dtype, deterministic=True, chunk=4)
        among = sampler.sample(9, SHAPE, seed=3)
        for i in (0, 3, 5, 8):
            assert torch.equal(sampler.sample(1, SHAPE, seed=3, first_sample=i)[0], among[i])
        again = Sampler(net, LINEAR, steps=6, clip=1.0, fused=fused, dtype=dtype, deterministic=True, chunk=4)
        assert torch.equal(again.sample(9, SHAPE, seed=3), among)

    def test_images_are_those_of_the_cpu(self, name):
        net = NETWORKS[name]()
        options = {"steps": 6, "clip": 1.0}
        on_cpu = Sampler(net, LINEAR, **options).sample(3, SHAPE, seed=2)
        net = net.cuda()
        for fused in (False, True):
            got = Sampler(net, LINEAR, fused=fused, **options).sample(3, SHAPE, seed=2).cpu()
            assert float((got - on_cpu).norm() / on_cpu.norm()) < 1e-3
        bf16 = Sampler(net, LINEAR, fused=True, dtype=torch.bfloat16, **options).sample(3, SHAPE, seed=2).cpu()
        assert float((bf16 - on_cpu).norm() / on_cpu.norm()) < 0.2


def test_this_test_finds_no_gpu():
    """Though there may be one."""
    assert not torch.cuda.is_available()


@pytest.mark.gpu
def test_this_one_finds_it():
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() > 0


def test_a_gpu_is_hidden_and_shown_again(monkeypatch):
    monkeypatch.setattr(conftest, "_REAL", {"is_available": lambda: True, "device_count": lambda: 2})
    for name in ("is_available", "device_count"):
        monkeypatch.setattr(torch.cuda, name, None)
    for visible in (None, "1"):
        monkeypatch.setattr(conftest, "_VISIBLE", visible)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        conftest.show_gpu(True)
        assert (torch.cuda.is_available(), torch.cuda.device_count()) == (True, 2)
        assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
        conftest.show_gpu(False)
        assert (torch.cuda.is_available(), torch.cuda.device_count()) == (False, 0)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_modules_that_use_the_gpu_where_there_is_one_are_marked():
    marked = []

    def item(device):
        return SimpleNamespace(module=SimpleNamespace(DEVICE=device), add_marker=lambda mark: marked.append(device))

    devices = [torch.device("cpu"), torch.device("cuda"), "cuda", torch.device("cuda", 0)]
    conftest.pytest_collection_modifyitems([item(device) for device in devices])
    assert marked == [torch.device("cuda"), torch.device("cuda", 0)]
