"""Folders of pictures of all kinds, and reading ahead by other processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import warnings
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

import ddpm_fast
from ddpm_fast.training.data import TensorData, as_data, open_data, prefetch
from ddpm_fast.training.data import folder as module
from ddpm_fast.training.data.folder import FolderData

Image = pytest.importorskip("PIL.Image", reason="pip install 'ddpm_fast[images]'")


def draw(path: Path, size: tuple[int, int] = (8, 8), seed: int = 0, mode: str = "RGB") -> Path:
    """A picture (width, height) of random blocks of 4x4 pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), np.uint8)
    pixels = blocks.repeat(4, 0).repeat(4, 1)[: size[1], : size[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def every(data) -> torch.Tensor:
    return data.batch(torch.arange(len(data)))


@pytest.fixture
def large(monkeypatch):
    """Folders count as large from four pictures on: they are read when they are needed."""
    monkeypatch.setattr(module, "_FEW", 3)


@pytest.fixture
def classes(tmp_path):
    """Six pictures of the classes cat and dog, and what is to be left alone."""
    for i, name in enumerate(["dog/c.png", "dog/deep/a.PNG", "cat/b.png", "cat/d.webp", "cat/e.bmp", "dog/f.png"]):
        draw(tmp_path / name, seed=i)
    (tmp_path / "notes.txt").write_text("no picture")
    for name in ("__MACOSX/cat/._b.png", ".cache/x.png", "cat/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"no picture")
    return tmp_path


def test_subfolders_are_classes_in_the_order_of_their_names(classes):
    data = open_data(classes)
    assert isinstance(data, TensorData)
    assert (len(data), data.shape, data.dtype, data.num_classes) == (6, (3, 8, 8), torch.uint8, 2)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    first = np.asarray(Image.open(classes / "cat/b.png")).transpose(2, 0, 1)
    assert np.array_equal(every(data)[0].numpy(), first)
    assert data.name == classes.name
    assert open_data(classes, labels=False).labels is None
    assert torch.equal(every(open_data("folder", path=classes)), every(data))
    draw(classes / "loose.png")  # in no class
    assert open_data(classes).labels is None


def test_a_large_folder_is_the_same_data(classes, large):
    data = open_data(classes)
    assert isinstance(data, FolderData)
    module._FEW = 1000
    small = open_data(classes)
    assert torch.equal(every(data), every(small))
    assert torch.equal(data.labels, small.labels)
    assert repr(data) == repr(small)
    assert (data.class_names, data.num_classes) == (small.class_names, 2)
    assert data.complete


def test_parts_of_a_folder(classes, tmp_path):
    with pytest.raises(ValueError, match="has no test part: it needs subfolders train and test"):
        open_data(classes, split="test")
    whole = tmp_path / "whole"
    for part, number in (("train", 3), ("valid", 2)):
        for i in range(number):
            draw(whole / part / f"{i}.png", seed=i)
    assert len(open_data(whole)) == 3
    test = open_data(whole, split="test")
    assert len(test) == 2
    assert test.name == "whole"


def test_pictures_of_any_mode_as_grey_and_as_colour(tmp_path):
    ramp = (np.arange(16, dtype=np.uint16).reshape(4, 4) * 4369).astype("<u2")  # 0..65535
    grey = np.rint(ramp / 257).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "a16.png")
    Image.fromarray(ramp).save(tmp_path / "b16.tiff")
    Image.fromarray(grey).save(tmp_path / "c8.png")
    data = every(open_data(tmp_path))
    assert data.shape == (3, 1, 4, 4)
    assert all(np.array_equal(image[0].numpy(), grey) for image in data)
    Image.fromarray(grey > 100).save(tmp_path / "d1.png")
    Image.fromarray(grey).convert("P").save(tmp_path / "e_palette.png")
    Image.fromarray(np.stack([grey, 255 - grey, grey], 2)).convert("CMYK").save(tmp_path / "f.tiff")
    with_alpha = Image.fromarray(np.stack([grey, np.full_like(grey, 51)], 2))
    with_alpha.save(tmp_path / "g_alpha.png")
    colour = open_data(tmp_path)
    assert colour.shape == (3, 4, 4)  # a palette counts as colour
    images = every(colour)
    assert np.array_equal(images[3, 0].numpy(), np.where(grey > 100, 255, 0))
    assert all(torch.equal(images[i, channel], images[0, 0]) for i in (0, 1, 2, 4) for channel in range(3))
    assert np.array_equal(images[5].numpy(), np.stack([grey, 255 - grey, grey]))
    assert np.array_equal(images[6, 1].numpy(), np.rint(grey * 0.2 + 255 * 0.8))
    one = every(open_data(tmp_path, channels=1))
    assert one.shape == (7, 1, 4, 4)
    assert np.array_equal(one[6, 0].numpy(), np.rint(grey * 0.2 + 255 * 0.8))


def test_what_is_transparent_is_white(tmp_path):
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30] + [0] * 750)
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "a.png", transparency=0)
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "b.png")
    Image.new("RGB", (4, 4), (10, 20, 30)).save(tmp_path / "c.png", transparency=(10, 20, 30))
    a, b, c = every(open_data(tmp_path))
    assert a[:, 0, 0].tolist() == [255, 255, 255]
    assert a[:, 0, 1].tolist() == [10, 20, 30]
    assert (b == 255).all()
    assert (c == 255).all()


def test_pictures_are_seen_as_their_orientation_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # the left half is white: turned, the upper one
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif, quality=95)
    data = open_data(tmp_path)
    assert data.shape == (3, 32, 16)
    image = every(data)[0].float()
    assert image[:, :15].mean() > 250
    assert image[:, 17:].mean() < 5


def test_large_jpegs_are_decoded_small_without_being_seen_to(tmp_path):
    smooth = np.linspace(0, 255, 512)[None, :, None] * np.linspace(0.3, 1, 400)[:, None, None]
    image = Image.fromarray(np.broadcast_to(smooth, (400, 512, 3)).astype(np.uint8))
    image.save(tmp_path / "a.jpg", quality=95)
    for fit, box in (("crop", (56, 0, 456, 400)), ("stretch", None)):
        whole = Image.open(tmp_path / "a.jpg").resize((32, 32), Image.Resampling.BILINEAR, box=box)
        ours = every(open_data(tmp_path, image_size=32, fit=fit))[0].permute(1, 2, 0).int()
        assert (ours - torch.from_numpy(np.array(whole)).int()).abs().max() <= 3


def test_sizes(tmp_path):
    draw(tmp_path / "a.png", (12, 8))
    assert open_data(tmp_path).shape == (3, 8, 12)
    draw(tmp_path / "b.png", (8, 8))
    with pytest.raises(ValueError, match=r"several sizes, as a\.png 8x12 and b\.png 8x8 \(height x width\): give"):
        open_data(tmp_path)
    with pytest.warns(UserWarning, match="1 of 2 images looked at are smaller than 6x12 and are enlarged") as warned:
        assert open_data(tmp_path, image_size=(6, 12)).shape == (3, 6, 12)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        padded = every(open_data(tmp_path, image_size=16, fit="pad"))
    assert torch.equal(padded[1][:, 4:12, 4:12], every(open_data(tmp_path, image_size=8))[1])
    assert (padded[1][:, :4] == 0).all()


def test_one_picture_and_none(tmp_path):
    with pytest.raises(ValueError, match=r"and its subfolders hold no image; looked for \.jpg, "):
        open_data(tmp_path)
    draw(tmp_path / "a.png")
    data = open_data(tmp_path)
    assert len(data) == 1
    assert data.batch(torch.zeros(5, dtype=torch.int64)).shape == (5, 3, 8, 8)


def break_some(folder: Path) -> None:
    (folder / "cat/e.bmp").write_bytes(b"not a picture")
    whole = (folder / "dog/c.png").read_bytes()
    (folder / "dog/c.png").write_bytes(whole[: len(whole) // 2])


def test_broken_files_of_a_small_folder_are_left_out(classes):
    whole = open_data(classes)
    break_some(classes)
    with pytest.warns(UserWarning, match=r"2 of 6 images in .* cannot be read and are skipped: cat/e.bmp") as got:
        data = open_data(classes)
    assert got[0].filename == __file__
    assert torch.equal(every(data), whole.batch(torch.tensor([0, 1, 4, 5])))
    assert data.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_files_of_a_large_folder_are_replaced_inside_their_class(classes, large, workers):
    whole = every(open_data(classes))
    break_some(classes)
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 3]):
        indices = torch.tensor(order)
        with pytest.warns(UserWarning, match="2 of 6 images in .* cannot be read and are skipped") as warned:
            batches = list(prefetch(open_data(classes), indices.split(2), workers))
        # Python 3.12 warns of forking beside threads, too.
        assert len([warning for warning in warned if warning.category is UserWarning]) == 1
        # The last cat is replaced by the first one, the first dog by the next.
        assert torch.equal(torch.cat(batches), whole[torch.tensor([0, 1, 0, 4, 4, 5])[indices]])


def test_folders_where_nothing_can_be_read(classes, tmp_path, monkeypatch):
    for path in (classes / "cat").iterdir():
        path.write_bytes(b"nothing")
    monkeypatch.setattr(module, "_FEW", 3)
    data = open_data(classes)
    with pytest.raises(ValueError, match=r"none of the 3 images in .* of the class of cat/b\.png can be read"):
        data.batch(torch.tensor([0]))
    assert len(data.batch(torch.tensor([3]))) == 1
    shutil.rmtree(classes / "dog")
    with pytest.raises(ValueError, match=r"none of the 3 images in .* can be read"):
        open_data(classes)


def test_fingerprints_of_a_large_folder(classes, tmp_path_factory, large, monkeypatch):
    def prints(**options):
        return open_data(classes, **options).fingerprint()

    first = prints()
    seen = {first, prints(channels=1), prints(image_size=4), prints(labels=False)}
    copy = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(classes / "cat", copy / "cat")
    shutil.copytree(classes / "dog", copy / "dog")
    assert open_data(copy).fingerprint() == first == prints()
    pixels = bytearray((copy / "cat/e.bmp").read_bytes())
    pixels[-1] ^= 1
    (copy / "cat/e.bmp").write_bytes(pixels)
    seen.add(open_data(copy).fingerprint())
    (copy / "cat/e.bmp").rename(copy / "cat/f.bmp")
    seen.add(open_data(copy).fingerprint())
    assert len(seen) == 6
    monkeypatch.setattr(module, "_HASHED", 10)
    monkeypatch.setattr(module, "_LOOKED_AT", 2)  # files 0 and 3 of 6
    there = open_data(copy).fingerprint()
    (copy / "cat/f.bmp").write_bytes(bytes(len(pixels)))
    assert open_data(copy).fingerprint() == there
    (copy / "cat/f.bmp").write_bytes(bytes(7))
    assert open_data(copy).fingerprint() != there


def orders(n: int, batch: int, epochs: int) -> list[torch.Tensor]:
    """Batches that cross epochs, as training's do."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)]).split(batch))


@pytest.fixture
def many(tmp_path, large):
    for i in range(11):
        draw(tmp_path / f"{i:02}.png", (4, 4), seed=i)
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kept", [True, False])
def test_prefetch_is_the_batches_in_order(many, monkeypatch, workers, kept):
    if not kept:
        monkeypatch.setattr(module, "KEPT", 11 * 3 * 4 * 4 - 1)
    whole = every(open_data(many))
    data, indices = open_data(many), orders(11, 4, 4)
    state = torch.get_rng_state()
    batches = prefetch(data, iter(indices), workers)
    for some in indices:
        assert torch.equal(next(batches), whole[some])
    assert next(batches, None) is None
    assert torch.equal(torch.get_rng_state(), state)  # torch's random numbers are the user's
    assert data.complete == kept
    assert not multiprocessing.active_children()


def test_after_the_first_epoch_nothing_is_read(many):
    data, indices = open_data(many), orders(11, 4, 3)
    batches = prefetch(data, cycle(indices), workers=2)
    whole = [next(batches) for _ in range(20)]
    assert data.complete
    assert not multiprocessing.active_children()
    for path in many.iterdir():
        path.unlink()
    assert torch.equal(next(batches), whole[20 % len(indices)])


def test_workers_end_with_the_iterator_and_leave_signals_to_their_process(many, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 0)
    data, indices = open_data(many), orders(11, 4, 3)
    batches = prefetch(data, cycle(indices), workers=2)
    first = next(batches)
    children = multiprocessing.active_children()
    assert len(children) == 2
    for _ in range(3):
        next(batches)  # each has answered: it is past its start
    for child in children:
        os.kill(child.pid, signal.SIGINT)
        os.kill(child.pid, signal.SIGTERM)
    assert [next(batches) for _ in range(len(indices) - 3)][-1].shape == first.shape
    assert all(child.is_alive() for child in children)
    del batches
    assert not multiprocessing.active_children()


class Fails(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 5:
            raise self.error
        return torch.full((2,), index / 8)


class Unpicklable(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_that_error(workers):
    dataset = Fails()
    indices = torch.arange(8).split(2)
    for error, expected, message in (
        (KeyError("five"), KeyError, "^'five'$"),
        (Unpicklable(1, 2), RuntimeError if workers else Unpicklable, "1 and 2$"),
    ):
        dataset.error = error
        batches = prefetch(as_data(dataset), indices, workers)
        assert [batch[0, 0].item() * 8 for batch in (next(batches), next(batches))] == [0, 2]
        with pytest.raises(expected, match=message):
            next(batches)


def test_a_killed_worker_is_an_error_and_not_a_wait(many, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 0)
    batches = prefetch(open_data(many), cycle(orders(11, 4, 3)), workers=1)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        sum(len(batch) for batch in islice(batches, 50))


def test_a_worker_is_sent_no_pixels(many):
    data = open_data(many)
    small = len(pickle.dumps(data._pictures.paths))
    every(data)
    data._pictures = None
    assert len(pickle.dumps(data)) < small + 2000
    assert torch.equal(data.labels or torch.zeros(0), torch.zeros(0))


def test_training_on_a_folder_is_training_on_its_pixels(classes, large):
    def trained(data, workers):
        torch.manual_seed(0)
        model = ddpm_fast.UNet(3, 32, width=8, depth=1, num_classes=2)
        trainer = ddpm_fast.Trainer(
            model, ddpm_fast.Schedule.linear(20), data, images=32, batch_size=4, flip=True, workers=workers, ema=None
        )
        trainer.train()
        return model.state_dict()

    break_some(classes)
    with pytest.warns(UserWarning, match="2 of 6 images in .* are skipped"):
        ours = trained(open_data(classes), workers=1)
    data = open_data(classes)
    theirs = trained((every(data), data.labels), workers=None)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
