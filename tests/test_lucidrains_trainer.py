"""Trainer beside denoising_diffusion_pytorch's: the same steps, files that go both ways, and what theirs gets wrong."""

from __future__ import annotations

import contextlib
import inspect
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
from trainer_models import SIZE, fixed_batches, pictures, small_diffusion

from ddpm_fast.interop import lucidrains as interop
from ddpm_fast.interop.lucidrains import Trainer
from ddpm_fast.training import files

Image = pytest.importorskip("PIL.Image", reason="pip install 'ddpm_fast[images]'")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:train_batch_size x")]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("pictures"), 104)


@pytest.fixture
def real(lucidrains, images, tmp_path):
    """(diffusion, **options) -> the real Trainer."""
    import accelerate.state

    def make(diffusion, **options):
        accelerate.state.AcceleratorState._reset_state(True)
        defaults = {"calculate_fid": False, "results_folder": str(tmp_path), "gradient_accumulate_every": 4}
        return lucidrains.Trainer(diffusion, str(images), **{**defaults, "train_batch_size": 4, **options})

    return make


@pytest.fixture
def ours(images, tmp_path):
    """(diffusion, **options) -> our Trainer."""

    def make(diffusion, folder=images, **options):
        defaults = {"results_folder": tmp_path, "gradient_accumulate_every": 4, "num_samples": 4}
        return Trainer(diffusion, folder, **{**defaults, "train_batch_size": 4, **options})

    return make


def train(trainer, until, batches=None):
    """To step `until`, on the same batches and with the same noise whoever trains; the loss of every batch."""
    seen = []
    handle = trainer.model.register_forward_hook(lambda model, arguments, loss: seen.append(loss.item()))
    if batches is not None:
        trainer.dl = batches
    trainer.train_num_steps = until
    torch.manual_seed(3)
    trainer.train()
    handle.remove()
    return seen


def assert_same_state(found, expected, **tolerance):
    for key in ("model", "ema"):
        assert list(found[key]) == list(expected[key])
        for name, value in expected[key].items():
            torch.testing.assert_close(found[key][name], value, **tolerance, msg=lambda text, at=name: f"{at}: {text}")
    for index, state in expected["opt"]["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(found["opt"]["state"][index][name], value, **tolerance)


# -- beside the real one -----------------------------------------------------------------------------------------------


def test_the_signature_is_the_real_ones(lucidrains):
    theirs = inspect.signature(lucidrains.Trainer).parameters
    parameters = inspect.signature(Trainer).parameters
    assert list(parameters)[: len(theirs)] == list(theirs)
    different = {
        name
        for name, one in theirs.items()
        if (one.kind, one.default) != (parameters[name].kind, parameters[name].default)
    }
    assert different == {"calculate_fid"}
    assert parameters["calculate_fid"].default is False
    assert all(one.default is not one.empty for name, one in parameters.items() if name not in theirs)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
def test_steps_are_the_real_ones(lucidrains, real, ours, amp):
    options = {
        "train_lr": 1e-3,
        "max_grad_norm": 0.05,
        "ema_update_every": 2,
        "amp": amp,
        "mixed_precision_type": "bf16",
    }
    losses, states = [], []
    for make in (real, ours):
        trainer = make(small_diffusion(lucidrains), **options)
        losses.append(train(trainer, 5, fixed_batches(20)))
        states.append(
            {"model": trainer.model.state_dict(), "ema": trainer.ema.state_dict(), "opt": trainer.opt.state_dict()}
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert len(set(losses[0])) == 20
    assert_same_state(states[1], states[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bf16"])
def test_the_whole_of_ours_trains_as_the_whole_of_theirs(lucidrains, real, ours, amp):
    """Unet, GaussianDiffusion and Trainer, from one seed."""
    losses, states = [], []
    for make, package in ((real, lucidrains), (ours, interop)):
        diffusion = small_diffusion(package, offset_noise_strength=0.1, min_snr_loss_weight=True)
        trainer = make(diffusion, train_lr=1e-3, amp=amp, mixed_precision_type="bf16")
        losses.append(train(trainer, 5, fixed_batches(20)))
        states.append(
            {"model": trainer.model.state_dict(), "ema": trainer.ema.state_dict(), "opt": trainer.opt.state_dict()}
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-2 if amp else 1e-5)
    # Adam divides each gradient by its size: where that is rounding, so is its direction, by up to lr a step.
    tolerance = {"rtol": 0.0, "atol": 5e-3} if amp else {"rtol": 1e-3, "atol": 1e-4}
    assert_same_state({**states[1], "opt": {"state": {}}}, {**states[0], "opt": {"state": {}}}, **tolerance)


def test_the_loss_scale_of_fp16_is_saved(ours, monkeypatch):
    """Tried on the CPU, where GradScaler runs, too."""
    for module in ("ddpm_fast.interop._lucidrains_trainer", "ddpm_fast.training.loop"):
        monkeypatch.setattr(f"{module}.check_precision", lambda precision, device: None)
    trainer, other = ours(Diffusion(), amp=True), ours(Diffusion(), amp=True)
    trainer._loop.scaler.load_state_dict({**trainer._loop.scaler.state_dict(), "scale": 64.0, "_growth_tracker": 7})
    train(trainer, 1, fixed_batches(4))
    trainer.save(1)
    other.load(1)
    assert other._loop.scaler.state_dict() == trainer._loop.scaler.state_dict()
    assert (other._loop.scaler.get_scale(), other._loop.scaler.state_dict()["_growth_tracker"]) == (64.0, 8)


@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_checkpoints_go_both_ways(lucidrains, real, ours, tmp_path, direction):
    """Training goes on from the other's file as it would have gone on by itself."""
    first, second = (real, ours) if direction == "theirs to ours" else (ours, real)
    writer = first(small_diffusion(lucidrains), train_lr=3e-4)
    train(writer, 3, fixed_batches(12))
    writer.save(7)
    reader = second(small_diffusion(lucidrains, seed=1), train_lr=1.0)
    reader.load(7)
    assert reader.step == 3
    assert reader.opt.param_groups[0]["lr"] == 3e-4
    for trainer in (writer, reader):
        train(trainer, 5, fixed_batches(8))
        trainer.save("end" if trainer is writer else "other")
    end, other = (torch.load(tmp_path / f"model-{name}.pt", weights_only=True) for name in ("end", "other"))
    assert set(end) == set(other) == {"step", "model", "opt", "ema", "scaler", "version"}
    assert_same_state(other, end, rtol=1e-5, atol=1e-6)


def test_on_a_folder_from_end_to_end(lucidrains, ours, tmp_path, capsys):
    trainer = ours(small_diffusion(lucidrains), train_num_steps=4, save_and_sample_every=2, train_batch_size=3)
    trainer.train()
    assert "training complete" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-1.pt",
        "model-2.pt",
        "sample-1.png",
        "sample-2.png",
    ]
    picture = np.array(Image.open(tmp_path / "sample-2.png"))
    assert picture.shape == (2 * SIZE + 6, 2 * SIZE + 6, 3)
    assert (picture[:2] == 0).all()
    assert picture[2:-2, 2:-2].std() > 10
    trainer.load(1)
    assert trainer.step == 2
    trainer.train()
    assert trainer.step == 4


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_images_and_images_with_alpha(lucidrains, ours, tmp_path, channels):
    trainer = ours(small_diffusion(lucidrains, channels=channels), train_num_steps=1, save_and_sample_every=1)
    assert trainer.ds[0].shape == (channels, SIZE, SIZE)
    trainer.train()
    assert np.array(Image.open(tmp_path / "sample-1.png")).shape == (2 * SIZE + 6, 2 * SIZE + 6, 3)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_uninterrupted_one(lucidrains, ours):
    whole = ours(small_diffusion(lucidrains))
    train(whole, 3, fixed_batches(12))
    whole.save("middle")
    train(whole, 6, fixed_batches(12))
    resumed = ours(small_diffusion(lucidrains, seed=5))
    resumed.load("middle")
    train(resumed, 6, fixed_batches(12))
    for key, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[key])
    assert int(resumed.ema.step) == 6


def test_a_failed_save_leaves_the_old_file(lucidrains, ours, tmp_path, monkeypatch):
    trainer = ours(small_diffusion(lucidrains))
    trainer.save(1)
    before = (tmp_path / "model-1.pt").read_bytes()

    def half(content, file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(files.torch, "save", half)
    with pytest.raises(OSError, match="no space left"):
        trainer.save(1)
    assert (tmp_path / "model-1.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model-1.pt"]


def write(content):
    return lambda path: torch.save(content, path)


class Code:
    """What a file may not make us run."""

    def __reduce__(self):
        return os.mkdir, ("should-not-exist",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"rubbish"), "model-9.pt is cut off or no checkpoint"),
        (lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)), "model-9.pt is cut off or no checkpoint"),
        (write(Code()), "model-9.pt is cut off or no checkpoint"),
        (write({"state_dict": {}}), "is not a Trainer's checkpoint: expected step, model, opt, ema, got state_dict"),
        (write([1]), "is not a Trainer's checkpoint: expected step, model, opt, ema, got list"),
    ],
    ids=["rubbish", "rubbish in a zip", "code", "another dict", "a list"],
)
def test_foreign_files(lucidrains, ours, tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    trainer = ours(small_diffusion(lucidrains))
    make(tmp_path / "model-9.pt")
    with pytest.raises(ValueError) as error:
        trainer.load(9)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "should-not-exist").exists()


@pytest.mark.parametrize(
    ("part", "value"),
    [("step", "ten"), ("step", None), ("step", -1), ("opt", None), ("opt", [1]), ("opt", {}), ("ema", None)],
)
def test_a_spoiled_part_leaves_the_trainer_as_it_was(lucidrains, ours, tmp_path, part, value):
    ours(small_diffusion(lucidrains, seed=1)).save(1)
    content = torch.load(tmp_path / "model-1.pt", weights_only=True)
    trainer = ours(small_diffusion(lucidrains))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    torch.save({**content, part: value}, tmp_path / "model-2.pt")
    with pytest.raises(ValueError, match=rf"model-2\.pt: {part} ") as error:
        trainer.load(2)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())


def test_a_missing_file_and_another_models_file(lucidrains, ours):
    trainer = ours(small_diffusion(lucidrains))
    with pytest.raises(FileNotFoundError, match=r"no .*model-3\.pt; there are: none"):
        trainer.load(3)
    trainer.save(1)
    other = ours(small_diffusion(lucidrains, channels=1))
    before = {key: value.clone() for key, value in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"model-1\.pt: model is of another model: model\.init_conv\.weight has shape"):
        other.load(1)
    assert all(torch.equal(value, before[key]) for key, value in other.model.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"there are: model-1\.pt"):
        trainer.load("best")


# -- what stops it -----------------------------------------------------------------------------------------------------


class Diffusion(torch.nn.Module):
    """The least that Trainer asks for; `at` maps calls of forward to what happens there."""

    def __init__(self, at=None, channels=3):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.channels, self.image_size, self.is_ddim_sampling, self.num_timesteps = channels, SIZE, False, 50
        self.at, self.calls = at or {}, 0

    def forward(self, images):
        assert self.training
        self.calls += 1
        loss = ((images.mean(dim=(0, 2, 3)) - self.weight) ** 2).mean()
        return self.at[self.calls](loss) if self.calls in self.at else loss

    def sample(self, batch_size):
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.weight.detach().view(1, 3, 1, 1).expand(batch_size, 3, SIZE, SIZE)


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
