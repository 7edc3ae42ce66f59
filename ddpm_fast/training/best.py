"""`BestEpoch`: the weights of the epoch with the lowest mean loss."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import files


class BestEpoch:
    """A callback of `Trainer`: writes the weights each time an epoch's mean training loss is the lowest so far.

    `trainer.callbacks.append(BestEpoch("best.pt"))`; the file, written whole or not at all, is the `state_dict()` of
    the trained weights (not of their average) for `torch.load(path, weights_only=True)`.

    An epoch is as many images as the data has, and ends with the step in which the last of them is seen; one that the
    run does not finish does not count. Nothing of this is in a checkpoint: a run that goes on begins to compare anew.

    path: the file; its folder must exist. say: told of each epoch in one line, such as print; None tells nobody.

    Attributes: losses, the mean loss of each epoch; best, the index of the lowest of them, None before there is one.
    """

    def __init__(self, path: str | os.PathLike[str], *, say: Callable[[str], None] | None = None) -> None:
        self.path, self.say = Path(path), say
        self.losses: list[float] = []
        self.best: int | None = None
        self._epoch = 0
        self._steps: list[float] = []

    def on_start(self, trainer: Any) -> None:
        self._epoch = trainer.images_seen // len(trainer.data)

    def on_step(self, trainer: Any, report: Any) -> None:
        self._steps.append(report.loss)
        epoch = report.images_seen // len(trainer.data)
        if epoch == self._epoch:
            return
        self.losses.append(statistics.fmean(self._steps))
        self._epoch, self._steps = epoch, []
        better = self.best is None or self.losses[-1] < self.losses[self.best]
        if better:
            files.write(self.path, trainer.model.state_dict())
            self.best = len(self.losses) - 1
        if self.say is not None:
            self.say(f"epoch {epoch}: mean loss {self.losses[-1]:.4f}{', kept' if better else ''}")
