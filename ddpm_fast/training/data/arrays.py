"""Images that come as one array: their layout, channels and size."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from .pictures import Size, fitted, pillow, size_of

_CHUNK = 4096
_RED, _GREEN, _BLUE = 19595, 38470, 7471  # ITU-R 601 luma in 2^16ths, as Pillow's


def channels_first(images: Tensor) -> Tensor:
    """(N, H, W) of uint8 -> (N, 1, H, W); (N, H, W, C) -> (N, C, H, W); others as they are.

    C is 1 or 3, of uint8 also 4. Where both layouts could be meant, it is (N, C, H, W), unless only the other one is
    square.
    """
    if images.dim() == 3 and images.dtype == torch.uint8:
        return images[:, None]
    if images.dim() != 4:
        return images
    some = (1, 3, 4) if images.dtype == torch.uint8 else (1, 3)
    _, a, b, c = images.shape
    last = c in some and (a not in (1, 3, 4) or (a == b and b != c))
    return images.permute(0, 3, 1, 2).contiguous() if last else images


def with_channels(images: Tensor, channels: int | None, name: str) -> Tensor:
    """(N, C, H, W) with 1 or 3 channels: grey repeated, colour weighted as Pillow does, transparent uint8 on white."""
    if channels is None or images.shape[1] == channels:
        return images
    have = images.shape[1] if images.dim() == 4 else None
    if images.dtype == torch.uint8 and have == 4:
        images = _on_white(images)
    elif have not in (1, 3):
        raise ValueError(
            f"{name}: channels={channels} is of images with 1 or 3 channels, these have shape {tuple(images.shape[1:])}"
        )
    if images.shape[1] == channels:
        return images
    return images.expand(-1, 3, -1, -1).contiguous() if channels == 3 else _grey(images)


def _grey(images: Tensor) -> Tensor:
    if images.dtype != torch.uint8:
        weights = torch.tensor([_RED, _GREEN, _BLUE]).div(2**16)[:, None, None]
        return (images * weights).sum(1, keepdim=True)
    grey = torch.empty_like(images[:, :1])
    for out, part in zip(grey.split(_CHUNK), images.split(_CHUNK), strict=True):
        red, green, blue = part.to(torch.int32).unbind(1)
        out[:, 0] = (red * _RED + green * _GREEN + blue * _BLUE + 2**15) >> 16
    return grey


def _on_white(images: Tensor) -> Tensor:
    out = torch.empty_like(images[:, :3])
    for done, part in zip(out.split(_CHUNK), images.split(_CHUNK), strict=True):
        part = part.to(torch.int32)
        color, alpha = part[:, :3], part[:, 3:]
        done.copy_((color * alpha + 255 * (255 - alpha) + 127) // 255)
    return out


def resized(images: Tensor, image_size: Any, fit: str, name: str) -> Tensor:
    """(N, C, H, W) at another size, see `pictures.fitted`; a warning where images are enlarged."""
    if image_size is None:
        return images
    size = size_of(image_size)
    if images.dim() != 4:
        raise ValueError(f"{name}: image_size is of images (N, C, H, W), got shape {tuple(images.shape)}")
    height, width = images.shape[2:]
    if (height, width) == size:
        return images
    if fit != "pad" and (height < size[0] or width < size[1]):
        warnings.warn(
            f"{name}: images of {height}x{width} are smaller than {size[0]}x{size[1]} and are enlarged; fit='pad' "
            "would leave them as they are",
            stacklevel=3,
        )
    images = images if images.dtype == torch.uint8 else images.float()
    if fit == "pad" and height <= size[0] and width <= size[1]:
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        black = 0 if images.dtype == torch.uint8 else -1
        return functional.pad(images, (left, size[1] - width - left, top, size[0] - height - top), value=black)
    out = torch.empty((*images.shape[:2], *size), dtype=images.dtype)
    target = out.numpy()
    for i, image in enumerate(images.numpy()):
        target[i] = _one(image, size, fit)
    return out


def _one(image: NDArray[Any], size: Size, fit: str) -> NDArray[Any]:
    """(C, H, W) -> (C, *size), uint8 or float32."""
    whole = pillow().Image.fromarray
    if image.shape[0] == 3 and image.dtype == np.uint8:
        return np.moveaxis(np.asarray(fitted(whole(np.ascontiguousarray(np.moveaxis(image, 0, 2))), size, fit)), 2, 0)
    return np.stack([np.asarray(fitted(whole(plane), size, fit)) for plane in image])
