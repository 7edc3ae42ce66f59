"""One evaluation: features of samples and of real images, in as many processes as there are, and figures of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..training.data import Data
from ..training.processes import World, share
from ..training.streams import Order
from .features import Extractor
from .frechet import FeatureStatistics, frechet_distance
from .kid import kernel_distance, kid
from .precision_recall import precision_recall

METRICS = ("frechet", "kid", "precision-recall", "bits")
_BLOCK = 1024  # rows of features whose sums are taken together
_ALL_PAIRS = 10_000  # images up to which KID is over all pairs and not over subsets

Figures = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the images of `data`, by their indices, and what to call them."""

    data: Data
    indices: Tensor
    name: str

    def __len__(self) -> int:
        return len(self.indices)

    def some(self, count: int, seed: int) -> Part:
        """A random choice of at most `count`, a function of the seed."""
        if count >= len(self):
            return self
        return dataclasses.replace(self, indices=self.indices[Order(seed, len(self)).indices(0, count)])

    def batches(self, first: int, last: int, size: int) -> Iterator[Tensor]:
        """The images first..last-1 of the part, in batches."""
        for index in self.indices[first:last].split(size):
            yield self.data.batch(index)


def real_parts(open_split: Callable[[str], Data], against: str, seed: int) -> tuple[Part, Part]:
    """The images to compare with, and others of the same kind, which show how small the figures can become.

    open_split: "train" or "test" -> data. The others are of the other split; where a source has only one they are a
    random half of it, and the images to compare with are the other half.
    """
    data = open_split(against)
    other_name = "train" if against == "test" else "test"
    try:
        other: Data | None = open_split(other_name)
    except (FileNotFoundError, ValueError):
        other = None
    if other is not None and other.shape == data.shape and other.fingerprint() != data.fingerprint():
        return (
            Part(data, torch.arange(len(data)), f"{data.name} {against}"),
            Part(other, torch.arange(len(other)), f"{other.name} {other_name}"),
        )
    order, half = Order(seed, len(data)).indices(0, len(data)), len(data) // 2
    return (
        Part(data, order[half:].sort().values, f"one half of {data.name}"),
        Part(data, order[:half].sort().values, f"the other half of {data.name}"),
    )


class Evaluation:
    """Figures of samples against `reference`, and of as many real images of `floor` against it.

    extractor: the features. metrics: some of "frechet", "kid" and "precision-recall". num: how many samples there are
    to be. batch_size: images through the extractor at a time. seed: of every choice. world: processes that share the
    work and call everything together; each ends with the same figures.
    """

    def __init__(
        self,
        extractor: Extractor,
        reference: Part,
        floor: Part,
        *,
        metrics: Iterable[str],
        num: int,
        batch_size: int = 64,
        seed: int = 0,
        world: World | None = None,
    ) -> None:
        self.extractor, self.batch_size, self.seed = extractor, batch_size, seed
        self.metrics, self.num, self.world = tuple(metrics), num, world or World()
        unknown = [name for name in self.metrics if name not in METRICS[:3]]
        if unknown:
            raise ValueError(f"metrics must be some of {', '.join(METRICS[:3])}, got {unknown[0]!r}")
        for name, count in (("num", num), ("the data to compare with", len(reference)), ("the floor", len(floor))):
            if count < 4:
                raise ValueError(f"{name} must be at least 4 images, got {count}")
        self.reference, self.floor = reference, floor.some(num, seed)
        self._real: tuple[Tensor, FeatureStatistics] | None = None
        self._floor: Figures | None = None

    @property
    def real_images(self) -> int:
        """How many real images the extractor sees, once."""
        return len(self.reference) + len(self.floor)

    def of(self, batches: Iterable[Tensor]) -> Figures:
        """Figures of this process's share of the samples, [rank num / size, (rank + 1) num / size)."""
        return self._figures(self._rows(batches, self.num))

    def floor_figures(self) -> Figures:
        """The same figures of the real images, computed once."""
        if self._floor is None:
            self._floor = self._figures(self._part(self.floor))
        return self._floor

    def _part(self, part: Part) -> Tensor:
        first, last = share(len(part), self.world.rank, self.world.size)
        return self._rows(part.batches(first, last, self.batch_size), len(part))

    def _rows(self, batches: Iterable[Tensor], total: int) -> Tensor:
        """Features of all processes' images, (total, D), the same in each of them."""
        own = [self.extractor(batch) for batch in batches]
        if self.world.size == 1:
            rows = torch.cat(own)
        else:
            first, last = share(total, self.world.rank, self.world.size)
            width = torch.zeros(self.world.size, dtype=torch.int64)
            width[self.world.rank] = own[0].shape[1] if own else 0
            rows = torch.zeros(total, int(self.world.sum(width).max()))
            if own:
                rows[first:last] = torch.cat(own)
            self.world.sum(rows)  # a value and zeros: exact
        if len(rows) != total:
            raise ValueError(f"{total} images were to be measured, got {len(rows)}")
        return rows

    def _figures(self, rows: Tensor) -> Figures:
        if self._real is None:
            real = self._part(self.reference)
            self._real = real, _statistics(real)
        (real, known), found = self._real, _statistics(rows)
        figures: Figures = {}
        if "frechet" in self.metrics:
            figures["frechet"] = frechet_distance(found.mean, found.covariance, known.mean, known.covariance)
        if "kid" in self.metrics:
            if max(len(rows), len(real)) <= _ALL_PAIRS:
                figures["kid"] = kernel_distance(rows, real)
            else:
                subsets = kid(rows, real, seed=self.seed)
                figures |= {"kid": subsets.mean, "kid_std": subsets.std}
        if "precision-recall" in self.metrics:
            count = min(len(rows), len(real))  # both shrink with the number of images, so it is the same for both
            chosen = real[Order(self.seed, len(real)).indices(0, count)]
            figures |= dataclasses.asdict(precision_recall(rows[:count], chosen))
        return figures


def _statistics(rows: Tensor) -> FeatureStatistics:
    found = FeatureStatistics()
    for block in rows.split(_BLOCK):
        found.update(block)
    return found
