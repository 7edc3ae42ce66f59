"""Where drawn samples lie until all are there: one PNG per image, or blocks of arrays; and the manifest beside them.

What exists is known by its name, and a name appears only when the file under it is whole. So a run that was killed goes
on from what is there, with any number of processes, and none of them asks another.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .errors import CommandError

MANIFEST = "sample.json"
IMAGES, PARTS = "images", "parts"
ZLIB_LEVEL = 1  # a higher one saves a few per cent of the space for several times the work
_SLICE = 16  # images per task of a writing thread
_PENDING = 64  # tasks under way before drawing waits for the disk

Array = np.ndarray[Any, Any]


@contextlib.contextmanager
def replacing(path: Path, sync: bool = False) -> Iterator[Any]:
    """A binary file that takes the name `path` when everything has been written to it, and leaves nothing otherwise.

    sync: after it has reached the disk. Without it a power failure can leave an empty file, which counts as missing.
    """
    beside = path.with_name(path.name + ".part")  # one name per file: whoever draws it again overwrites what was left
    try:
        with open(beside, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a failed write does not say of what, a failed rename says both names
            error.filename, error.filename2 = str(path), None
        raise


class Store(ABC):
    """A folder of samples by index. `put` returns at once; threads write. Use as a context: its end waits for them.

    An error of a writing thread (OSError) is raised by the next `put` or at the end.
    """

    def __init__(self, folder: Path, threads: int = 1) -> None:
        self.folder = folder
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="writer")
        self._pending: collections.deque[Future[None]] = collections.deque()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            while self._pending:
                task = self._pending.popleft()
                if kind is None:
                    task.result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=isinstance(kind, type) and issubclass(kind, OSError))

    def make(self) -> None:
        """The folder itself."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def put(self, wanted: Sequence[int], first: int, samples: Array) -> None:
        """Writes those of samples first, first + 1, ... that are wanted (ascending)."""
        for part in self._tasks(wanted):
            rows = samples[[i - first for i in part]]
            self._pending.append(self._pool.submit(self._write, part, rows))
        while self._pending and (len(self._pending) > _PENDING or self._pending[0].done()):
            self._pending.popleft().result()

    def missing(self, indices: range) -> list[int]:
        """The indices, ascending, of which there is no sample."""
        present = self._present(indices)
        return [i for i in indices if i not in present]

    @abstractmethod
    def read(self, indices: range) -> Iterator[Array]:
        """The samples in order, some at a time; FileNotFoundError or ValueError naming a file that is amiss."""

    @abstractmethod
    def _tasks(self, wanted: Sequence[int]) -> Iterator[Sequence[int]]: ...

    @abstractmethod
    def _write(self, indices: Sequence[int], samples: Array) -> None: ...

    @abstractmethod
    def _present(self, indices: range) -> set[int]: ...

    def _sizes(self, pattern: re.Pattern[str]) -> Iterator[re.Match[str]]:
        """Names in the folder that match; an empty file is what a power failure left."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            for entry in entries:
                match = pattern.fullmatch(entry.name)
                with contextlib.suppress(FileNotFoundError):
                    if match and entry.stat().st_size:
                        yield match


class PngStore(Store):
    """uint8 (C, H, W), C = 1 or 3, as images/000000123.png, named by index whatever is asked for beside it."""

    _NAME = re.compile(r"(\d{9,})\.png")

    def __init__(self, out: Path, shape: tuple[int, ...], threads: int = 1) -> None:
        super().__init__(out / IMAGES, threads)
        self.shape = shape
        try:
            from PIL import Image
        except ImportError as error:
            raise CommandError("PNG files need Pillow: pip install ddpm_fast[train], or pass --no-png") from error
        self._image: Any = Image

    def path(self, index: int) -> Path:
        """Of one image."""
        return self.folder / f"{index:09d}.png"

    def read(self, indices: range) -> Iterator[Array]:
        c, h, w = self.shape
        for index in indices:
            path = self.path(index)
            try:
                with self._image.open(path) as picture:
                    pixels = np.asarray(picture).reshape(h, w, c)
            except FileNotFoundError:
                raise
            except (OSError, ValueError, SyntaxError) as error:
                raise ValueError(
                    f"{path} is broken or another picture ({error}); delete it and run the same command again"
                ) from None
            yield np.ascontiguousarray(pixels.transpose(2, 0, 1))[None]

    def _tasks(self, wanted: Sequence[int]) -> Iterator[Sequence[int]]:
        for i in range(0, len(wanted), _SLICE):
            yield wanted[i : i + _SLICE]

    def _write(self, indices: Sequence[int], samples: Array) -> None:
        for index, pixels in zip(indices, samples, strict=True):
            buffer = io.BytesIO()
            picture = pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
            self._image.fromarray(picture).save(buffer, format="PNG", compress_level=ZLIB_LEVEL)
            with replacing(self.path(index)) as file:
                file.write(buffer.getvalue())

    def _present(self, indices: range) -> set[int]:
        found = (int(match[1]) for match in self._sizes(self._NAME))
        return {i for i in found if i in indices}


class ArrayStore(Store):
    """Samples of any shape and dtype, in runs of consecutive indices, as parts/000000000-000000064.npy."""

    _NAME = re.compile(r"(\d{9,})-(\d{9,})\.npy")

    def __init__(self, out: Path, shape: tuple[int, ...], dtype: Any, threads: int = 1) -> None:
        super().__init__(out / PARTS, threads)
        self.shape, self.dtype = shape, np.dtype(dtype)

    def path(self, first: int, last: int) -> Path:
        """Of samples first .. last - 1."""
        return self.folder / f"{first:09d}-{last:09d}.npy"

    def read(self, indices: range) -> Iterator[Array]:
        at = indices.start
        for first, last in self._parts():
            if first <= at < min(last, indices.stop):
                stop = min(last, indices.stop)
                yield self._load(first, last)[at - first : stop - first]
                at = stop
        if at < indices.stop:
            raise FileNotFoundError(f"no sample {at} in {self.folder}")

    def _load(self, first: int, last: int) -> Array:
        path = self.path(first, last)
        try:
            rows: Array = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is broken ({error}); delete it and run the same command again") from None
        if rows.shape != (last - first, *self.shape) or rows.dtype != self.dtype:
            raise ValueError(f"{path} holds {rows.dtype} {rows.shape}; delete it and run the same command again")
        return rows

    def _parts(self) -> list[tuple[int, int]]:
        return sorted((int(match[1]), int(match[2])) for match in self._sizes(self._NAME))

    def _tasks(self, wanted: Sequence[int]) -> Iterator[Sequence[int]]:
        start = 0
        for i in range(1, len(wanted) + 1):
            if i == len(wanted) or wanted[i] != wanted[i - 1] + 1:
                yield wanted[start:i]
                start = i

    def _write(self, indices: Sequence[int], samples: Array) -> None:
        with replacing(self.path(indices[0], indices[-1] + 1)) as file:
            np.save(file, samples, allow_pickle=False)

    def _present(self, indices: range) -> set[int]:
        return {i for first, last in self._parts() for i in range(max(first, indices.start), min(last, indices.stop))}


def claim(out: Path, identity: dict[str, Any]) -> None:
    """Writes the manifest, or, where there is one, raises CommandError unless it says the same."""
    path = out / MANIFEST
    text = json.dumps(identity, indent=2) + "\n"
    if not path.exists():
        for kind in (IMAGES, PARTS):
            if (out / kind).is_dir() and any((out / kind).iterdir()):
                raise CommandError(f"{out / kind} holds files, but no {path} says of what; choose another --out")
        _write_once(path, text)
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        there = None
    now = json.loads(text)
    if not isinstance(there, dict) or there.get("format") != now["format"]:
        raise CommandError(f"{path} is no manifest of samples; choose another --out")
    differing = [key for key in {**now, **there} if there.get(key) != now.get(key)]
    if differing:
        said = "; ".join(f"{key} {_shown(there.get(key))} there, {_shown(now.get(key))} now" for key in differing)
        raise CommandError(f"{out} holds samples of another kind ({said}); choose another --out, or the same options")


def _shown(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _write_once(path: Path, text: str) -> None:
    """Whole or not at all, and never over another process's: what is there is compared afterwards."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        try:
            os.link(beside, path)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
