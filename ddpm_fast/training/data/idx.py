"""IDX files, as MNIST and its family come: a magic number, the sizes, the bytes; gzipped or not."""

from __future__ import annotations

import gzip
import math
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
_PARTS = {"train": "train", "test": "(?:t10k|test)"}


class Files(NamedTuple):
    images: Path
    labels: Path | None


def find(folder: Path, split: str) -> Files | None:
    """The IDX files of a split by their usual names (train-images-idx3-ubyte.gz, t10k-labels.idx1-ubyte, ...)."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    pattern = rf"(.*{_PARTS[split]}-)images([-.]idx)[34](-ubyte(?:\.gz)?)"
    matches = [match for match in (re.fullmatch(pattern, name) for name in names) if match]
    if not matches:
        return None
    # A file beside its own gzipped form is one; two sets are not.
    sets = {match[1] for match in matches}
    if len(sets) > 1:
        raise ValueError(f"{folder} has several sets of IDX files ({', '.join(sorted(sets))}): give one images file")
    return of_images(folder / matches[0][0])


def is_idx(path: Path) -> bool:
    return re.fullmatch(r".*idx[0-9]-ubyte(\.gz)?", path.name) is not None


def of_images(images: Path) -> Files:
    """With the labels that lie beside the images, gzipped or not."""
    stem = re.sub(r"images([-.]idx)[0-9](-ubyte)(\.gz)?$", r"labels\g<1>1\g<2>", images.name)
    for name in (stem, f"{stem}.gz"):
        if stem != images.name and (images.parent / name).is_file():
            return Files(images, images.parent / name)
    return Files(images, None)


def read(path: Path, dims: tuple[int, ...]) -> Array:
    """uint8 of as many dimensions as are allowed. ValueError for another kind of file, and one that is too short or
    too long."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            magic = file.read(4)
            if len(magic) < 4 or magic[:3] != b"\0\0\x08" or magic[3] not in dims:
                expected = " or ".join(f"00 00 08 {n:02x}" for n in dims)
                raise ValueError(f"{path} is not an IDX file of bytes: it must begin {expected}, got {magic.hex(' ')}")
            sizes = file.read(4 * magic[3])
            shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4")) if len(sizes) == 4 * magic[3] else ()
            if not shape or 0 in shape:
                raise ValueError(f"{path} is cut off, or empty: its header has no sizes")
            count = math.prod(shape)
            values = file.read(count)
            if len(values) < count or file.read(1):
                got = f"only {len(values):,}" if len(values) < count else "more"
                raise ValueError(f"{path} must hold {count:,} bytes after its header, got {got}: download it again")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}): download it again") from None
    return np.frombuffer(values, np.uint8).reshape(shape)


def load(files: Files) -> tuple[Array, Array | None]:
    """Images (N, H, W) or of four dimensions, labels (N,)."""
    return read(files.images, (3, 4)), None if files.labels is None else read(files.labels, (1,))
