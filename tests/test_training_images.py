"""Pictures of a folder as training data: beside the real package's Dataset, and what it has to cope with."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_fast.training import ImageFolder, loader
from ddpm_fast.training import images as module

Image = pytest.importorskip("PIL.Image", reason="pip install 'ddpm_fast[images]'")


def draw(path: Path, size: tuple[int, int] = (20, 12), mode: str = "RGB", seed: int = 0) -> Path:
    """A smooth picture of (width, height) with some noise."""
    rng = np.random.default_rng(seed)
    width, height = size
    bands = Image.new(mode, (1, 1)).getbands()
    ramp = np.linspace(0, 1, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
    pixels = 200 * ramp + rng.uniform(0, 50, (height, width, len(bands)))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8).squeeze()).save(path)
    return path


def by_path(data):
    return {path: data[i] for i, path in enumerate(data.paths)}


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(["b.png", "a.JPG", "deep/er/c.jpeg", "d.tiff", "e.bmp", "f.webp"]):
        draw(tmp_path / name, seed=i)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


def test_finds_pictures_in_the_order_of_their_paths(folder):
    data = ImageFolder(folder, 8)
    assert [str(path.relative_to(folder)) for path in data.paths] == [
        "a.JPG", "b.png", "d.tiff", "deep/er/c.jpeg", "e.bmp", "f.webp",
    ]  # fmt: skip
    assert len(data) == 6
    assert all(image.shape == (3, 8, 8) and image.dtype == torch.float32 for image in data)
    assert all(image.min() >= 0 and image.max() <= 1 and image.std() > 0.05 for image in data)


@pytest.mark.parametrize("size", [(8, 8), (6, 10)], ids=str)
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_the_same_pixels_as_the_real_dataset(lucidrains, tmp_path, size, mode, channels):
    peer = lucidrains.denoising_diffusion_pytorch.Dataset
    for i, kind in enumerate(["RGB", "L", "RGBA"]):
        draw(tmp_path / f"{i}.png", mode=kind, seed=i)
    theirs = by_path(peer(tmp_path, size, convert_image_to=mode))
    ours = ImageFolder(tmp_path, size, mode=mode)
    assert len(theirs) == len(ours) == 3
    for path, image in by_path(ours).items():
        assert image.shape == (channels, *size)
        assert torch.equal(image, theirs[path])


def test_crop_keeps_the_aspect_ratio(tmp_path):
    pixels = np.zeros((12, 40, 3), np.uint8)
    pixels[:, 12:28] = 255  # the middle square is white, and what its edges are interpolated with
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    Image.fromarray(pixels.transpose(1, 0, 2)).save(tmp_path / "tall.png")
    assert all((image == 1).all() for image in ImageFolder(tmp_path, 6, fit="crop"))
    assert all(0.3 < image.mean() < 0.5 for image in ImageFolder(tmp_path, 6))


def test_mirrors_half_of_them_by_torchs_generator(tmp_path):
    draw(tmp_path / "a.png")
    plain = ImageFolder(tmp_path, 8)[0]
    data = ImageFolder(tmp_path, 8, horizontal_flip=True)
    torch.manual_seed(0)
    seen = [data[0] for _ in range(100)]
    mirrored = sum(bool(torch.equal(image, plain.flip(-1))) for image in seen)
    assert sum(bool(torch.equal(image, plain)) for image in seen) == 100 - mirrored
    assert 30 < mirrored < 70
    torch.manual_seed(0)
    assert all(torch.equal(data[0], image) for image in seen)


def break_some(folder: Path) -> None:
    (folder / "a.JPG").write_bytes(b"not a picture")
    cut = (folder / "deep/er/c.jpeg").read_bytes()
    (folder / "deep/er/c.jpeg").write_bytes(cut[: len(cut) // 2])


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_files_are_skipped_and_reported_once(folder, workers):
    whole = by_path(ImageFolder(folder, 8))
    break_some(folder)
    data = ImageFolder(folder, 8)
    batches = module.endless(loader(data, 2, workers=workers))
    with pytest.warns(UserWarning, match=r"2 of 6 images in .* cannot be read and are skipped: a\.JPG, deep/er/c\.jpe"):
        seen = torch.cat([next(batches) for _ in range(4)])  # an epoch and the beginning of the next
    good = [image for path, image in whole.items() if path.name not in ("a.JPG", "c.jpeg")]
    assert all(any(torch.equal(image, one) for one in good) for image in seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            next(batches)
        assert data.report_broken() == 2


def test_no_readable_file_at_all(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none of the 3 images in .* can be read"):
        ImageFolder(tmp_path, 8)[1]


def test_batches(folder, monkeypatch):
    batches = list(loader(ImageFolder(folder, 8), 4))
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 8, 8), (2, 3, 8, 8)]
    assert loader(ImageFolder(folder, 8), 4).num_workers == 0
    monkeypatch.setattr(module, "_FEW_IMAGES", 3)
    assert 1 <= loader(ImageFolder(folder, 8), 4).num_workers <= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 0}, "image_size must be one or two positive numbers, got 0"),
        ({"image_size": (8, 8, 8)}, "image_size must be one or two positive numbers"),
        ({"fit": "pad"}, "fit must be stretch or crop, got 'pad'"),
        ({"mode": "rgb"}, "another 8-bit mode of Pillow, got 'rgb'"),
        ({"mode": "I"}, "another 8-bit mode of Pillow, got 'I'"),
    ],
)
def test_bad_arguments(folder, options, message):
    with pytest.raises(ValueError, match=message):
        ImageFolder(folder, **{"image_size": 8, **options})


def test_bad_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent to read images from"):
        ImageFolder(tmp_path / "absent", 8)
    with pytest.raises(ValueError, match=r"hold no image; looked for \.jpg, "):
        ImageFolder(tmp_path, 8)


def test_without_pillow(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"reading images needs Pillow; pip install ddpm_fast\[images\]"):
        ImageFolder(folder, 8)
