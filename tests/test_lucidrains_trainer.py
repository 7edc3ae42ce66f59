"""Trainer beside denoising_diffusion_pytorch's: the same steps, files that go both ways, and what theirs gets wrong."""

from __future__ import annotations

import inspect
import os

import numpy as np
import pytest
import torch
from trainer_models import SIZE, Diffusion, fixed_batches, pictures, small_diffusion, train

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
