"""Letters A..Z: rendered from the fonts that matplotlib ships, and EMNIST's handwritten ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from . import idx

Array = NDArray[Any]

NAMES = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
SIDE = 28
EACH = {"train": 1000, "test": 200}  # rendered images of each letter
FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold",
    "STIXGeneral", "STIXGeneralBol", "cmr10", "cmb10", "cmss10", "cmtt10",
)  # fmt: skip
STROKES = (0, 1, 2)  # pixels of the large glyph by which its outline is widened
_LARGE = 4 * SIDE
_HEIGHT = 0.64  # of a capital letter, as a share of the picture
_CHUNK = 2000
_SLANT, _TURN, _SIZE, _SHIFT = 0.25, 0.10, (0.85, 1.10), 0.08


def rendered(split: str) -> tuple[Array, Array]:
    """uint8 (N, 1, 28, 28), white on black, and int64 (N,) labels 0..25, letter after letter.

    Every image is a glyph of one of twelve faces in one of three weights, slanted, turned, scaled and shifted at
    random; the random numbers are the same at every call, and others in the two parts. Raises ImportError without
    matplotlib or Pillow.
    """
    glyphs = _glyphs()
    styles, each = len(glyphs), EACH[split]
    random = np.random.default_rng([ord(split[0]), styles, each])
    labels = np.repeat(np.arange(len(NAMES)), each)
    style = torch.from_numpy(random.integers(0, styles, len(labels)))
    places = torch.from_numpy(_places(random, len(labels)))
    images = np.empty((len(labels), 1, SIDE, SIDE), np.uint8)
    for start in range(0, len(labels), _CHUNK):
        part = slice(start, start + _CHUNK)
        large = glyphs[style[part], torch.from_numpy(labels[part])][:, None]
        # Twice the size and then the mean of 2 x 2, so that thin strokes neither vanish nor flicker.
        grid = functional.affine_grid(places[part], [len(large), 1, 2 * SIDE, 2 * SIDE], align_corners=False)
        warped = functional.avg_pool2d(functional.grid_sample(large, grid, align_corners=False), 2)
        images[part] = warped.round().to(torch.uint8).numpy()
    return images, labels


def _places(random: np.random.Generator, n: int) -> Array:
    """float32 (n, 2, 3): from a place in the picture, [-1, 1], to the place in the large glyph that is shown there."""

    def between(low: float, high: float) -> Array:
        return random.uniform(low, high, n)

    slant, turn, size = between(-_SLANT, _SLANT), between(-_TURN, _TURN), between(*_SIZE)
    across, down = between(-_SHIFT, _SHIFT), between(-_SHIFT, _SHIFT)
    cos, sin = np.cos(turn), np.sin(turn)
    rows = [[cos, slant * cos - sin, across], [sin, slant * sin + cos, down]]
    places = np.stack([np.stack(row, axis=1) for row in rows], axis=1)
    places[:, :, :2] /= size[:, None, None]
    return places.astype(np.float32)


def _glyphs() -> Tensor:
    """float32 (faces x strokes, 26, 112, 112) of 0..255: every letter large, its box in the middle."""
    try:
        import matplotlib
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError(
            f"rendered letters need matplotlib's fonts and Pillow ({error}); pip install ddpm_fast[train]"
        ) from None
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    pictures = []
    for face in FACES:
        # Faces fill their em by different shares: each is made as high as the others by its H.
        try:
            high = ImageFont.truetype(folder / f"{face}.ttf", 100).getbbox("H")
        except OSError:
            raise ImportError(f"{folder} has no {face}.ttf, which the letters are rendered from") from None
        size = 100 * _HEIGHT * _LARGE / (high[3] - high[1])
        font = ImageFont.truetype(folder / f"{face}.ttf", size, layout_engine=ImageFont.Layout.BASIC)
        for stroke in STROKES:
            for name in NAMES:
                left, top, right, bottom = font.getbbox(name, stroke_width=stroke)
                at = ((_LARGE - left - right) / 2, (_LARGE - top - bottom) / 2)
                picture = Image.new("L", (_LARGE, _LARGE))
                ImageDraw.Draw(picture).text(at, name, 255, font, stroke_width=stroke)
                pictures.append(np.asarray(picture))
    large = torch.from_numpy(np.stack(pictures)).float()
    return large.view(-1, len(NAMES), _LARGE, _LARGE)


def find_emnist(path: Path | None, split: str) -> Path:
    """The images file of EMNIST's letters, in `path` or below $DDPM_FAST_DATA.

    Raises FileNotFoundError with the places looked at and where to get it.
    """
    given = path or os.environ.get("DDPM_FAST_DATA")
    folders = [Path(given, below) for below in ("", "emnist", "gzip", "EMNIST/raw")] if given else []
    name = f"emnist-letters-{split}-images-idx3-ubyte"
    for folder in folders:
        for file in (folder / name, folder / f"{name}.gz"):
            if file.is_file():
                return file
    looked = ", ".join(map(str, folders)) or "nowhere, for neither path nor DDPM_FAST_DATA is given"
    raise FileNotFoundError(
        f"no emnist-letters data found, looked in: {looked}. To have it, take gzip.zip from "
        f"https://www.nist.gov/itl/products-and-services/emnist-dataset and unpack {name}.gz and the labels beside it "
        'into a folder; "letters" are rendered here and need no files'
    )


def emnist(images_file: Path) -> tuple[Array, Array]:
    """EMNIST's letters: uint8 (N, 1, 28, 28), upright, and int64 labels 0..25; capital and small ones are one class.

    Raises FileNotFoundError without the labels, ValueError for damaged files and for labels outside 1..26.
    """
    images, labels = idx.load(idx.of_images(images_file))
    if labels is None:
        wanted = images_file.name.replace("images-idx3", "labels-idx1")
        raise FileNotFoundError(f"{images_file.parent} has the images of emnist-letters but not {wanted}")
    if labels.min() < 1 or labels.max() > len(NAMES):
        raise ValueError(f"{images_file}: its labels must be 1..26, got {labels.min()} to {labels.max()}")
    # The files have the images' rows as columns.
    return np.ascontiguousarray(images.swapaxes(1, 2))[:, None], labels.astype(np.int64) - 1
