"""Picture files: which there are in a folder, and one of them as pixels. All that reads pictures reads them here."""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

SUFFIXES = (".jpg", ".jpeg", ".png", ".tiff", ".tif", ".bmp", ".webp")
FITS = ("stretch", "crop", "pad")
_SHOWN = 3  # broken files named in a warning
_GREY = ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N")

T = TypeVar("T")
Size = tuple[int, int]


def find(folder: Path) -> list[Path]:
    """All pictures under a folder in the order of their paths, whatever the order in which the file system has them."""
    paths = (p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(paths, key=lambda path: path.relative_to(folder).parts)


class Pictures:
    """Picture files of which some may be broken: the next readable one takes a broken one's place.

    Which one that is depends on the files alone, not on who read what before.

    Args:
        folder: of the paths, for messages.
        paths: at least one.
        groups: (first, last) of each file's group, inside which the place is taken, cyclically; None: all are one.
    """

    def __init__(self, folder: Path, paths: Sequence[Path], groups: Sequence[tuple[int, int]] | None = None) -> None:
        self.folder, self.paths, self._groups = folder, list(paths), groups
        # Worker processes mark files here.
        self._broken = torch.zeros(len(self.paths), dtype=torch.bool).share_memory_()
        self._reported = 0

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int, reader: Callable[[Path], T]) -> T:
        """What `reader` makes of file `index`, or of the next one that it can read. ValueError if there is none."""
        first, last = (0, len(self)) if self._groups is None else self._groups[index]
        for _ in range(first, last):
            if not self._broken[index]:
                try:
                    return reader(self.paths[index])
                except unreadable():
                    self._broken[index] = True
            index = first + (index + 1 - first) % (last - first)
        of = "" if self._groups is None else f" of the class of {self.paths[first].relative_to(self.folder)}"
        raise ValueError(f"none of the {last - first} images in {self.folder}{of} can be read")

    def report(self, stacklevel: int = 2) -> int:
        """How many files could not be read so far; a warning names them where there are new ones."""
        broken = self._broken.nonzero().flatten().tolist()
        if len(broken) > self._reported:
            warn_broken(self.folder, [self.paths[i] for i in broken], len(self), stacklevel + 1)
            self._reported = len(broken)
        return len(broken)


def warn_broken(folder: Path, broken: Sequence[Path], total: int, stacklevel: int) -> None:
    names = ", ".join(str(path.relative_to(folder)) for path in broken[:_SHOWN])
    more = ", ..." if len(broken) > _SHOWN else ""
    warnings.warn(
        f"{len(broken)} of {total} images in {folder} cannot be read and are skipped: {names}{more}",
        stacklevel=stacklevel + 1,
    )


def size_of(image_size: Any) -> Size:
    """(H, W) of one or two positive numbers."""
    size = tuple(image_size) if isinstance(image_size, (tuple, list)) else (image_size, image_size)
    if len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        raise ValueError(f"image_size must be one or two positive numbers, got {image_size}")
    return size


def fitted(image: Any, size: Size, fit: str) -> Any:
    """A Pillow image at (height, width), bilinear with antialiasing.

    fit: "stretch" whatever the aspect ratio; "crop": the shorter side fits, the centre is kept; "pad": shrunk where it
    is too large, never enlarged, in the middle of black.
    """
    height, width = size
    if image.size == (width, height):
        return image
    bilinear = pillow().Image.Resampling.BILINEAR
    if fit != "pad":
        box = _centre(image.size, (width, height)) if fit == "crop" else None
        return image.resize((width, height), bilinear, box=box)
    scale = min(1, width / image.width, height / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    if inner != image.size:
        image = image.resize(inner, bilinear)
    # Mode "F" is of model range, where black is -1.
    whole = pillow().Image.new(image.mode, (width, height), -1 if image.mode == "F" else 0)
    whole.paste(image, ((width - inner[0]) // 2, (height - inner[1]) // 2))
    return whole


def read(path: Path, size: Size, channels: int, fit: str) -> NDArray[np.uint8]:
    """uint8 (channels, H, W), channels 1 or 3, of a picture of any size and mode.

    Transparent parts are put on white, 16-bit grey is brought to 8 bits, orientation tags are followed. Raises one of
    `unreadable()` for a broken file, and for floats and 32-bit integers, whose range nobody knows.
    """
    with pillow().Image.open(path) as opened:
        # JPEG only: decodes at 1/2, 1/4 or 1/8 where that is still twice what is needed, and several times faster.
        opened.draft(None, (2 * max(size), 2 * max(size)))
        image = fitted(_plain(pillow().ImageOps.exif_transpose(opened), channels), size, fit)
        pixels = np.array(image, dtype=np.uint8).reshape(*size, channels)
    return np.moveaxis(pixels, 2, 0)


def header(path: Path) -> tuple[Size, bool]:
    """((H, W) as it is seen, whether it is grey) without decoding it."""
    with pillow().Image.open(path) as image:
        width, height = image.size
        # Of a PNG that is after the pixels, and as good as never there.
        if image.format != "PNG" and image.getexif().get(0x0112, 1) in (5, 6, 7, 8):
            width, height = height, width
        return (height, width), image.mode in _GREY


def _plain(image: Any, channels: int) -> Any:
    """In mode L or RGB."""
    mode = "L" if channels == 1 else "RGB"
    if image.mode == "F" or (image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] < 2**16):
        raise ValueError(f"pixels of mode {image.mode} have no known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow's own conversion cuts everything above 255 off.
        image = pillow().Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = pillow().Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        image = white
    return image if image.mode == mode else image.convert(mode)


def _centre(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box (left, top, right, bottom) of the target's aspect ratio in the middle of an image (w, h)."""
    scale = min(size[0] / target[0], size[1] / target[1])
    width, height = target[0] * scale, target[1] * scale
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def unreadable() -> tuple[type[Exception], ...]:
    """What Pillow raises for files that are cut off, of another kind, or absurdly large."""
    return OSError, SyntaxError, ValueError, EOFError, struct.error, pillow().Image.DecompressionBombError


def pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageMode
        import PIL.ImageOps
    except ImportError as error:
        raise ImportError("reading images needs Pillow; pip install ddpm_fast[images]") from error
    return PIL


def some_workers(images: int, *, few: int = 1000, most: int = 8) -> int:
    """How many processes read so many images: none for a few, which are read as fast as processes are started, else
    half of this process's processors, those of torchrun's other processes on the machine left to them."""
    if images <= few:
        return 0
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return min(most, max(1, processors // (2 * max(1, int(beside) if beside.isdigit() else 1))))
