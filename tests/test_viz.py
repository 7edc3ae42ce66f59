"""Grids pixel by pixel, labels, files that open again with the frames and times asked for, bad input."""

import builtins
import sys

import pytest

pytest.importorskip("PIL", reason="pip install 'ddpm_fast[images]'")

import numpy as np
import torch
from PIL import Image

from ddpm_fast import viz


def test_to_uint8_rounds_half_to_even_and_clamps():
    # (x + 1) * 127.5 = 0.5, 1.5, 2.5 are halves that float32 holds exactly.
    x = torch.tensor([-1.0, 1.0, -3.0, 7.0, 0.0, float("inf")]).view(1, 1, 2, 3)
    assert viz.to_uint8(x).ravel().tolist() == [0, 255, 0, 255, 128, 255]
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    assert np.array_equal(viz.to_uint8(images), images.permute(0, 2, 3, 1).numpy())
    every = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for dtype in (torch.float64, torch.float32):
        pixels = viz.to_uint8(every.to(dtype).view(1, 1, 16, 16))
        assert pixels.ravel().tolist() == list(range(256))


def test_grid_places_every_pixel():
    images = torch.rand(5, 3, 2, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    picture = viz.grid(images, 3, scale=2, padding=1, background=7)
    assert picture.shape == (2 * (4 + 1) + 1, 3 * (8 + 1) + 1, 3)
    tiles = viz.to_uint8(images)
    expected = np.full_like(picture, 7)
    for i in range(5):
        for y in range(4):
            for x in range(8):
                expected[1 + (i // 3) * 5 + y, 1 + (i % 3) * 9 + x] = tiles[i, y // 2, x // 2]
    assert np.array_equal(picture, expected)
    assert np.array_equal(viz.grid(tiles, 3, scale=2, padding=1, background=7), picture)


def test_grid_of_its_own_shape():
    grey = torch.full((5, 1, 4, 4), 1.0)
    assert viz.grid(grey, padding=0, background=0).shape == (8, 12, 3)  # 3 columns hold 5
    lanczos = viz.grid(grey[:1], 1, scale=3, padding=0, resample="lanczos")
    assert lanczos.shape == (12, 12, 3)
    assert (lanczos == 255).all()
    coloured = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    lanczos = viz.grid(coloured, 1, scale=3, padding=0, resample="lanczos")
    assert (lanczos == np.array([255, 0, 128])).all()


@pytest.mark.parametrize("background", [255, 0], ids=["light", "dark"])
def test_labels_are_written_beside_the_images(background):
    images = torch.zeros(4, 1, 16, 16)
    plain = viz.grid(images, 2, scale=2, background=background)
    both = viz.grid(images, 2, scale=2, background=background, column_labels=["3", "8"], row_labels=["aa", "b"])
    top, left = both.shape[0] - plain.shape[0], both.shape[1] - plain.shape[1]
    assert top >= 15
    assert left >= 15
    assert np.array_equal(both[top:, left:], plain)
    ink = np.abs(both.astype(int) - background) > 150  # legible: far from the background
    assert ink[:top, left : left + 36].any()
    assert ink[:top, left + 36 :].any()
    assert ink[top : top + 36, :left].any()
    assert ink[top + 36 :, :left].any()
    assert not ink[:top, :left].any()


def test_files_open_again(tmp_path):
    frames = [viz.grid(torch.full((4, 1, 8, 8), v), 2) for v in (-1.0, -0.2, 0.4, 1.0)]
    viz.save_png(tmp_path / "a.png", frames[1])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), frames[1])
    viz.save_gif(tmp_path / "a.gif", frames, fps=20, hold=1.5, levels=256)
    with Image.open(tmp_path / "a.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["loop"]) == (4, frames[0].shape[1::-1], 0)
        times = []
        for i, frame in enumerate(frames):
            gif.seek(i)
            times.append(gif.info["duration"])
            assert np.array_equal(np.asarray(gif.convert("RGB")), frame)
    assert times == [50, 50, 50, 1500]


def test_gif_keeps_few_levels_and_colours(tmp_path):
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(4, axis=0)
    viz.save_gif(tmp_path / "grey.gif", [ramp], levels=8)
    shown = np.asarray(Image.open(tmp_path / "grey.gif").convert("RGB"))
    assert len(np.unique(shown)) == 8
    assert np.abs(shown.astype(int) - ramp).max() <= 19
    colours = np.zeros((4, 9, 3), np.uint8)
    colours[:, :3], colours[:, 3:6] = (255, 0, 0), (0, 0, 255)
    viz.save_gif(tmp_path / "colour.gif", [colours], levels=4)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "colour.gif").convert("RGB")), colours)


IMAGES = torch.zeros(4, 1, 2, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: viz.grid(torch.zeros(4, 2, 3, 3)), ValueError, "(N, 1 or 3, H, W), got (4, 2, 3, 3)"),
        (lambda p: viz.grid(IMAGES / 0), ValueError, "must not hold NaN"),
        (lambda p: viz.grid(IMAGES.long()), TypeError, "floating or uint8, got torch.int64"),
        (lambda p: viz.grid(IMAGES[:0]), ValueError, "at least one image, got 0"),
        (lambda p: viz.grid(np.zeros((2, 3, 3, 2), np.uint8)), ValueError, "got uint8 (2, 3, 3, 2)"),
        (lambda p: viz.grid(IMAGES, 0), ValueError, "got 0, 1 and 2"),
        (lambda p: viz.grid(IMAGES, 2, resample="cubic"), ValueError, '"nearest" or "lanczos", got \'cubic\''),
        (lambda p: viz.grid(IMAGES, 2, column_labels=["1"]), ValueError, "column_labels must hold 2 texts, got 1"),
        (lambda p: viz.grid(IMAGES, 2, row_labels=["1"]), ValueError, "row_labels must hold 2 texts, got 1"),
        (lambda p: viz.save_gif(p, []), ValueError, "at least one picture, got 0"),
        (lambda p: viz.save_gif(p, [viz.grid(IMAGES), viz.grid(IMAGES, 1)]), ValueError, "one shape"),
        (lambda p: viz.save_gif(p, [viz.grid(IMAGES)], fps=0), ValueError, "fps must be in (0, 50]"),
    ],
)
def test_bad_input(tmp_path, call, error, message):
    with pytest.raises(error) as raised:
        call(tmp_path / "x.gif")
    assert message in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_without_pillow_plain_grids_work_and_labels_say_what_to_install(monkeypatch):
    real = builtins.__import__

    def no_pillow(name, *rest):
        if name.startswith("PIL"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", no_pillow)
    assert viz.grid(IMAGES, 2).shape == (10, 10, 3)
    with pytest.raises(ImportError, match=r"pip install ddpm_fast\[images\]"):
        viz.grid(IMAGES, 2, column_labels=["0", "1"])


def test_figure(tmp_path):
    figure, axes = viz.figure(2, size=(4, 2.5))
    for ax, place in zip(axes, ("left", "right"), strict=True):
        ax.plot([0, 1], label=place)
    figure.savefig(tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size == (400, 250)
    assert len(viz.figure()[1]) == 1
    with pytest.raises(ValueError, match="columns must be at least 1, got 0"):
        viz.figure(0)


def test_figure_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib; pip install ddpm_fast\[train\]"):
        viz.figure()


def test_rows_of_different_lengths():
    """As the words of a sentence, one a line."""
    images = torch.arange(1, 6, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 4, 3)
    shown = viz.grid(images, [2, 3], scale=2, padding=1, background=9)
    assert shown.shape == (2 * 9 + 1, 3 * 7 + 1, 3)
    assert shown[4::9, 3::7, 0].tolist() == [[1, 2, 9], [3, 4, 5]]
    for columns in ([2, 2], [5, 1], []):
        with pytest.raises(ValueError, match="columns"):
            viz.grid(images, columns)
    with pytest.raises(ValueError, match=r"columns must be of 5 images in all, got 4: \[2, 2\]"):
        viz.grid(images, [2, 2])


def test_a_caption_is_in_the_lower_right_corner():
    """Readable on black and on white; the picture itself stays as it was."""
    for ground in (0, 255):
        picture = np.full((80, 120, 3), ground, np.uint8)
        written = viz.caption(picture, "12 of 50")
        assert (picture == ground).all()
        rows, columns = np.nonzero((written != ground).any(axis=2))
        assert rows.min() > 60
        assert columns.min() > 50
        assert rows.max() < 80
        assert 110 < columns.max() < 120
        assert written.min() == 0
        assert written.max() > 200
    with pytest.raises(ValueError, match=r"picture must be uint8 \(H, W, 3\), got uint8 \(80, 120\)"):
        viz.caption(picture[..., 0], "12")
