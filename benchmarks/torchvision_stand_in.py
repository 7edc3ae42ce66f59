"""What lucidrains' denoising_diffusion_pytorch uses of torchvision, which has no build for a CPU-only torch.

Only its Trainer calls any of this; the package is not importable without. Written for that one use: images are resized
to exactly (h, w), and what torchvision can do beyond it is not here.
"""

from __future__ import annotations

import random
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Compose:
    def __init__(self, parts: Sequence[Callable[[Any], Any]]) -> None:
        self.parts = parts

    def __call__(self, image: Any) -> Any:
        for part in self.parts:
            image = part(image)
        return image


class Lambda:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, image: Any) -> Any:
        return self.function(image)


class Resize:
    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        height, width = self.size
        return image.resize((width, height), resample=2)  # bilinear, as torchvision's default


class CenterCrop:
    """Of images that have this size already."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Any) -> Any:
        assert (image.height, image.width) == tuple(self.size)
        return image


class RandomHorizontalFlip:
    def __call__(self, image: Any) -> Any:
        return image.transpose(0) if random.random() < 0.5 else image


class ToTensor:
    """(C, H, W) in [0, 1]."""

    def __call__(self, image: Any) -> Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return (pixels if pixels.dim() == 3 else pixels[..., None]).permute(2, 0, 1).float() / 255


def save_image(images: Tensor, path: str, nrow: int) -> None:
    """A grid without margins, nrow images in each row; the last row must be full."""
    from PIL import Image

    n, c, h, w = images.shape
    grid = images.reshape(n // nrow, nrow, c, h, w).permute(0, 3, 1, 4, 2).reshape(n // nrow * h, nrow * w, c)
    pixels = (grid.clamp(0, 1) * 255 + 0.5).to(torch.uint8).cpu().numpy()
    Image.fromarray(pixels.squeeze(-1) if c == 1 else pixels).save(path)


def install() -> None:
    """Puts the stand-in where `import torchvision` finds it."""
    transforms, utils = types.ModuleType("torchvision.transforms"), types.ModuleType("torchvision.utils")
    for part in (Compose, Lambda, Resize, CenterCrop, RandomHorizontalFlip, ToTensor):
        setattr(transforms, part.__name__, part)
    utils.save_image = save_image  # type: ignore[attr-defined]
    whole = types.ModuleType("torchvision")
    whole.transforms, whole.utils = transforms, utils  # type: ignore[attr-defined]
    sys.modules.update({"torchvision": whole, "torchvision.transforms": transforms, "torchvision.utils": utils})


def remove() -> None:
    """Takes it away again, so that nobody else takes it for the real one. Who has imported it keeps it."""
    for name in ("torchvision", "torchvision.transforms", "torchvision.utils"):
        sys.modules.pop(name, None)
