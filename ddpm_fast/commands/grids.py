"""Grids of samples that a training run draws on the way, always from the same noise."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLUMNS = 8  # of a grid without classes
MOST_CLASSES = 16  # that get a column
_SIDE = 64  # pixels to which smaller images are enlarged


class Grids:
    """A callback of `Trainer` that draws `rows` of images from the averaged weights every `every` images.

    With a class-conditional model a column is a class. `drawn(images_seen, picture)` is told of each grid.
    """

    def __init__(
        self, folder: Path, every: int | None, *, rows: int, steps: int, guidance: float, say: Callable[[str], None]
    ) -> None:
        self.folder, self.every, self.rows, self.steps, self.guidance = folder, every, rows, steps, guidance
        self.drawn: list[Callable[[int, Any], None]] = []
        self._say, self._seen = say, 0

    def on_start(self, trainer: Any) -> None:
        self._seen = trainer.images_seen

    def on_step(self, trainer: Any, report: Any) -> None:
        before, self._seen = self._seen, report.images_seen
        if self.every is not None and report.images_seen // self.every > before // self.every:
            self.draw(trainer)

    def path(self, images_seen: int) -> Path:
        """Of the grid after so many images."""
        return self.folder / f"images-{images_seen:012d}.png"

    def draw(self, trainer: Any) -> Path:
        """The grid of the weights as they are."""
        from .. import viz

        began = time.perf_counter()
        classes = trainer.model.num_classes if self._labelled(trainer) else None
        columns = COLUMNS if classes is None else min(classes, MOST_CLASSES)
        labels = None if classes is None else [i % columns for i in range(self.rows * columns)]
        sampler = trainer.sampler(steps=self.steps, method="ddim", clip=True)
        images = sampler.sample(
            self.rows * columns,
            seed=trainer.settings.seed,
            labels=labels,
            guidance=self.guidance if labels is not None else 1.0,
            progress=False,
        )
        images = images.nan_to_num(0.0)
        scale = max(1, _SIDE // max(images.shape[-2:]))
        names = None if classes is None else [str(i) for i in range(columns)]
        picture = viz.grid(images, columns, scale=scale, column_labels=names)
        path = self.path(trainer.images_seen)
        self.folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".part")
        viz.save_png(beside, picture)
        os.replace(beside, path)
        for told in self.drawn:
            told(trainer.images_seen, picture)
        self._say(f"samples after {trainer.images_seen:,} images: {path} ({time.perf_counter() - began:.0f} s)")
        return path

    @staticmethod
    def _labelled(trainer: Any) -> bool:
        return getattr(trainer.model, "num_classes", None) is not None


def drawable(shape: tuple[int, ...]) -> bool:
    """Whether samples of this shape are pictures: (1 or 3, H, W)."""
    return len(shape) == 3 and shape[0] in (1, 3)
