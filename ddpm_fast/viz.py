"""Pictures: grids of samples with labels, PNG and GIF. `grid` needs NumPy only, plots matplotlib, the rest Pillow."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

UInt8Array = np.ndarray[Any, np.dtype[np.uint8]]


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise ImportError("labels, lanczos, PNG and GIF need Pillow; pip install ddpm_fast[images]") from error
    return PIL


def to_uint8(images: Tensor) -> UInt8Array:
    """Model range to pixels: round(clamp((x + 1) * 127.5, 0, 255)), half to even.

    Args:
        images: (N, C, H, W), C = 1 or 3, floating in [-1, 1] (more is clamped), or uint8 (kept).

    Returns:
        uint8 array (N, H, W, C).
    """
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images must have shape (N, 1 or 3, H, W), got {tuple(images.shape)}")
    images = images.detach().cpu()
    if images.dtype != torch.uint8:
        if not images.is_floating_point():
            raise TypeError(f"images must be floating or uint8, got {images.dtype}")
        if bool(torch.isnan(images).any()):
            raise ValueError("images must not hold NaN")
        images = ((images.float() + 1) * 127.5).clamp(0, 255).round().to(torch.uint8)
    return np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def grid(
    images: Tensor | UInt8Array,
    columns: int | Sequence[int] | None = None,
    *,
    scale: int = 1,
    padding: int = 2,
    background: int = 255,
    resample: str = "nearest",
    column_labels: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
) -> UInt8Array:
    """Lays N images out row by row, optionally enlarged and labelled.

    Args:
        images: what `to_uint8` takes, or the array that it returns.
        columns: images a row; a list for every row's own, shorter rows beginning on the left; None is the smallest
            square that holds all.
        scale: whole factor by which each image is enlarged.
        padding: pixels between the images and around them.
        background: grey level 0..255 of the padding and of empty places; labels contrast with it.
        resample: how images are enlarged, "nearest" or "lanczos" (Pillow).
        column_labels: one text a column, written above (Pillow).
        row_labels: one text a row, written to the left (Pillow).

    Returns:
        uint8 array (height, width, 3).
    """
    tiles = to_uint8(images) if isinstance(images, Tensor) else images
    if tiles.ndim != 4 or tiles.dtype != np.uint8 or tiles.shape[3] not in (1, 3):
        raise ValueError(f"images must be uint8 (N, H, W, 1 or 3), got {tiles.dtype} {tiles.shape}")
    count = len(tiles)
    if count < 1:
        raise ValueError("images must hold at least one image, got 0")
    if columns is None:
        columns = int(np.ceil(np.sqrt(count)))
    lengths = [columns] * max(1, -(-count // max(1, columns))) if isinstance(columns, int) else list(columns)
    if not lengths or min(lengths) < 1 or scale < 1 or padding < 0:
        raise ValueError(
            f"columns and scale must be at least 1 and padding at least 0, got {columns}, {scale} and {padding}"
        )
    if not isinstance(columns, int) and sum(lengths) != count:
        raise ValueError(f"columns must be of {count} images in all, got {sum(lengths)}: {lengths}")
    columns, rows = max(lengths), len(lengths)
    places = [(row, column) for row, length in enumerate(lengths) for column in range(length)]
    for name, labels, expected in (
        ("column_labels", column_labels, columns),
        ("row_labels", row_labels, rows),
    ):
        if labels is not None and len(labels) != expected:
            raise ValueError(f"{name} must hold {expected} texts, got {len(labels)}")

    tiles = _enlarge(tiles, scale, resample)
    h, w = tiles.shape[1:3]
    canvas = np.full((rows * (h + padding) + padding, columns * (w + padding) + padding, 3), background, np.uint8)
    for (row, column), tile in zip(places, tiles, strict=False):  # the last row may be short
        top = padding + row * (h + padding)
        left = padding + column * (w + padding)
        canvas[top : top + h, left : left + w] = tile
    if column_labels is None and row_labels is None:
        return canvas
    pitch = (h + padding, w + padding)
    return _write_labels(canvas, background, pitch, padding, column_labels, row_labels)


def _enlarge(tiles: UInt8Array, scale: int, resample: str) -> UInt8Array:
    if resample == "nearest":
        return tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    if resample != "lanczos":
        raise ValueError(f'resample must be "nearest" or "lanczos", got {resample!r}')
    image = _pillow().Image
    size = (tiles.shape[2] * scale, tiles.shape[1] * scale)
    enlarged = [
        np.asarray(
            image.fromarray(tile.squeeze(-1) if tile.shape[-1] == 1 else tile).resize(size, image.Resampling.LANCZOS)
        ).reshape(size[1], size[0], -1)
        for tile in tiles
    ]
    return np.stack(enlarged)


def _write_labels(
    canvas: UInt8Array,
    background: int,
    pitch: tuple[int, int],
    padding: int,
    column_labels: Sequence[str] | None,
    row_labels: Sequence[str] | None,
) -> UInt8Array:
    """Adds a margin above and to the left as the labels need, and centres each text on its row."""
    pil = _pillow()
    size = int(max(11, min(28, 0.42 * min(pitch))))
    font = pil.ImageFont.load_default(size)
    top = int(1.6 * size) if column_labels is not None else 0
    left = 0
    if row_labels is not None:
        left = int(max(font.getlength(text) for text in row_labels)) + size
    ink = 40 if background > 127 else 225
    sheet = np.full((canvas.shape[0] + top, canvas.shape[1] + left, 3), background, np.uint8)
    sheet[top:, left:] = canvas
    image = pil.Image.fromarray(sheet)
    draw = pil.ImageDraw.Draw(image)
    for i, text in enumerate(column_labels or ()):
        x = left + padding + i * pitch[1] + (pitch[1] - padding) // 2
        draw.text((x, top // 2 + 1), text, font=font, fill=(ink,) * 3, anchor="mm")
    for i, text in enumerate(row_labels or ()):
        y = top + padding + i * pitch[0] + (pitch[0] - padding) // 2
        draw.text((left // 2, y), text, font=font, fill=(ink,) * 3, anchor="mm")
    return np.asarray(image)


def caption(picture: UInt8Array, text: str) -> UInt8Array:
    """A copy of a uint8 (H, W, 3) picture with a text in its lower right corner, outlined so that it shows everywhere.

    Raises ImportError without Pillow, ValueError for another kind of array.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"picture must be uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
    pil = _pillow()
    image = pil.Image.fromarray(picture.copy())
    size = max(11, min(24, picture.shape[0] // 18))
    at = (picture.shape[1] - size // 2, picture.shape[0] - size // 2)
    font, black, white = pil.ImageFont.load_default(size), (0,) * 3, (255,) * 3
    pil.ImageDraw.Draw(image).text(at, text, white, font, anchor="rs", stroke_width=2, stroke_fill=black)
    return np.asarray(image)


def figure(columns: int = 1, *, size: tuple[float, float] = (8.0, 3.0)) -> tuple[Any, list[Any]]:
    """A matplotlib Figure in constrained layout, without a window or pyplot's global state, and its axes side by side.

    size: width and height in units of 100 pixels; `figure.savefig(path)` writes it.

    Raises ImportError without matplotlib.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; pip install ddpm_fast[train]") from error
    made = Figure(figsize=size, dpi=100, layout="constrained")
    return made, list(made.subplots(1, columns, squeeze=False)[0])


def save_png(path: str | os.PathLike[str] | BinaryIO, picture: UInt8Array) -> None:
    """Writes a uint8 (H, W, 3) picture to a path or an open file."""
    _pillow().Image.fromarray(picture).save(path, format="PNG", optimize=True)


def save_gif(
    path: str | os.PathLike[str] | BinaryIO,
    frames: Iterable[UInt8Array],
    *,
    fps: float = 20.0,
    hold: float = 2.0,
    levels: int = 32,
) -> None:
    """Writes an endlessly repeated GIF of uint8 (H, W, 3) frames of one size, in grey or in colour.

    Args:
        path: file to write, or one that is open.
        frames: the pictures in order, at least one.
        fps: frames a second, at most 50 (what viewers honour).
        hold: seconds for which the last frame stays.
        levels: grey levels (or colours) kept, 2..256. Noise does not compress: 32 instead of 256
            makes the file of a reverse process about half as large.
    """
    pictures = list(frames)
    if not pictures:
        raise ValueError("frames must hold at least one picture, got 0")
    if any(p.shape != pictures[0].shape for p in pictures):
        raise ValueError("frames must all have one shape, got " + str({p.shape for p in pictures}))
    if not 0 < fps <= 50 or hold < 0 or not 2 <= levels <= 256:
        raise ValueError(f"fps must be in (0, 50], hold >= 0, levels in 2..256, got {fps}, {hold}, {levels}")
    image = _pillow().Image
    grey = all((p == p[..., :1]).all() for p in pictures)
    converted = []
    for picture in pictures:
        if grey:
            steps = np.round(picture[..., 0] * ((levels - 1) / 255)) * (255 / (levels - 1))
            converted.append(image.fromarray(np.round(steps).astype(np.uint8)))
        else:
            converted.append(image.fromarray(picture).quantize(levels, dither=image.Dither.NONE))
    durations = [round(1000 / fps)] * len(converted)
    durations[-1] = max(durations[-1], round(1000 * hold))
    converted[0].save(path, format="GIF", save_all=True, append_images=converted[1:], duration=durations, loop=0)
