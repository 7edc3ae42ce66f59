"""Real handwritten digits, and a reader of digits that never saw the diffusion model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 16  # pixels a side


@dataclasses.dataclass(frozen=True)
class Digits:
    """images float32 (M, 1, 16, 16) in [-1, 1], ink high; labels int64 (M,) in 0..9."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def load() -> Digits:
    """scikit-learn's 1,797 scans, 8x8 with 17 grey levels, resized to 16x16 (bicubic)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    scans = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    scans = F.interpolate(scans, size=(SIZE, SIZE), mode="bicubic", align_corners=False)
    return Digits(scans.clamp(0, 1) * 2 - 1, torch.tensor(data.target, dtype=torch.int64))


class Reader:
    """A support vector machine that reads 16x16 digits, fitted on four fifths of the real ones.

    `accuracy` is its share of right answers on the real digits that it was not fitted on, the
    ceiling of what it can certify.
    """

    def __init__(self, digits: Digits, *, seed: int = 0) -> None:
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC

        fit, held = train_test_split(
            np.arange(len(digits)), test_size=0.2, random_state=seed, stratify=digits.labels.numpy()
        )
        self.fitted, self.held_out = len(fit), len(held)
        self._svm: Any = SVC(C=10.0, gamma="scale")
        self._svm.fit(self._pixels(digits.images[fit]), digits.labels[fit].numpy())
        self.accuracy = self.share_right(digits.images[held], digits.labels[held])

    @staticmethod
    def _pixels(images: Tensor) -> np.ndarray[Any, Any]:
        return images.cpu().clamp(-1, 1).flatten(1).numpy()

    def read(self, images: Tensor) -> Tensor:
        """(N, 1, 16, 16) in [-1, 1] (more is clamped) -> int64 labels (N,)."""
        return torch.as_tensor(self._svm.predict(self._pixels(images)), dtype=torch.int64)

    def share_right(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images that are read as their label, 0..1."""
        return float((self.read(images) == labels.cpu()).double().mean())
