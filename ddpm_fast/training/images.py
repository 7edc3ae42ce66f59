"""A folder of pictures as training data."""

from __future__ import annotations

import os
import signal
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

SUFFIXES = (".jpg", ".jpeg", ".png", ".tiff", ".tif", ".bmp", ".webp")
FITS = ("stretch", "crop")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels
_MOST_WORKERS = 8
_FEW_IMAGES = 1000  # so many are read as fast as processes for it are started
_SHOWN = 3  # broken files named in a warning


class ImageFolder(Dataset[Tensor]):
    """All pictures under a folder, its subfolders included, in the order of their paths; float32 (C, H, W) in [0, 1].

    A file that cannot be read is replaced by the next one that can; `report_broken` says which they were. Neither the
    order nor the suffix's case depends on the file system. Orientation tags are not followed.

    Args:
        folder: searched for .jpg, .jpeg, .png, .tiff, .tif, .bmp, .webp.
        image_size: (H, W) or one number for both, pixels; bilinear.
        horizontal_flip: mirrors every other image, by torch's generator.
        mode: Pillow's name of what images are converted to: "L", "RGB", "RGBA", ... of 8 bits a channel.
        fit: "stretch" to the size whatever the aspect ratio, or "crop": the shorter side fits, the centre is kept.

    Raises FileNotFoundError for a missing folder, ValueError for one without images and bad arguments, ImportError
    without Pillow.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        image_size: int | tuple[int, int],
        *,
        horizontal_flip: bool = False,
        mode: str = "RGB",
        fit: str = "stretch",
    ) -> None:
        channels_of(mode)
        self.folder = Path(folder)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise ValueError(f"image_size must be one or two positive numbers, got {image_size}")
        if fit not in FITS:
            raise ValueError(f"fit must be {' or '.join(FITS)}, got {fit!r}")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {self.folder} to read images from")
        self.horizontal_flip, self.mode, self.fit = horizontal_flip, mode, fit
        self.paths = sorted(p for p in self.folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not self.paths:
            raise ValueError(f"{self.folder} and its subfolders hold no image; looked for {', '.join(SUFFIXES)}")
        # Worker processes mark files here.
        self._broken = torch.zeros(len(self.paths), dtype=torch.bool).share_memory_()
        self._reported = 0

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        for _ in range(len(self.paths)):
            if not self._broken[index]:
                try:
                    return self._read(self.paths[index])
                except _unreadable():
                    self._broken[index] = True
            index = (index + 1) % len(self.paths)
        raise ValueError(f"none of the {len(self.paths)} images in {self.folder} can be read")

    def _read(self, path: Path) -> Tensor:
        pillow = _pillow().Image
        height, width = self.image_size
        with pillow.open(path) as opened:
            image = opened if opened.mode == self.mode else opened.convert(self.mode)
            box = _centre(image.size, (width, height)) if self.fit == "crop" else None
            image = image.resize((width, height), pillow.Resampling.BILINEAR, box=box)
        if self.horizontal_flip and torch.rand(1) < 0.5:
            image = image.transpose(pillow.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels.view(height, width, -1).permute(2, 0, 1).contiguous().float().div(255)

    def report_broken(self) -> int:
        """How many files could not be read so far; a warning names them where there are new ones."""
        broken = self._broken.nonzero().flatten().tolist()
        if len(broken) > self._reported:
            names = ", ".join(str(self.paths[i].relative_to(self.folder)) for i in broken[:_SHOWN])
            more = ", ..." if len(broken) > _SHOWN else ""
            warnings.warn(
                f"{len(broken)} of {len(self)} images in {self.folder} cannot be read and are skipped: {names}{more}",
                stacklevel=2,
            )
            self._reported = len(broken)
        return len(broken)


def loader(data: ImageFolder, batch_size: int, *, workers: int | None = None) -> DataLoader[Tensor]:
    """Shuffled batches (N, C, H, W), the last one of an epoch smaller.

    workers: processes that read; None: none for up to 1000 images, else half of the processors, at most 8.
    """
    if workers is None:
        processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if len(data) <= _FEW_IMAGES else min(_MOST_WORKERS, max(1, processors // 2))
    return DataLoader(
        data,
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_ignore_interrupts,
    )


def endless(batches: DataLoader[Tensor]) -> Iterator[Tensor]:
    """Epoch after epoch; after each a warning, if it met broken files."""
    while True:
        yield from batches
        if isinstance(batches.dataset, ImageFolder):
            batches.dataset.report_broken()


def channels_of(mode: str) -> int:
    """How many channels an image of this mode has. ValueError for what Pillow does not know, or not in 8 bits."""
    pillow = _pillow()
    try:
        kind = pillow.ImageMode.getmode(mode)
        if np.dtype(kind.typestr) != np.uint8:
            raise KeyError
    except (KeyError, AttributeError):
        raise ValueError(
            f"images are converted to L, RGB, RGBA or another 8-bit mode of Pillow, got {mode!r}"
        ) from None
    return len(kind.bands)


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C is for the process that trains: it ends the step, and can go on with its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _centre(size: tuple[int, int], target: tuple[int, int]) -> tuple[float, float, float, float]:
    """The largest box (left, top, right, bottom) of the target's aspect ratio in the middle of an image (w, h)."""
    scale = min(size[0] / target[0], size[1] / target[1])
    width, height = target[0] * scale, target[1] * scale
    left, top = (size[0] - width) / 2, (size[1] - height) / 2
    return left, top, left + width, top + height


def _unreadable() -> tuple[type[Exception], ...]:
    """What Pillow raises for files that are cut off, of another kind, or absurdly large."""
    return OSError, SyntaxError, ValueError, EOFError, struct.error, _pillow().Image.DecompressionBombError


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageMode
    except ImportError as error:
        raise ImportError("reading images needs Pillow; pip install ddpm_fast[images]") from error
    return PIL
