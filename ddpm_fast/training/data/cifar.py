"""CIFAR-10's python batches: the folder, or the .tar.gz as it is downloaded."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
BATCHES = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
_NAMES = "batches.meta"

Array = NDArray[Any]


class _Array:
    """Stands for a NumPy array inside a pickle: NumPy's own code never sees what the file says."""

    shape: tuple[int, ...]
    data: bytes

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.kind, fortran, self.data = state
        if self.kind != "u1" or fortran or not isinstance(self.data, bytes):
            raise pickle.UnpicklingError("an array that is not of bytes")


class _Dtype(str):
    """Stands for a dtype: its name."""

    def __setstate__(self, state: Any) -> None:
        pass


class _Unpickler(pickle.Unpickler):
    """Knows dicts, lists, strings, numbers and arrays of bytes; anything else in a file is an error and never runs."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Callable[..., Any]] = {
            ("multiarray", "_reconstruct"): lambda *_: _Array(),
            ("numpy", "ndarray"): lambda: None,
            ("numpy", "dtype"): lambda kind, *_: _Dtype(kind if isinstance(kind, str) else kind.decode("ascii")),
            # How Python 3 writes bytes in an old pickle.
            ("_codecs", "encode"): lambda text, encoding: text.encode("latin1"),
        }
        for prefix in ("numpy.core.", "numpy._core."):
            module = module.removeprefix(prefix)
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return known[module, name]


def is_folder(folder: Path) -> bool:
    return any((folder / batches[0]).is_file() for batches in BATCHES.values())


def _unpickled(content: bytes, name: str) -> dict[str, Any]:
    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in batch.items()}
    except Exception as error:  # a damaged pickle raises anything
        raise ValueError(f"{name} is not a CIFAR-10 python batch, or is damaged: {error}") from None


def _batch(content: bytes, name: str) -> tuple[Array, Array]:
    batch = _unpickled(content, name)
    data, labels = batch.get("data"), batch.get("labels")
    if not isinstance(data, _Array) or not isinstance(labels, list) or not all(type(y) is int for y in labels):
        raise ValueError(f"{name} is not a CIFAR-10 python batch: it must hold data and labels, got {list(batch)}")
    if data.shape != (len(labels), 3072) or len(data.data) != 3072 * len(labels):
        raise ValueError(f"{name}: data must have shape ({len(labels)}, 3072) as it has labels, got {data.shape}")
    return np.frombuffer(data.data, np.uint8).reshape(-1, 3, 32, 32), np.array(labels, np.int64)


def load(path: Path, split: str) -> tuple[Array, Array, list[str] | None]:
    """Images (N, 3, 32, 32), labels, names of the classes, of a folder or an archive."""
    names = (*BATCHES[split], _NAMES)
    if path.is_dir():
        contents = {name: (path / name).read_bytes() for name in names if (path / name).is_file()}
    else:
        contents = _from_archive(path, names)
    missing = [name for name in BATCHES[split] if name not in contents]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)} of CIFAR-10's python batches")
    parts = [_batch(contents[name], f"{path}: {name}") for name in BATCHES[split]]
    known = _unpickled(contents[_NAMES], f"{path}: {_NAMES}").get("label_names") if _NAMES in contents else None
    return (
        np.concatenate([images for images, _ in parts]),
        np.concatenate([labels for _, labels in parts]),
        [name.decode() if isinstance(name, bytes) else str(name) for name in known] if known else None,
    )


def _from_archive(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Of the members with these names; nothing is extracted."""
    contents = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if member.isfile() and name in names:
                    file = archive.extractfile(member)
                    contents[name] = b"" if file is None else file.read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} is cut off, or no .tar.gz: {error}") from None
    return contents
