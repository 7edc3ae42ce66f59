"""`Evaluate` on a tiny training: when it measures, what it says and writes, and that it disturbs nothing."""

from __future__ import annotations

import csv

import pytest
import torch

from ddpm_fast import Schedule, UNet
from ddpm_fast.metrics.features import pixels
from ddpm_fast.metrics.hooks import Evaluate
from ddpm_fast.training import TensorData, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = Schedule.linear(8, 0.02, 0.6)


def data(split):
    generator = torch.Generator().manual_seed(int(split == "test"))
    images = torch.randint(0, 256, (48, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return TensorData(images, torch.arange(48) % 2, name="noise")


def trainer(callbacks=()):
    torch.manual_seed(0)
    made = Trainer(UNet(1, 16, width=4, depth=1, num_classes=2), SCHEDULE, data("train"), images=128, batch_size=16)
    made.callbacks += callbacks
    return made


def test_it_measures_every_so_many_images(tmp_path):
    said = []
    hook = Evaluate(data, every=40, num=20, steps=4, metrics=("frechet", "kid"), features=pixels(), batch_size=8,
                    file=tmp_path / "eval.csv", say=said.append)  # fmt: skip
    watched, alone = trainer([hook]), trainer()
    watched.train()
    alone.train()
    for key, value in alone.model.state_dict().items():
        assert torch.equal(watched.model.state_dict()[key], value)
    assert list(hook.figures) == [48, 80, 128]
    assert "20 samples of 4 steps = 80 network passes" in said[0]
    assert "every 40 images (3 times" in said[0]
    assert "68 real images" in said[0]
    assert said[1].startswith("after 48 images: frechet ")
    assert "not comparable with published FID" in said[1]
    assert len(said) == 4
    with open(tmp_path / "eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["images_seen"]) for row in rows] == [48, 80, 128]
    assert float(rows[1]["frechet"]) == hook.figures[80]["frechet"]
    found = hook.figures[128]
    assert hook.evaluate(watched) == found  # the same noise, the same subsets
    # A run that goes on from image 80 measures what came after it again.
    resumed = Evaluate(data, every=40, num=20, steps=4, features=pixels(), file=tmp_path / "eval.csv", say=said.append)
    resumed._forget_after(80)
    with open(tmp_path / "eval.csv", newline="") as file:
        assert [int(row["images_seen"]) for row in csv.DictReader(file)] == [48, 80]


class Breaker:
    """After the first step nothing that the trainer's samplers draw is finite."""

    def on_step(self, trainer, report):
        if report.step == 1:
            sampler = type(trainer).sampler.__get__(trainer)
            trainer.sampler = lambda **options: broken(sampler(**options))


def broken(sampler):
    def sample(*arguments, **options):
        raise RuntimeError("a value of row 3 is not finite")

    sampler.sample = sample
    return sampler


def test_what_cannot_be_measured_ends_no_training():
    said = []
    hook = Evaluate(data, every=64, num=8, steps=4, features=pixels(), say=said.append)
    watched = trainer([Breaker(), hook])
    watched.train()
    assert watched.images_seen == 128
    assert said[1:] == [f"after {n} images: no evaluation, a value of row 3 is not finite" for n in (64, 128)]


def test_bad_input():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Evaluate(data, every=0)
    with pytest.raises(ValueError, match="metrics must be some of frechet, kid, precision-recall, got 'bits'"):
        Evaluate(data, every=1, metrics=("bits",), features=pixels()).cost(trainer())
