"""What a Trainer says to arguments that cannot be served: one line, before anything is changed or written."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ddpm_fast import DDPMUNet, Schedule, Trainer, UNet
from ddpm_fast.training.settings import Settings

SCHEDULE = Schedule.linear(10)
IMAGES = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 1])


class Echo(nn.Module):
    """A network that is as small as it can be; `shape` is of what it returns."""

    def __init__(self, shape: tuple[int, ...] | None = None, **attributes: object):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.shape = shape
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x, t, labels=None):
        return x * self.weight if self.shape is None else torch.zeros(self.shape) * self.weight


def frozen() -> nn.Module:
    return Echo().requires_grad_(False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prediction": "noise"}, ValueError, "prediction must be one of 'eps', 'x0', 'v', got 'noise'"),
        ({"loss": "mae"}, ValueError, "loss must be one of 'mse', 'l1', 'huber', got 'mae'"),
        ({"weighting": "snr"}, ValueError, "weighting must be one of None, 'min-snr', 'p2', got 'snr'"),
        ({"lr_schedule": "linear"}, ValueError, "lr_schedule must be one of 'constant', 'cosine', got 'linear'"),
        ({"precision": "half"}, ValueError, "precision must be one of None, 'bf16', 'fp16', got 'half'"),
        ({"precision": "fp16", "device": "cpu"}, ValueError, "fp16 trains on CUDA devices only"),
        ({"images": 0}, ValueError, "images must be at least 1, got 0"),
        ({"images": 1e6}, TypeError, "images must be a whole number, got 1000000.0"),
        ({"batch_size": True}, TypeError, "batch_size must be a whole number, got True"),
        ({"warmup": -1}, ValueError, "warmup must be at least 0, got -1"),
        ({"workers": -1}, ValueError, "workers must be at least 0, got -1"),
        ({"save_every": 0}, ValueError, "save_every must be at least 1, got 0"),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
        ({"lr": 0}, ValueError, "lr must be a finite number > 0, got 0"),
        ({"lr": math.nan}, ValueError, "lr must be a finite number > 0, got nan"),
        ({"lr": "1e-4"}, TypeError, "lr must be a number, got '1e-4'"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be a finite number >= 0, got -1.0"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be a finite number > 0, got 0"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be two numbers in [0, 1), as (0.9, 0.999), got (0.9, 1.0)"),
        ({"betas": 0.9}, ValueError, "betas must be two numbers in [0, 1), as (0.9, 0.999), got 0.9"),
        ({"ema": 1.5}, ValueError, "ema must be in 0..1, got 1.5"),
        ({"label_dropout": -0.1}, ValueError, "label_dropout must be in 0..1, got -0.1"),
        ({"self_condition": "yes"}, TypeError, "self_condition must be True or False, got 'yes'"),
        ({"flip": 1}, TypeError, "flip must be True or False, got 1"),
        ({"seed": -1}, ValueError, "seed must be an integer in [0, 2**64), got -1"),
        (
            {"batch_size": 100, "accumulate": 3},
            ValueError,
            "batch_size must be a multiple of accumulate=3, got 100; take 99 or 102",
        ),
        ({"label_dropout": 0.1}, ValueError, "label_dropout is for class-conditional models"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_settings(options, error, message, tmp_path):
    with pytest.raises(error) as caught:
        Trainer(Echo(), SCHEDULE, IMAGES, out=tmp_path / "run", **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (lambda: UNet(1, 8, width=4, depth=1, num_classes=3), IMAGES, {}, "model is class-conditional (3 classes)"),
        (lambda: UNet(1, 8, width=4, depth=1, num_classes=2), (IMAGES, LABELS), {}, "data has 3 classes, and model"),
        (
            lambda: DDPMUNet(
                in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=3,
            ),
            (IMAGES, LABELS),
            {"label_dropout": 0.1},
            "label_dropout needs a label that means none",
        ),
        (Echo, torch.zeros(4, 2), {"flip": True}, "flip mirrors images (C, H, W), and data has shape (2,)"),
        (frozen, IMAGES, {}, "model has no parameters that require grad"),
        (lambda: UNet(1, 8, width=4, depth=4), IMAGES, {}, "height and width of x must be multiples of 16"),
        (lambda: UNet(3, 8, width=4, depth=1), IMAGES, {}, "x must have shape (N, 3, H, W), got (1, 1, 8, 8)"),
        (lambda: Echo((1, 2, 8, 8)), IMAGES, {}, "the model must return shape (1, 1, 8, 8), like its input"),
        (Echo, torch.zeros(0, 1, 8, 8), {}, "images"),
    ],
)  # fmt: skip
def test_models_and_data_that_do_not_fit(model, data, options, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        Trainer(model(), SCHEDULE, data, out=tmp_path / "run", batch_size=4, device="cpu", **options)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "run").exists()


def test_other_things_than_models_and_schedules():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        Trainer(lambda x, t: x, SCHEDULE, IMAGES)
    with pytest.raises(TypeError, match=r"schedule must be a ddpm_fast\.Schedule, got int"):
        Trainer(Echo(), 1000, IMAGES)
    with pytest.raises(TypeError, match="data must be"):
        Trainer(Echo(), SCHEDULE, 3)
    with pytest.raises(ValueError, match="zero terminal SNR cannot be sampled with prediction"):
        Trainer(Echo(), SCHEDULE.rescale_zero_terminal_snr(), IMAGES)


def test_a_model_is_left_in_its_mode_by_a_look_at_it():
    model = UNet(1, 8, width=4, depth=1)
    before = model.down1.norm1.running_mean.clone()
    Trainer(model, SCHEDULE, IMAGES, batch_size=4)
    assert model.training
    assert torch.equal(model.down1.norm1.running_mean, before)


def test_an_optimizer_whose_state_no_file_can_hold():
    class Odd(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            self.state[self.param_groups[0]["params"][0]]["odd"] = object()

    trainer = Trainer(Echo(), SCHEDULE, IMAGES, batch_size=4, optimizer=lambda p: Odd(p, lr=0.1))
    trainer.step()
    with pytest.raises(TypeError, match="tensors, numbers and names; its state odd is a object"):
        trainer.state()


def test_another_optimizers_state():
    adam = Trainer(Echo(), SCHEDULE, IMAGES, batch_size=4)
    sgd = Trainer(Echo(), SCHEDULE, IMAGES, batch_size=4, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    with pytest.raises(ValueError, match="the optimizer is SGD, the state is AdamW's"):
        sgd.load_state(*adam.state())


def test_what_decides_the_result():
    deciding = Settings().deciding()
    assert deciding["betas"] == [0.9, 0.999]
    assert not {"images", "save_every", "keep", "resume", "workers", "accumulate"} & set(deciding)
    assert {"seed", "batch_size", "prediction", "lr", "ema", "precision", "flip"} <= set(deciding)
    assert "images" in Settings(lr_schedule="cosine").deciding()
