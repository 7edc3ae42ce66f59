"""FID of what a diffusion model draws, as denoising_diffusion_pytorch's Trainer asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ..metrics import FeatureStatistics, frechet_distance
from ..training import ImageFolder

Features = Callable[[Tensor], Tensor]  # images (N, 3, H, W) in [0, 1] -> (N, D)


class Fid:
    """Frechet distance between the features of a folder's images and those of as many samples as asked for.

    Each image counts once and is not mirrored; of more images than samples a fixed random choice is taken. Both sides
    are summed a batch at a time, in float64.
    """

    def __init__(self, images: ImageFolder, features: Features, *, samples: int, batch: int, device: torch.device):
        if samples < 2:
            raise ValueError(f"num_fid_samples must be at least 2, got {samples}")
        self.images, self.features = images, features
        self.samples, self.batch, self.device = samples, batch, device
        self._real: FeatureStatistics | None = None

    @torch.no_grad()
    def score(self, diffusion: Any) -> float:
        """The distance now: draws `samples` images by diffusion.sample(batch_size=)."""
        if self._real is None:
            self._real = self._statistics(self._real_batches())
        drawn = self._statistics(diffusion.sample(batch_size=n) for n in groups(self.samples, self.batch))
        return frechet_distance(drawn.mean, drawn.covariance, self._real.mean, self._real.covariance)

    def _real_batches(self) -> Iterator[Tensor]:
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))[: self.samples]
        yield from DataLoader(Subset(self.images, order.tolist()), batch_size=self.batch)

    def _statistics(self, batches: Iterator[Tensor]) -> FeatureStatistics:
        found = FeatureStatistics()
        for images in batches:
            images = images.to(self.device)
            found.update(self.features(images.expand(-1, 3, -1, -1)))  # a grey image is three equal channels
        return found


def groups(total: int, most: int) -> list[int]:
    """Batch sizes of at most `most` that add up to `total`."""
    return [most] * (total // most) + ([total % most] if total % most else [])


def inception(dimensions: int, device: torch.device) -> Features:
    """Inception v3's features by pytorch_fid, which downloads the weights. ImportError without that package.

    dimensions: 64, 192, 768 or 2048, which names the layer.
    """
    try:
        from pytorch_fid.inception import InceptionV3
    except ImportError as error:
        raise ImportError(f"calculate_fid needs pytorch_fid ({error}): pip install pytorch-fid") from None
    layers = InceptionV3.BLOCK_INDEX_BY_DIM
    if dimensions not in layers:
        raise ValueError(f"inception_block_idx must be one of {', '.join(map(str, layers))}, got {dimensions}")
    network = InceptionV3([layers[dimensions]]).to(device).eval()

    def features(images: Tensor) -> Tensor:
        maps: Tensor = network(images)[0]
        return maps.mean(dim=(2, 3))

    return features
