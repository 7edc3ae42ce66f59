"""A folder of pictures."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import pictures
from .base import Data, TensorData, as_labels, fingerprint
from .pictures import SUFFIXES, Pictures, Size
from .slow import KEPT, SlowData

_FEW = 1000  # images that are read when the folder is opened
_LOOKED_AT = 64  # of more images, to find out their channels and whether they are large enough
_HASHED = 64 * 2**20  # bytes of files; of larger folders the names, sizes and some files are hashed
_SPLITS = {"train": ("train",), "test": ("test", "val", "valid", "validation")}


class FolderData(SlowData):
    """The pictures of a large folder, uint8 (C, H, W), read when they are needed and kept in memory up to 1 GiB.

    A file that cannot be read is replaced by the next one of its class that can; `prefetch` reports them.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[Path],
        *,
        name: str,
        classes: _Classes | None,
        size: Size,
        channels: int,
        fit: str,
    ) -> None:
        self.name, self.shape, self.dtype = name, (channels, *size), torch.uint8
        self._size, self._channels, self._fit = size, channels, fit
        self._pictures = Pictures(folder, paths, None if classes is None else classes.groups)
        self.class_names = None if classes is None else classes.names
        if classes is not None:
            self.labels, self.num_classes = as_labels(classes.labels, len(paths), len(classes.names))
        super().__init__(len(paths), keep=len(paths) * int(np.prod(self.shape)) <= KEPT)

    def read(self, index: int) -> NDArray[Any]:
        return self._pictures.read(index, self._read)

    def _read(self, path: Path) -> NDArray[Any]:
        return pictures.read(path, self._size, self._channels, self._fit)

    def report_broken(self) -> int:
        return self._pictures.report(stacklevel=3)

    def fingerprint(self) -> str:
        """Of the options, the labels and the files' names and sizes, and of the content of all files if that is not
        more than 64 MiB, else of 64 of them."""
        folder, paths = self._pictures.folder, self._pictures.paths
        sizes = [path.stat().st_size for path in paths]
        names = [f"{path.relative_to(folder).as_posix()} {size}" for path, size in zip(paths, sizes, strict=True)]
        some = paths if sum(sizes) <= _HASHED else [paths[i] for i in _spread(len(paths))]
        head = "\n".join([f"{self.shape} {self._fit}", *names])
        return fingerprint(head, self.labels, *(path.read_bytes() for path in some))


class _Classes:
    """Subfolders as classes, in the order of their names. `labels`, `names`, `groups`: each file's (first, last)."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        above = [path.relative_to(folder).parts[0] for path in paths]
        self.names = tuple(sorted(set(above)))
        number = {name: i for i, name in enumerate(self.names)}
        self.labels = np.array([number[name] for name in above])
        # Paths are in order, so that a class's files are together.
        first = np.searchsorted(self.labels, np.arange(len(self.names) + 1))
        self.groups = [(int(first[label]), int(first[label + 1])) for label in self.labels]


def open_folder(folder: Path, *, image_size: Any, channels: int | None, fit: str, split: str, labels: bool) -> Data:
    """`open_data` of a folder of pictures: up to 1000 are read at once, more when they are needed."""
    name = folder.resolve().name
    folder = _split(folder, split)
    paths = [path for path in pictures.find(folder) if not _hidden(path.relative_to(folder))]
    if not paths:
        raise ValueError(f"{folder} and its subfolders hold no image; looked for {', '.join(SUFFIXES)}")
    classes = _Classes(folder, paths) if labels and _has_classes(folder, paths) else None
    looked_at = _Headers(folder, paths if image_size is None else [paths[i] for i in _spread(len(paths))])
    size = looked_at.one_size() if image_size is None else pictures.size_of(image_size)
    if channels is None:
        channels = 1 if looked_at.grey else 3
    if fit != "pad":
        looked_at.warn_small(size)
    data = FolderData(folder, paths, name=name, classes=classes, size=size, channels=channels, fit=fit)
    return (
        data if len(paths) > _FEW or len(paths) * int(np.prod(data.shape)) > KEPT else _in_memory(data, paths, folder)
    )


def _in_memory(data: FolderData, paths: Sequence[Path], folder: Path) -> TensorData:
    """All that can be read, now; the rest is reported and left out."""
    images = np.empty((len(paths), *data.shape), np.uint8)
    kept: list[int] = []
    broken, why = [], ""
    for i, path in enumerate(paths):
        try:
            images[len(kept)] = data._read(path)
            kept.append(i)
        except pictures.unreadable() as error:
            broken.append(path)
            why = str(error)
    if not kept:
        raise ValueError(f"none of the {len(paths)} images in {folder} can be read; the last one: {why}")
    if broken:
        pictures.warn_broken(folder, broken, len(paths), stacklevel=4)
    labels = None if data.labels is None else data.labels[kept]
    return TensorData(
        images[: len(kept)], labels, name=data.name, num_classes=data.num_classes, class_names=data.class_names
    )


class _Headers:
    """What the first bytes of some files say."""

    def __init__(self, folder: Path, paths: Sequence[Path]) -> None:
        self._folder, self._sizes = folder, dict[Path, Size]()
        self.grey = True
        for path in paths:
            try:
                self._sizes[path], grey = pictures.header(path)
            except pictures.unreadable():
                continue
            self.grey = self.grey and grey
        if not self._sizes:
            count = f"{len(paths)} images" if len(paths) < _LOOKED_AT else f"{len(paths)} images looked at"
            raise ValueError(f"none of the {count} in {folder} can be read")

    def one_size(self) -> Size:
        (first, size), *others = self._sizes.items()
        for path, other in others:
            if other != size:
                (a, b), (c, d) = size, other
                raise ValueError(
                    f"images have several sizes, as {first.relative_to(self._folder)} {a}x{b} and "
                    f"{path.relative_to(self._folder)} {c}x{d} (height x width): give image_size"
                )
        return size

    def warn_small(self, size: Size) -> None:
        small = sum(have[0] < size[0] or have[1] < size[1] for have in self._sizes.values())
        if small:
            warnings.warn(
                f"{small} of {len(self._sizes)} images looked at are smaller than {size[0]}x{size[1]} and are "
                "enlarged; fit='pad' would leave them as they are",
                stacklevel=4,
            )


def _spread(count: int) -> list[int]:
    """Up to 64 evenly spread numbers below count."""
    some = min(count, _LOOKED_AT)
    return [i * count // some for i in range(some)]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _has_classes(folder: Path, paths: Sequence[Path]) -> bool:
    """Whether every picture lies in one of at least two subfolders."""
    parts = [path.relative_to(folder).parts for path in paths]
    return all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) > 1


def _split(folder: Path, split: str) -> Path:
    """The part of a folder that has train/ and test/ (or val/, valid/, validation/); others are all of the training."""
    there = {name: [folder / sub for sub in subs if (folder / sub).is_dir()] for name, subs in _SPLITS.items()}
    if there["train"] and there["test"]:
        return there[split][0]
    if split != "train":
        raise ValueError(f"{folder} has no {split} part: it needs subfolders train and test")
    return folder
