"""A checkpoint of another model, schedule, data or other settings is refused by name; full disks lose nothing."""

import errno
import os

import pytest
import torch
from torch import nn
from training_child import BATCH, SHORT, Network, bits_of, files, trainer

from ddpm_fast import Schedule
from ddpm_fast.training import Trainer, checkpoints


def rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=1e-3)


# -- what is not of the run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    out = tmp_path_factory.mktemp("started")
    trainer(out, images=SHORT).train(until=BATCH)
    return out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"batch_size": 16}, "batch_size was 8, is 16"),
        ({"seed": 4, "lr": 0.5}, "lr was 0.001, is 0.5; seed was 3, is 4"),
        ({"prediction": "eps"}, "prediction was 'v', is 'eps'"),
        ({"ema": None}, "ema was 0.99, is None"),
        ({"precision": None}, "precision was 'bf16', is None"),
        ({"betas": (0.8, 0.9)}, r"betas was \[0.9, 0.999\], is \[0.8, 0.9\]"),
        ({"images": 2 * SHORT}, "images was 48, is 96"),  # the cosine ends there
        ({"optimizer": rmsprop}, "optimizer was 'AdamW', is 'RMSprop'"),
    ],
)
def test_other_settings(started, changed, said):
    before = files(started)
    with pytest.raises(ValueError, match=rf"00008\.safetensors is of another run: .*{said}.* Go on with what"):
        trainer(started, **{"images": SHORT, **changed})
    assert files(started) == before


def test_settings_that_may_change(started):
    run = trainer(started, images=SHORT, save_every=1, keep=1, workers=0)
    assert run.images_seen == BATCH


def other(out, model=None, schedule=None, images=None, labels=None):
    """The run `started`, of another model, schedule or data."""
    run = trainer(None, images=SHORT)
    data = run.data if images is None else (images, labels)
    return Trainer(model or Network(), schedule or run.schedule, data, out=out, **vars(run.settings))


class Wider(Network):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 5, padding=2), nn.Conv2d(8, 1, 1)
        self.extra = nn.Linear(1, 1)


def test_another_model_schedule_or_data(started):
    assert other(started).images_seen == BATCH
    with pytest.raises(ValueError, match=r"kind was 'training_child\.Network', is 'test_resume_refused\.Wider'"):
        other(started, Wider())
    same_name = type("Network", (Wider,), {"__module__": "training_child", "__qualname__": "Network"})
    said = (
        r"another model: extra\.weight is missing; extra\.bias is missing; first\.weight has shape \(8, 1, 3, 3\), the"
    )
    with pytest.raises(ValueError, match=said):
        other(started, same_name())
    with pytest.raises(ValueError, match=r"schedule was Schedule\.linear\(T=20, .*\), is Schedule\.cosine\(T=20, .*\)"):
        other(started, schedule=Schedule.cosine(20))
    data = trainer(None).data
    with pytest.raises(ValueError, match=r"run: data images was 50, is 49; data fingerprint was '\w+', is '\w+'\. Go"):
        other(started, images=data.images[:49], labels=data.labels[:49])
    images = data.images.clone()
    images[7, 0, 3, 3] ^= 1
    with pytest.raises(ValueError, match=r"run: data fingerprint was '\w+', is '\w+'\. Go"):
        other(started, images=images, labels=data.labels)


def test_a_refused_checkpoint_changes_nothing(started):
    run = trainer(None, images=SHORT, seed=9)
    run.train(until=BATCH)
    before = bits_of(run)
    with pytest.raises(ValueError, match="seed was 3, is 9"):
        run.load(started)
    assert bits_of(run) == before
    with pytest.raises(FileNotFoundError):
        run.load(started / "nothing")


def test_load_goes_back(started, tmp_path):
    whole, run = trainer(None, images=SHORT), trainer(None, images=SHORT)
    whole.train()
    run.train(until=4 * BATCH)
    run.load(started)
    assert run.images_seen == BATCH
    run.train()
    assert bits_of(run) == bits_of(whole)
    run = trainer(tmp_path, images=SHORT, save_every=2 * BATCH, keep=9)
    run.train(until=5 * BATCH)
    later = (tmp_path / "checkpoints" / checkpoints.file_name(4 * BATCH)).read_bytes()
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    run.load(started)
    run.train(until=4 * BATCH)
    assert files(tmp_path) == [checkpoints.file_name(n * BATCH) for n in (2, 4)]
    assert (tmp_path / "checkpoints" / checkpoints.file_name(4 * BATCH)).read_bytes() == later


# -- disks -------------------------------------------------------------------------------------------------------------


def test_full_disk(tmp_path, monkeypatch):
    """The run ends with one line, what was saved stays, and the trainer can save again when there is room."""
    run = trainer(tmp_path, images=SHORT, save_every=2 * BATCH)
    run.train(until=2 * BATCH)
    real = os.fsync

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write .*0032\.safetensors: No space left on device; files written befo"):
        run.train()
    assert files(tmp_path) == [checkpoints.file_name(2 * BATCH)]
    monkeypatch.setattr(os, "fsync", real)
    run.train()
    whole = trainer(None, images=SHORT)
    whole.train()
    assert bits_of(run) == bits_of(whole)
    assert files(tmp_path) == [checkpoints.file_name(n * BATCH) for n in (5, 6)]  # tried again at the next step


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write to .*checkpoints: Not a directory"):
        trainer(tmp_path / "file")

    def refuse(path, *args, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)  # as root, who may write anywhere, sees it
    with pytest.raises(PermissionError, match=r"cannot write to .*checkpoints: Permission denied"):
        trainer(tmp_path / "other")
    assert (tmp_path / "file").read_text() == "mine"
