"""What `ddpm-fast sample` makes of the samples in a folder: grid.png, samples.npz or .safetensors, reverse.gif."""

from __future__ import annotations

import dataclasses
import json
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import viz
from ..sampler import Sampler
from .sample_store import Array, Store, replacing

GRID, NPZ, SAFETENSORS, GIF = "grid.png", "samples.npz", "samples.safetensors", "reverse.gif"
_IN_GRID, _IN_GIF = 64, 16
_MOST_COLUMNS = 20
_SIDE = 64  # pixels to which smaller images are enlarged
_FRAMES, _FPS = 50, 12

Labels = tuple[int, ...] | None
"""Classes in turn: sample g has label labels[g % len(labels)], whoever draws it and however many are drawn."""


def labels_of(labels: tuple[int, ...], indices: range) -> Tensor:
    """int64 labels of these samples."""
    table = torch.tensor(labels, dtype=torch.int64)
    return table[torch.arange(indices.start, indices.stop, dtype=torch.int64) % len(labels)]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which of the samples are shown, and how: one column a class where classes are drawn in turn."""

    shown: range
    columns: int
    column_labels: list[str] | None
    row_labels: list[str] | None

    @classmethod
    def of(cls, indices: range, labels: Labels, most: int, name: Callable[[int], str]) -> Layout:
        """At most about `most` samples of `indices`, the first ones."""
        several = labels is not None and 1 < len(labels) <= _MOST_COLUMNS
        if labels is not None and several:
            columns = min(len(labels), len(indices))
            rows = min(max(1, round(most / columns)), -(-len(indices) // columns))
        else:
            columns = min(len(indices), int(np.ceil(np.sqrt(min(most, len(indices))))))
            rows = min(-(-most // columns), -(-len(indices) // columns))
        shown = indices[: rows * columns]
        names = [] if labels is None else [name(int(label)) for label in labels_of(labels, shown)]
        one = labels is not None and len(labels) == 1
        return cls(
            shown,
            columns,
            names[:columns] if several else None,
            [names[0], *[""] * (rows - 1)] if one else None,
        )

    def picture(self, samples: Array) -> viz.UInt8Array:
        """The shown samples (n, C, H, W), uint8 or float in [-1, 1], as one picture."""
        scale = max(1, _SIDE // max(samples.shape[2:]))
        labels: dict[str, Any] = {"column_labels": self.column_labels, "row_labels": self.row_labels}
        return viz.grid(torch.from_numpy(samples), self.columns, scale=scale, padding=2 * scale, **labels)


def grid_layout(indices: range, labels: Labels, null: int | None) -> Layout:
    """Of the grid: 64 images or so."""
    return Layout.of(indices, labels, _IN_GRID, _namer(null))


def gif_layout(indices: range, labels: Labels, null: int | None) -> Layout:
    """Of the GIF: the first 16 or so of the same images."""
    return Layout.of(indices, labels, _IN_GIF, _namer(null))


def _namer(null: int | None) -> Callable[[int], str]:
    return lambda label: "none" if label == null else str(label)


def write_grid(path: Path, store: Store, layout: Layout) -> None:
    """The stored samples of the layout as one PNG."""
    samples = np.concatenate(list(store.read(layout.shown)))
    with replacing(path, sync=True) as file:
        viz.save_png(file, layout.picture(samples))


def write_gif(path: Path, sampler: Sampler, layout: Layout, frames: Iterable[Array]) -> None:
    """The reverse process of the layout's samples: about 50 states of it, evenly spaced, the last one held."""
    every = max(1, len(sampler) // _FRAMES)
    last = len(sampler) - 1
    pictures = (layout.picture(x) for row, x in enumerate(frames) if row == last or (last - row) % every == 0)
    with replacing(path, sync=True) as file:
        viz.save_gif(file, pictures, fps=_FPS, hold=3.0, levels=32)


def write_npz(path: Path, store: Store, indices: range, shape: tuple[int, ...], labels: Labels) -> None:
    """arr_0: the samples, pixels as uint8 (N, H, W, C), else float32 (N, *shape); arr_1: int64 labels (N,), if any.

    Written sample by sample: memory does not grow with their number. Uncompressed, as numpy.savez.
    """
    parts = store.read(indices)
    first = next(parts)
    pixels = first.dtype == np.uint8
    one = (*shape[1:], shape[0]) if pixels else shape
    with replacing(path, sync=True) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            _npy_header(entry, first.dtype, (len(indices), *one))
            for rows in _chain(first, parts):
                entry.write(np.ascontiguousarray(np.moveaxis(rows, 1, -1) if pixels else rows).data)
        if labels is not None:
            with archive.open("arr_1.npy", "w") as entry:
                rows = labels_of(labels, indices).numpy()
                _npy_header(entry, rows.dtype, rows.shape)
                entry.write(rows.data)


def _npy_header(file: Any, dtype: Any, shape: tuple[int, ...]) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)


def write_safetensors(path: Path, store: Store, indices: range, shape: tuple[int, ...], labels: Labels) -> None:
    """`samples` (N, *shape), float32 or uint8, and int64 `labels` (N,), if any. Written sample by sample, too."""
    parts = store.read(indices)
    first = next(parts)
    n = len(indices)
    size = n * int(np.prod(shape)) * first.itemsize
    names = {"float32": "F32", "uint8": "U8"}
    header: dict[str, Any] = {}
    begin = 0
    if labels is not None:  # 8-byte numbers come first, so that they lie aligned
        header["labels"] = {"dtype": "I64", "shape": [n], "data_offsets": [0, 8 * n]}
        begin = 8 * n
    header["samples"] = {
        "dtype": names[first.dtype.name],
        "shape": [n, *shape],
        "data_offsets": [begin, begin + size],
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path, sync=True) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if labels is not None:
            file.write(labels_of(labels, indices).numpy().data)
        for rows in _chain(first, parts):
            file.write(np.ascontiguousarray(rows).data)


def _chain(first: Array, rest: Iterator[Array]) -> Iterator[Array]:
    yield first
    yield from rest
