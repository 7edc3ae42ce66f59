"""What stops lucidrains' Trainer and what does not: bad losses, interrupts, its FID, bad arguments."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import signal
import sys
import time
import types
import warnings

import numpy as np
import pytest
import torch
from trainer_models import SIZE, Diffusion, fixed_batches, pictures, small_diffusion, train

from ddpm_fast.interop.lucidrains import Trainer

Image = pytest.importorskip("PIL.Image", reason="pip install 'ddpm_fast[images]'")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:train_batch_size x")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), 104)


@pytest.fixture
def ours(images, tmp_path):
    """(diffusion, **options) -> our Trainer."""

    def make(diffusion, folder=images, **options):
        defaults = {"results_folder": tmp_path, "gradient_accumulate_every": 4, "num_samples": 4}
        return Trainer(diffusion, folder, **{**defaults, "train_batch_size": 4, **options})

    return make


# -- what stops it -----------------------------------------------------------------------------------------------------


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, loss):
        return loss.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * math.inf


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss: loss * math.nan, "training stopped at step 3: the loss is nan; the weights are those of step 2"),
        (lambda loss: loss * math.inf, "training stopped at step 3: the loss is inf"),
        (BadGradient.apply, "training stopped at step 3: the gradient's norm is (inf|nan)"),
    ],
    ids=["nan", "inf", "gradient"],
)
def test_a_loss_that_is_not_finite_stops_it(ours, tmp_path, spoil, message):
    clean, spoilt = ours(Diffusion()), ours(Diffusion({6: spoil}), gradient_accumulate_every=2, save_and_sample_every=1)
    clean = ours(Diffusion(), gradient_accumulate_every=2)
    train(clean, 2, fixed_batches(4))
    with pytest.raises(FloatingPointError, match=f"{message}.*the last checkpoint is .*model-2.pt"):
        train(spoilt, 5, fixed_batches(10))
    assert spoilt.step == 2
    assert torch.equal(spoilt.model.weight, clean.model.weight)
    assert spoilt.model.weight.grad is None
    train(spoilt, 4, fixed_batches(4))
    assert spoilt.step == 4


def interrupt(loss):
    """Ctrl-C reaches the processes that read images, too; often, as they may have been born with a patient handler."""
    for child in 3 * multiprocessing.active_children():
        os.kill(child.pid, signal.SIGINT)
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)
    return loss


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupt_ends_the_step_and_training_goes_on(ours, workers):
    trainer = ours(Diffusion({2: interrupt}), gradient_accumulate_every=2, num_workers=workers)
    with pytest.raises(KeyboardInterrupt):
        train(trainer, 4)
    assert trainer.step == 1
    assert trainer.model.calls == 2
    assert int(trainer.ema.step) == 1
    assert trainer.opt.state[trainer.model.weight]["step"] == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(trainer, 4)
    assert trainer.step == 4


def test_a_second_interrupt_is_at_once(ours):
    def twice(loss):
        interrupt(loss)
        interrupt(loss)
        raise AssertionError("not reached")

    trainer = ours(Diffusion({3: twice}))
    with pytest.raises(KeyboardInterrupt):
        train(trainer, 4)
    assert trainer.step == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_tqdm(ours, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    trainer = ours(Diffusion())
    train(trainer, 2)
    assert trainer.step == 2


# -- FID ---------------------------------------------------------------------------------------------------------------


def test_fid_with_features_of_ones_own(ours, tmp_path, images, capsys):
    """Features are the channels' means: the constant images come closer to the pictures' mean, then are pushed away."""
    shapes = []

    def features(batch):
        shapes.append(tuple(batch.shape))
        return batch.mean(dim=(2, 3))

    away = {call: (lambda loss: -loss) for call in range(5, 9)}
    trainer = ours(
        Diffusion(away), gradient_accumulate_every=1, train_lr=0.2, save_and_sample_every=2, ema_update_every=1,
        calculate_fid=True, num_fid_samples=10, save_best_and_latest_only=True, fid_features=features,
    )  # fmt: skip
    assert "every 2 steps 10 samples of 50 network steps each are drawn; DDIM sampling" in capsys.readouterr().out
    train(trainer, 4)
    trainer.best_fid = math.inf
    trainer.load("latest")
    assert trainer.best_fid < math.inf, "what a resumed run has to beat is in the file"
    train(trainer, 8)
    assert sum(shape[0] for shape in shapes) == 10 + 4 * 10  # the folder's once
    scores = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line.startswith("fid_score")]
    assert scores[1] < scores[0]
    assert scores[1] < scores[3]
    assert not (tmp_path / "model-1.pt").exists()
    best, latest = (torch.load(tmp_path / f"model-{name}.pt", weights_only=True) for name in ("best", "latest"))
    assert (best["step"], latest["step"]) == (2 * (1 + int(np.argmin(scores))), 8)
    assert best["best_fid"] == latest["best_fid"] == min(scores)
    # Constant images have no spread: the distance is that of the means, and the spread of the ten pictures.
    chosen = torch.randperm(104, generator=torch.Generator().manual_seed(0))[:10].tolist()
    real = torch.stack([trainer.fid_scorer.images[i] for i in chosen]).mean(dim=(2, 3)).double().numpy()
    drawn = trainer.ema.ema_model.weight.double().numpy()
    expected = ((drawn - real.mean(0)) ** 2).sum() + np.cov(real, rowvar=False).trace()
    assert scores[3] == pytest.approx(expected, rel=1e-6)


def test_fid_of_inception(ours, monkeypatch):
    class InceptionV3(torch.nn.Module):
        BLOCK_INDEX_BY_DIM = types.MappingProxyType({64: 0, 2048: 3})

        def __init__(self, blocks):
            super().__init__()
            assert blocks == [3]

        def forward(self, batch):
            assert batch.shape[1:] == (3, SIZE, SIZE)
            assert not self.training
            return [batch]

    monkeypatch.setitem(sys.modules, "pytorch_fid", types.ModuleType("pytorch_fid"))
    fake = types.ModuleType("pytorch_fid.inception")
    fake.InceptionV3 = InceptionV3
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", fake)
    trainer = ours(
        Diffusion(), calculate_fid=True, num_fid_samples=5, gradient_accumulate_every=1, save_and_sample_every=1
    )
    train(trainer, 1)
    assert math.isfinite(trainer.best_fid)
    with pytest.raises(ValueError, match="inception_block_idx must be one of 64, 2048, got 100"):
        ours(Diffusion(), calculate_fid=True, inception_block_idx=100)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 11}, "num_samples must be a square, got 11; near are 9 and 16"),
        ({"num_samples": 0}, "num_samples must be a positive integer, got 0"),
        ({"train_batch_size": 0}, "train_batch_size must be a positive integer, got 0"),
        ({"max_grad_norm": -1}, "max_grad_norm must be a positive number, math.inf for no limit, got -1"),
        ({"max_grad_norm": None}, "max_grad_norm must be a positive number, math.inf for no limit, got None"),
        ({"train_lr": -1e-4}, "Invalid learning rate: -0.0001"),
        ({"ema_decay": 2}, "beta must be in 0..1, got 2"),
        ({"num_workers": -1}, "num_workers option should be non-negative"),
        ({"train_num_steps": 1.5}, "train_num_steps must be a positive integer, got 1.5"),
        ({"train_batch_size": 105}, "holds 104 images, fewer than train_batch_size=105"),
        ({"amp": True}, "fp16 trains on CUDA devices only, and the model is on cpu; use bf16"),
        ({"amp": True, "mixed_precision_type": "fp8"}, "mixed precision must be fp16 or bf16, got 'fp8'"),
        ({"convert_image_to": "L"}, "convert_image_to='L' gives 1 channels, and the model has 3"),
        ({"save_best_and_latest_only": True}, "save_best_and_latest_only=True needs calculate_fid=True"),
        ({"calculate_fid": True, "num_fid_samples": 1, "fid_features": len}, "num_fid_samples must be at least 2"),
        ({"fit": "pad"}, "fit must be stretch or crop, got 'pad'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_bad_arguments(ours, tmp_path, options, message):
    with pytest.raises(ValueError) as error:
        ours(Diffusion(), **{"results_folder": tmp_path / "new", **options})
    assert message in str(error.value)
    assert not (tmp_path / "new").exists()


def test_the_real_check_for_squares_lets_others_pass(lucidrains):
    wrong = [
        n
        for n in range(1, 101)
        if lucidrains.denoising_diffusion_pytorch.has_int_squareroot(n) != (math.isqrt(n) ** 2 == n)
    ]
    assert wrong[:3] == [11, 14, 17]


def test_bad_models_and_folders(lucidrains, ours, tmp_path, monkeypatch):
    with pytest.raises(
        TypeError, match="must be a GaussianDiffusion or like it, got Linear, which lacks channels, image_"
    ):
        ours(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="image_size 9x8 must be divisible by 2, the network's downsample_factor"):
        ours(small_diffusion(lucidrains, image_size=(9, 8)))
    with pytest.raises(ValueError, match="images have 1, 3 or 4 channels, and the model's are 2"):
        ours(Diffusion(channels=2))
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        ours(Diffusion(), tmp_path / "absent")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"results_folder must be a folder, and .*file is a file"):
        ours(Diffusion(), results_folder=tmp_path / "file")
    with (
        pytest.raises(ImportError, match=r"calculate_fid needs pytorch_fid .*: pip install pytorch-fid"),
        without_fid(),
    ):
        ours(Diffusion(), calculate_fid=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process, and WORLD_SIZE is 2: start it by python alone"):
        ours(Diffusion())


@contextlib.contextmanager
def without_fid():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pytorch_fid.inception", None)
        yield


def test_whole_numbers_may_be_floats(ours):
    trainer = ours(Diffusion(), train_num_steps=1e5)
    assert (trainer.train_num_steps, type(trainer.train_num_steps)) == (100000, int)


def test_warnings(ours, tmp_path):
    few = pictures(tmp_path / "few", 20)
    with pytest.warns(UserWarning, match="holds only 20 images"):
        ours(Diffusion(), few)
    with pytest.warns(UserWarning, match="train_batch_size x gradient_accumulate_every is 8; 16"):
        ours(Diffusion(), gradient_accumulate_every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(Diffusion())
