"""`open_data`: from a name or a path to data."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import arrays, cifar, files, idx, letters
from .base import Data, TensorData, as_images
from .folder import open_folder
from .pictures import FITS, SUFFIXES

SOURCES = ("fashion-mnist", "mnist", "cifar10", "digits", "letters", "emnist-letters", "folder", "npz", "idx")
SPLITS = ("train", "test")
_DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_GET = {
    "fashion-mnist": "apt install dataset-fashion-mnist, or ",
    "cifar10": f"download {cifar.ARCHIVE} from https://www.cs.toronto.edu/~kriz/cifar.html, and ",
}


def open_data(
    source: str | os.PathLike[str],
    *,
    path: str | os.PathLike[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    fit: str = "crop",
    split: str = "train",
    labels: bool = True,
) -> Data:
    """Data to train on, of files or by its name.

    Args:
        source: "fashion-mnist", "mnist", "cifar10", "emnist-letters", "digits" (scikit-learn's), "letters" (A..Z,
            rendered), or "folder", "npz", "idx" with `path`; or just a path: a folder of pictures, of IDX files or of
            CIFAR-10's batches, an .npz, .npy, .pt, .safetensors or IDX file, cifar-10-python.tar.gz.
        path: where the source's files are. None: for a known name the folders of $DDPM_FAST_DATA, and for
            fashion-mnist where Debian's package dataset-fashion-mnist puts them.
        image_size: one number or (H, W), pixels; None: as they are.
        channels: 1 or 3, converted; None: as they are (of a folder 1 if those looked at are grey, else 3).
        fit: how images of another size get there: "crop" (the shorter side fits, the centre is kept), "stretch", or
            "pad" (never enlarged, in the middle of black).
        split: "train" or "test", where the source has parts.
        labels: False leaves them out.

    Images come as uint8 (C, H, W); what a file holds as floats, in model range or latents, as float32. Labels of a
    folder are its subfolders, where all pictures lie in two or more of them.

    Raises ValueError for bad arguments and damaged files, FileNotFoundError with where it was looked for, ImportError
    for a missing package.
    """
    for name, value, known in (("fit", fit, FITS), ("split", split, SPLITS)):
        if value not in known:
            raise ValueError(f"{name} must be {', '.join(known[:-1])} or {known[-1]}, got {value!r}")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 or 3, or None for as many as there are, got {channels!r}")
    kind, where, name = _kind(source, None if path is None else Path(path), split)
    if kind == "folder":
        return open_folder(where, image_size=image_size, channels=channels, fit=fit, split=split, labels=labels)
    images, known_labels, class_names = _load(kind, where, split)
    tensor = as_images(images)
    if isinstance(images, np.ndarray):
        tensor = arrays.channels_first(tensor)
    tensor = arrays.resized(arrays.with_channels(tensor, channels, name), image_size, fit, name)
    if not labels or known_labels is None:
        return TensorData(tensor, name=name)
    if name == "fashion-mnist":
        class_names = _FASHION
    num_classes = None if class_names is None else len(class_names)
    return TensorData(tensor, known_labels, name=name, num_classes=num_classes, class_names=class_names)


def _load(kind: str, where: Path, split: str) -> tuple[Any, Any, Sequence[str] | None]:
    """Images, labels or None, names of the classes or None."""
    if kind == "idx":
        found = idx.find(where, split) if where.is_dir() else idx.of_images(where)
        if found is None:
            raise FileNotFoundError(f"{where} has no IDX files of the {split} part, as {_idx_names(split)}")
        return *idx.load(found), None
    if kind == "cifar10":
        return cifar.load(where, split)
    if kind == "digits":
        return *_digits(split), None
    if kind == "letters":
        return *letters.rendered(split), letters.NAMES
    if kind == "emnist-letters":
        return *letters.emnist(where), letters.NAMES
    return *files.load(where, split), None


def _kind(source: str | os.PathLike[str], path: Path | None, split: str) -> tuple[str, Path, str]:
    """How the data is read ("folder", "idx", "cifar10", "digits", "letters", "emnist-letters", or "npz" for all files
    of arrays), where it is, and its name."""
    if source in ("digits", "letters"):
        if path is not None:
            origin = "come with scikit-learn" if source == "digits" else "are rendered here"
            raise ValueError(f"{source} {origin}: path must be None")
        return str(source), Path(), str(source)
    if source == "emnist-letters":
        return str(source), letters.find_emnist(path, split), str(source)
    if source in ("fashion-mnist", "mnist", "cifar10"):
        kind = "cifar10" if source == "cifar10" else "idx"
        return kind, _known(str(source), path, split), str(source)
    if source in SOURCES:
        if path is None:
            raise ValueError(f"source {source!r} needs path, where it is")
        if not path.exists():
            raise FileNotFoundError(f"no {path} to read {source} data from")
        if (source == "npz" and not path.is_file()) or (source == "folder" and not path.is_dir()):
            raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'a file'}, source is {source!r}")
        return str(source), path, _stem(path)
    if path is not None:
        raise ValueError(f"source must be {', '.join(SOURCES)}, or a path alone, got {source!r} with path")
    return _of_path(Path(source))


def _of_path(path: Path) -> tuple[str, Path, str]:
    if path.is_dir():
        if cifar.is_folder(path):
            return "cifar10", path, "cifar10"
        return "idx" if any(idx.find(path, split) for split in SPLITS) else "folder", path, _stem(path)
    if path.is_file():
        if idx.is_idx(path):
            return "idx", path, _stem(path)
        if path.suffix in files.SUFFIXES:
            return "npz", path, _stem(path)
        if path.name.endswith((".tar.gz", ".tgz", ".tar")):
            return "cifar10", path, "cifar10"
        hint = ": a picture's folder is meant" if path.suffix.lower() in SUFFIXES else ""
        raise ValueError(
            f"{path} is no kind of data that is known ({', '.join(files.SUFFIXES)}, IDX, CIFAR-10's .tar.gz){hint}"
        )
    near = difflib.get_close_matches(str(path), SOURCES, 1)
    did = f"did you mean {near[0]!r}? " if near else ""
    raise FileNotFoundError(f"no folder or file {path}; {did}Known by name are {', '.join(SOURCES)}")


def _known(source: str, path: Path | None, split: str) -> Path:
    """Where a known source's files are, under their usual folders too."""
    usual = {"fashion-mnist": ("fashion-mnist", "FashionMNIST/raw"), "mnist": ("mnist", "MNIST/raw")}
    below = usual.get(source, ("cifar10", ".", f"cifar10/{cifar.FOLDER}", cifar.FOLDER))
    if path is not None:
        candidates = [path, *(path / sub for sub in below)]
    else:
        root = os.environ.get("DDPM_FAST_DATA")
        candidates = [Path(root) / sub for sub in below] if root else []
        candidates += [_DEBIAN] if source == "fashion-mnist" else []
    candidates = list(dict.fromkeys(candidates))
    for candidate in candidates:
        if source == "cifar10":
            for place in (candidate, candidate / cifar.ARCHIVE):
                if place.is_file() or cifar.is_folder(place):
                    return place
        elif candidate.is_dir() and idx.find(candidate, split):
            return candidate
    looked = ", ".join(map(str, candidates)) or "nowhere, for neither path nor DDPM_FAST_DATA is given"
    what = f"{cifar.ARCHIVE}, or its folder {cifar.FOLDER}" if source == "cifar10" else _idx_names(split)
    get = _GET.get(source, "")
    raise FileNotFoundError(
        f"no {source} data found, looked in: {looked}. To have it, {get}put {what} into a folder and give it as path; "
        "digits needs nothing but scikit-learn"
    )


def _idx_names(split: str) -> str:
    part = "train" if split == "train" else "t10k"
    return f"{part}-images-idx3-ubyte.gz and {part}-labels-idx1-ubyte.gz"


def _stem(path: Path) -> str:
    name = path.resolve().name
    return name.partition(".")[0] or name


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, 8, 8): every fifth one is of the test part."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("digits come with scikit-learn; pip install scikit-learn") from error
    digits = load_digits()
    test = np.arange(len(digits.target)) % 5 == 4
    part = test if split == "test" else ~test
    # They are 0..16.
    return np.rint(digits.images[part] * (255 / 16)).astype(np.uint8), digits.target[part]
