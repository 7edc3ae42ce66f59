"""From the sampler's state in the model's range [-1, 1] to what the caller asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OUTPUTS = ("model", "unit", "unit_unclamped", "uint8", "pil")


def check_output(output: str, shape: Sequence[int]) -> None:
    """ValueError for an output that is not known or cannot show samples of this shape; ImportError without Pillow."""
    if output not in OUTPUTS:
        raise ValueError(f"output must be one of {', '.join(OUTPUTS)}, got {output!r}")
    if output == "pil":
        if len(shape) != 3 or shape[0] not in (1, 3, 4):
            raise ValueError(f'output="pil" needs samples of shape (1 or 3 or 4, H, W), got {tuple(shape)}')
        _pillow()


def to_output(x: Tensor, output: str) -> Tensor | list[Any]:
    """x float32 (n, ...) as: "model" itself; "unit" (x + 1)/2 clamped to [0, 1]; "unit_unclamped" without the clamp;
    "uint8" (x + 1) 127.5, clamped and rounded half to even; "pil" a list of n Pillow images.
    """
    if output == "model":
        return x
    if output == "unit":
        return ((x + 1.0) / 2.0).clamp(0.0, 1.0)
    if output == "unit_unclamped":
        return (x + 1.0) / 2.0
    pixels = ((x + 1.0) * 127.5).clamp(0.0, 255.0).round().to(torch.uint8)
    if output == "uint8":
        return pixels
    image = _pillow()
    rows = pixels.permute(0, 2, 3, 1).cpu().numpy()
    return [image.fromarray(row[:, :, 0] if row.shape[2] == 1 else row) for row in rows]


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('output="pil" needs Pillow: pip install pillow, or use output="uint8"') from error
    return Image
