"""A folder of pictures as training data."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .data.pictures import SUFFIXES, Pictures, find, fitted, pillow, size_of, some_workers

FITS = ("stretch", "crop")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of Pillow, by channels
_FEW_IMAGES = 1000  # so many are read as fast as processes for it are started


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
        self.image_size = size_of(image_size)
        if fit not in FITS:
            raise ValueError(f"fit must be {' or '.join(FITS)}, got {fit!r}")
        if not self.folder.is_dir():
            raise FileNotFoundError(f"no folder {self.folder} to read images from")
        self.horizontal_flip, self.mode, self.fit = horizontal_flip, mode, fit
        self._pictures = Pictures(self.folder, find(self.folder))
        if not self.paths:
            raise ValueError(f"{self.folder} and its subfolders hold no image; looked for {', '.join(SUFFIXES)}")

    @property
    def paths(self) -> list[Path]:
        return self._pictures.paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return self._pictures.read(index, self._read)

    def _read(self, path: Path) -> Tensor:
        height, width = self.image_size
        with pillow().Image.open(path) as opened:
            image = fitted(opened if opened.mode == self.mode else opened.convert(self.mode), self.image_size, self.fit)
            image.load()
        if self.horizontal_flip and torch.rand(1) < 0.5:
            image = image.transpose(pillow().Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels.view(height, width, -1).permute(2, 0, 1).contiguous().float().div(255)

    def report_broken(self) -> int:
        """How many files could not be read so far; a warning names them where there are new ones."""
        return self._pictures.report()


def loader(data: ImageFolder, batch_size: int, *, workers: int | None = None) -> DataLoader[Tensor]:
    """Shuffled batches (N, C, H, W), the last one of an epoch smaller.

    workers: processes that read; None: none for up to 1000 images, else half of the processors, at most 8.
    """
    if workers is None:
        workers = some_workers(len(data), few=_FEW_IMAGES)
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
    try:
        kind = pillow().ImageMode.getmode(mode)
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
