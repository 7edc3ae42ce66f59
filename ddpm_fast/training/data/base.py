"""What training asks of its data, and data that is in memory."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

_HASHED_WHOLE = 64 * 2**20  # bytes; of more data a sample of rows is hashed
_HASHED_ROWS = 1024
_LOOKED_AT = 4096  # images of which it is seen whether they hold whole numbers


@runtime_checkable
class Data(Protocol):
    """Images, latents or vectors, numbered from 0, of one shape.

    Attributes:
        name: what it is called in logs and checkpoints.
        shape: of one of them, without N: (C, H, W) of images.
        dtype: uint8 (pixels, 0..255), or float32 (already in model range [-1, 1], or latents).
        labels: int64 (N,) in [0, num_classes), or None.
        num_classes: how many classes there are, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    labels: Tensor | None
    num_classes: int | None

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Tensor:
        """int64 (n,) -> (n, *shape) on the CPU; the same indices always give the same values."""
        ...

    def fingerprint(self) -> str:
        """Hexadecimal digits that change when the data does; the same on every machine."""
        ...


class TensorData:
    """Data that is one tensor in memory; a batch is one `index_select`.

    Args:
        images: (N, ...) tensor or array with N >= 1: uint8 pixels, or floating, in model range [-1, 1] or latents;
            batches of floating ones are float32. Contiguous CPU tensors are shared, not copied.
        labels: N integers >= 0, or None.
        name: see `Data`.
        num_classes: more than the largest label, and by default one more; it needs labels.
        class_names: one for each class, for titles; or None.

    Raises TypeError and ValueError for another dtype, shapes that do not fit, labels out of range, NaN and infinite
    values, and pixels 0..255 that are given as floats. A warning where floats are probably not in model range.
    """

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        *,
        name: str = "tensor",
        num_classes: int | None = None,
        class_names: Iterable[str] | None = None,
    ) -> None:
        self.images = as_images(images)
        check_range(self.images, name)
        self.name = name
        self.shape: tuple[int, ...] = tuple(self.images.shape[1:])
        self.dtype = batch_dtype(self.images.dtype)
        self.labels, self.num_classes = as_labels(labels, len(self.images), num_classes)
        self.class_names = None if class_names is None else tuple(class_names)
        if self.class_names is not None and len(self.class_names) != (self.num_classes or 0):
            raise ValueError(f"class_names must name {self.num_classes or 0} classes, got {len(self.class_names)}")

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> Tensor:
        return self.images.index_select(0, indices).to(self.dtype)

    def fingerprint(self) -> str:
        """Of the shape, the dtype, the labels and the values: all of them up to 64 MiB, of more data 1024 rows."""
        images = self.images
        if images.nbytes > _HASHED_WHOLE:
            rows = min(_HASHED_ROWS, len(images))
            images = images.index_select(0, torch.arange(rows) * len(images) // rows)
        return fingerprint(f"{self.dtype} {tuple(self.images.shape)}", images.to(self.dtype), self.labels)

    def __repr__(self) -> str:
        return describe(self)


def as_data(x: Any) -> Data:
    """Data of what a person has at hand.

    Args:
        x: `Data` (given back as it is), a tensor or array (N, ...), a tuple (images, labels), or a `Dataset` with
            `len()` and `[i]`, see `DatasetData`. What `TensorData` says of dtypes and ranges holds for all.
    """
    if isinstance(x, Data):
        return x
    if isinstance(x, (Tensor, np.ndarray)):
        return TensorData(x)
    if isinstance(x, tuple) and len(x) == 2:
        return TensorData(*x)
    if hasattr(x, "__getitem__") and hasattr(x, "__len__") and not isinstance(x, (str, bytes, list, tuple, Mapping)):
        from .dataset import DatasetData

        return DatasetData(x)
    if isinstance(x, DataLoader):
        raise TypeError("data must be a Dataset, not a DataLoader, for the order is the Trainer's: give its .dataset")
    raise TypeError(
        f"data must be a tensor or array (N, ...), (images, labels), a Dataset or what open_data gives, got {kind(x)}"
    )


def kind(x: Any) -> str:
    """How an argument is called in an error."""
    return f"{x!r}" if isinstance(x, (str, int, float, type(None))) else type(x).__name__


def as_images(images: Any) -> Tensor:
    """A contiguous CPU tensor (N, ...), uint8 or floating."""
    tensor = images if isinstance(images, Tensor) else tensor_of(images, "images")
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dim() < 2 or 0 in tensor.shape:
        raise ValueError(f"images must have shape (N, ...) with nothing of size 0, got {tuple(tensor.shape)}")
    batch_dtype(tensor.dtype)
    return tensor


def tensor_of(x: Any, name: str) -> Tensor:
    """Tensor of an array; TypeError or ValueError for what holds no numbers, or rows of different shapes."""
    try:
        array = np.asarray(x)
    except ValueError:
        raise ValueError(f"{name} must all have one shape, got several: resize or crop them first") from None
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be a tensor or array of numbers, got {kind(x)} of dtype {array.dtype}")
    if array.dtype.itemsize > 1 and not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # torch would warn of memory that must not be written, and knows no negative strides.
    tensor: Tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor


def batch_dtype(dtype: torch.dtype) -> torch.dtype:
    """uint8 for uint8, float32 for floating; ValueError for others."""
    if dtype == torch.uint8:
        return dtype
    if dtype.is_floating_point:
        return torch.float32
    name = str(dtype).removeprefix("torch.")
    raise ValueError(
        f"images must be uint8 (pixels 0..255) or floating (in [-1, 1], or latents), got {name}: "
        "if its values are 0..255, convert it to uint8"
    )


def as_labels(labels: Any, n: int, num_classes: int | None) -> tuple[Tensor | None, int | None]:
    """int64 (n,) and the number of classes, checked."""
    if labels is None:
        if num_classes is not None:
            raise ValueError(f"num_classes={num_classes} needs labels")
        return None, None
    labels = (labels if isinstance(labels, Tensor) else tensor_of(labels, "labels")).detach().cpu()
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {str(labels.dtype).removeprefix('torch.')}")
    if labels.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), one for each image, got {tuple(labels.shape)}")
    labels = labels.to(torch.int64)
    low, high = int(labels.min()), int(labels.max())
    if num_classes is None:
        num_classes = high + 1
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {low} to {high}")
    return labels, num_classes


def check_range(images: Tensor, name: str, stacklevel: int = 3) -> None:
    """ValueError for floats that cannot be meant; a warning for what is hardly in model range [-1, 1]."""
    if not images.is_floating_point():
        return
    low, high = (float(x) for x in torch.aminmax(images))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{name}: images must be finite, got NaN or infinite values")
    some = images[:_LOOKED_AT]
    if low >= 0 and 2 < high <= 255 and bool((some == some.round()).all()):
        raise ValueError(
            f"{name}: these floats are whole numbers from {low:g} to {high:g}, pixels: convert them to uint8"
        )
    if low >= 0 and high <= 1 and images.dim() >= 4:
        warnings.warn(
            f"{name}: images are in [0, 1], but models are trained in [-1, 1]: give uint8 pixels, or 2 * images - 1",
            stacklevel=stacklevel,
        )
    elif (low < -1 or high > 1) and images.dim() == 4 and images.shape[1] in (1, 3):
        warnings.warn(
            f"{name}: images reach from {low:.3g} to {high:.3g}, but models are trained in [-1, 1] (of latents that is "
            "no matter)",
            stacklevel=stacklevel,
        )


def fingerprint(head: str, *parts: Tensor | bytes | memoryview | None) -> str:
    """16 hexadecimal digits of some text and values."""
    digest = hashlib.blake2b(head.encode(), digest_size=8)
    for part in parts:
        if part is None:
            part = b"None"
        if isinstance(part, Tensor):
            array = part.contiguous().numpy()
            part = array.astype(array.dtype.newbyteorder("<"), copy=False).data.cast("B")
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def describe(data: Data) -> str:
    """One line: what it is, how many, of which shape."""
    classes = "" if data.num_classes is None else f", {data.num_classes} classes"
    kind = str(data.dtype).removeprefix("torch.")
    return f"{data.name}: {len(data):,} of shape {'x'.join(map(str, data.shape))}, {kind}{classes}"
