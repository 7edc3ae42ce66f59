"""Letters: the rendered ones, and EMNIST's as its files have them."""

from __future__ import annotations

import builtins
import gzip
import struct

import numpy as np
import pytest
import torch

from ddpm_fast.training import open_data
from ddpm_fast.training.data import letters

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")


@pytest.fixture
def few(monkeypatch):
    """Two faces and a few of each letter: seconds are spared, the way is the same."""
    monkeypatch.setattr(letters, "FACES", ("DejaVuSans", "cmr10"))
    monkeypatch.setattr(letters, "EACH", {"train": 40, "test": 10})
    monkeypatch.setattr(letters, "_CHUNK", 300)


def test_rendered_letters_are_pixels_with_names_and_the_same_at_every_call(few):
    data, again, test = open_data("letters"), open_data("letters"), open_data("letters", split="test")
    assert repr(data) == "letters: 1,040 of shape 1x28x28, uint8, 26 classes"
    assert data.labels.bincount().tolist() == [40] * 26
    assert "".join(data.class_names[i] for i in data.labels[::40]) == "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert data.fingerprint() == again.fingerprint()
    assert test.labels.bincount().tolist() == [10] * 26
    train_rows = {image.numpy().tobytes() for image in data.images}
    assert len(train_rows) == len(data)  # no two are alike, and none is in both parts
    assert not train_rows & {image.numpy().tobytes() for image in test.images}
    assert open_data("letters", labels=False).labels is None
    assert open_data("letters", image_size=32, fit="pad", channels=3).shape == (3, 32, 32)


def test_rendered_letters_are_white_on_black_in_the_middle_and_upright(few):
    images, labels = letters.rendered("train")
    ink = images.astype(float).sum(axis=(1, 2, 3)) / 255
    assert 15 < ink.min() < ink.max() < 400
    assert images.max(axis=(1, 2, 3)).min() > 150  # thin strokes too
    places = np.arange(28) - 13.5
    for axes in ((1, 2), (1, 3)):
        profile = images.astype(float).sum(axis=axes)
        centre = (profile * places).sum(1) / profile.sum(1)
        assert np.abs(centre).max() < 7
    mean = [images[labels == i, 0].astype(float).mean(0) for i in range(26)]
    left_right = [m[:, :14].sum() / m[:, 14:].sum() for m in mean]
    top_bottom = [m[:14].sum() / m[14:].sum() for m in mean]
    assert left_right[letters.NAMES.index("E")] > 1.1  # not mirrored
    assert left_right[letters.NAMES.index("J")] < 1
    assert top_bottom[letters.NAMES.index("P")] > 1.2  # not upside down
    assert top_bottom[letters.NAMES.index("L")] < 0.9


def test_places_are_from_the_picture_to_the_glyph(monkeypatch):
    monkeypatch.setattr(letters, "_SLANT", 0)
    monkeypatch.setattr(letters, "_TURN", 0)
    monkeypatch.setattr(letters, "_SIZE", (2, 2))
    places = letters._places(np.random.default_rng(0), 3)
    assert places.dtype == np.float32
    assert np.allclose(places[:, :, :2], np.eye(2) / 2)
    assert np.abs(places[:, :, 2]).max() <= letters._SHIFT


def write(path, array):
    content = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def emnist(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    for part, suffix, rows in (("train", ".gz", slice(0, 3)), ("test", "", slice(3, 5))):
        stem = tmp_path / f"emnist-letters-{part}"
        write(stem.with_name(f"{stem.name}-images-idx3-ubyte{suffix}"), images[rows])
        write(stem.with_name(f"{stem.name}-labels-idx1-ubyte{suffix}"), np.array([26, 1, 2, 3, 3], np.uint8)[rows])
    # Another of EMNIST's sets in the same folder, as the archive has it.
    write(tmp_path / "emnist-digits-train-images-idx3-ubyte.gz", images)
    return tmp_path, images


def test_emnist_is_upright_and_counts_from_0(emnist, monkeypatch):
    folder, images = emnist
    train, test = open_data("emnist-letters", path=folder), open_data("emnist-letters", path=folder, split="test")
    assert repr(train) == "emnist-letters: 3 of shape 1x28x28, uint8, 26 classes"
    assert np.array_equal(train.images.numpy()[:, 0], images[:3].transpose(0, 2, 1))
    assert train.labels.tolist() == [25, 0, 1]
    assert train.class_names[25] == "Z"
    assert test.labels.tolist() == [2, 2]
    below = folder.parent / "data"
    below.mkdir()
    folder.rename(below / "gzip")
    assert torch.equal(open_data("emnist-letters", path=below).images, train.images)
    monkeypatch.setenv("DDPM_FAST_DATA", str(below))
    assert open_data("emnist-letters").fingerprint() == train.fingerprint()


def test_emnist_that_is_not_there_or_damaged(emnist, tmp_path, monkeypatch):
    folder, _ = emnist
    labels = folder / "emnist-letters-train-labels-idx1-ubyte.gz"
    write(labels, np.array([1, 2, 0], np.uint8))
    with pytest.raises(ValueError, match=r"images-idx3-ubyte\.gz: its labels must be 1\.\.26, got 0 to 2"):
        open_data("emnist-letters", path=folder)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match="has the images of emnist-letters but not emnist-letters-train-labels"):
        open_data("emnist-letters", path=folder)
    wanted = r"no emnist-letters data found, looked in: .*nowhere.*gzip\.zip from https://www\.nist.*rendered here"
    with pytest.raises(FileNotFoundError, match=wanted):
        open_data("emnist-letters", path=tmp_path / "nowhere")
    monkeypatch.delenv("DDPM_FAST_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="looked in: nowhere, for neither path nor DDPM_FAST_DATA is given"):
        open_data("emnist-letters")


def test_what_rendering_needs(few, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="letters are rendered here: path must be None"):
        open_data("letters", path=tmp_path)
    real = builtins.__import__

    def no_matplotlib(name, *rest):
        if name == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(letters, "FACES", ("NoSuchFace",))
        with pytest.raises(ImportError, match=r"has no NoSuchFace\.ttf, which the letters are rendered from"):
            open_data("letters")
    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"need matplotlib's fonts and Pillow .*; pip install ddpm_fast\[train\]"):
        open_data("letters")
