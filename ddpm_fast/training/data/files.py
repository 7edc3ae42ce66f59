"""Arrays and tensors in one file: .npz, .npy, .pt, .safetensors."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SUFFIXES = (".npz", ".npy", ".pt", ".pth", ".safetensors")
_IMAGES = ("images", "x", "latents", "arr_0", "data")
_LABELS = ("labels", "y", "arr_1", "targets")
_SPLITS = {"train": ("train",), "test": ("test", "val")}


def load(path: Path, split: str) -> tuple[Any, Any]:
    """(images, labels or None) of a file with one tensor, or with named ones: images | x | latents | arr_0 | data and
    labels | y | arr_1 | targets, or those of a split: x_train, train_images, ... (test: x_test, val_images, ...)."""
    content = _read(path)
    if not isinstance(content, Mapping):
        content = {"images": content}
    names = [name for name in content if isinstance(name, str)]
    parts: tuple[str | None, ...] = _SPLITS[split]
    if split == "train":
        parts = (*parts, None)
    pairs = [(_first(names, _IMAGES, part), _first(names, _LABELS, part)) for part in parts]
    images, labels = next((pair for pair in pairs if pair[0]), (None, None))
    if images is None and split == "train" and len(names) == 1:
        images = names[0]
    if images is None:
        wanted = "images, x, latents or arr_0" if split == "train" else "x_test or test_images"
        raise ValueError(f"{path} has no {split} images: they are looked for as {wanted}, it has {', '.join(names)}")
    try:
        return content[images], None if labels is None else _flat(content[labels])
    except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: {images} cannot be read: {error}") from None


def _first(names: list[str], known: tuple[str, ...], part: str | None = None) -> str | None:
    wanted = known if part is None else [n for name in known for n in (f"{name}_{part}", f"{part}_{name}")]
    return next((name for name in wanted if name in names), None)


def _flat(labels: Any) -> Any:
    """(N, 1) -> (N,), as MedMNIST has them."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _read(path: Path) -> Any:
    """An array or tensor, or a mapping of them."""
    try:
        if path.suffix in (".npz", ".npy"):
            return np.load(path, allow_pickle=False)
        if path.suffix == ".safetensors":
            return _safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} must be what torch.save wrote of a tensor or a dict of tensors, no objects") from None
    except ImportError:
        raise
    except Exception as error:  # torch.load and zipfile raise anything for damaged files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no {path.suffix} file, or is damaged: {reason}") from None


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError("reading .safetensors needs safetensors; pip install ddpm_fast[interop]") from error
    try:
        return dict(load_file(path))
    except SafetensorError as error:
        raise ValueError(str(error)) from None
