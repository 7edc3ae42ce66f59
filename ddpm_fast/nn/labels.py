"""Class labels as our networks take them: K classes and a null label, K, that means "no label"."""

from __future__ import annotations

import torch
from torch import Tensor


def check_labels(labels: Tensor, n: int, num_classes: int | None, network: str) -> None:
    """ValueError unless labels are int64 or int32 (n,) in 0..num_classes; `network` is its name in the message.

    The values are looked at on the CPU only: on CUDA that would wait for the device, which has its own assertion.
    """
    if num_classes is None:
        raise ValueError(f"labels were given to an unconditional {network}; build it with num_classes=K")
    if labels.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"labels must be int64 or int32, got {labels.dtype}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high > num_classes:
            raise ValueError(f"labels must be in 0..{num_classes} ({num_classes} = no label), got {low}..{high}")
