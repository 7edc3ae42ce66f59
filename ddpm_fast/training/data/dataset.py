"""A Dataset of PyTorch's kind as training data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Subset

from .base import as_labels, batch_dtype, check_range, fingerprint, kind, tensor_of
from .slow import SlowData

_IMAGE = ("image", "images", "img", "pixel_values", "x")
_LABEL = ("label", "labels", "target", "y")


class DatasetData(SlowData):
    """Any object with `len()` and `[i]`: an item is an image, (image, label, ...), or a mapping of "image" and "label".

    An image is a tensor or array, uint8 or floating in model range [-1, 1], or a Pillow image (as uint8); all of one
    shape. Labels come from `dataset.targets` or `.labels` where it has one of them (a Subset's dataset too), else each
    item is read once for its label. Items are not kept: an item that is random stays so, and then the run cannot be
    repeated exactly.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        count = len(dataset)
        if count < 1:
            raise ValueError(f"data must hold at least one image, got an empty {type(dataset).__name__}")
        first = self._image(0)
        self.name = type(dataset).__name__
        self.shape, self.dtype = tuple(first.shape), batch_dtype(first.dtype)
        check_range(first[None], self.name, stacklevel=5)
        labels = _known_labels(dataset)
        if labels is None and _label(dataset[0]) is not None:
            labels = [_label(dataset[i]) for i in range(count)]
        self.labels, self.num_classes = as_labels(labels, count, None)
        super().__init__(count, keep=False)

    def read(self, index: int) -> NDArray[Any]:
        image = self._image(index)
        if tuple(image.shape) != self.shape or batch_dtype(image.dtype) != self.dtype:
            raise ValueError(
                f"{self.name}[{index}] must be {_words(self.dtype, self.shape)} as item 0 is, "
                f"got {_words(image.dtype, image.shape)}"
            )
        array: NDArray[Any] = image.to(self.dtype).numpy()
        return array

    def _image(self, index: int) -> Tensor:
        item = self._dataset[index]
        if isinstance(item, Mapping):
            item = next((item[key] for key in _IMAGE if key in item), None)
        elif isinstance(item, (tuple, list)):
            item = item[0]
        name = f"{type(self._dataset).__name__}[{index}]"
        if hasattr(item, "getbands"):  # a Pillow image
            pixels = np.asarray(item if item.mode in ("L", "RGB", "RGBA") else item.convert("RGB"))
            return torch.from_numpy(pixels.reshape(item.height, item.width, -1).transpose(2, 0, 1).copy())
        if not isinstance(item, (Tensor, np.ndarray)):
            raise TypeError(f"{name} must be or begin with an image: a tensor, an array or Pillow's, got {kind(item)}")
        image = item.detach().cpu() if isinstance(item, Tensor) else tensor_of(item, name)
        if image.dim() < 1 or 0 in image.shape:
            raise ValueError(f"{name} must be an image (C, H, W), got shape {tuple(image.shape)}")
        return image

    def fingerprint(self) -> str:
        """Of the shape, the number and the labels alone: items need not be the same twice."""
        return fingerprint(f"{self.name} {len(self)} {self.dtype} {self.shape}", self.labels)


def _words(dtype: torch.dtype, shape: Any) -> str:
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _label(item: Any) -> int | None:
    """Of an item that has one; others, such as a caption, are none."""
    label = None
    if isinstance(item, Mapping):
        label = next((item[key] for key in _LABEL if key in item), None)
    elif isinstance(item, (tuple, list)) and len(item) > 1:
        label = item[1]
    try:
        return None if label is None or isinstance(label, (str, bytes)) or int(label) != label else int(label)
    except (TypeError, ValueError):
        return None


def _known_labels(dataset: Any) -> Any:
    if isinstance(dataset, Subset):
        labels = _known_labels(dataset.dataset)
        return None if labels is None else torch.as_tensor(labels)[list(dataset.indices)]
    for name in ("targets", "labels"):
        labels = getattr(dataset, name, None)
        if isinstance(labels, (list, tuple, Tensor, np.ndarray)) and len(labels) == len(dataset):
            return labels
    return None
