"""`Evaluate`: figures of the averaged weights while a `Trainer` runs."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..sampling.model import attribute
from ..training.data import Data
from .drawing import drawn, seconds_per_step, timed
from .evaluation import Evaluation, Figures, real_parts
from .features import Extractor, choose


class Evaluate:
    """A callback of `Trainer`: every so many images it draws samples and measures them against real images.

    Training waits meanwhile, and with several processes the first alone works, for less than their connection's time
    limit (30 minutes); `cost` says for how long. What is drawn is the same noise each time.

    Args:
        open_split: "train" or "test" -> the images to compare with, as for `open_data`.
        every: images between evaluations.
        num: samples an evaluation.
        steps: of the reverse process, method "ddim".
        metrics: some of "frechet", "kid", "precision-recall".
        features: "auto", "inception", "classifier", "pixels", or an `Extractor`.
        against: "train" or "test", what samples are compared with.
        batch_size: samples at a time.
        file: a CSV that a line is appended to, or None.
        say: told what it costs and what came out.
    """

    def __init__(
        self,
        open_split: Callable[[str], Data],
        *,
        every: int,
        num: int = 1000,
        steps: int = 50,
        metrics: Iterable[str] = ("frechet",),
        features: str | Extractor = "auto",
        against: str = "train",
        batch_size: int = 64,
        file: Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        for name, value in (("every", every), ("num", num), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.open_split, self.every, self.num, self.steps = open_split, every, num, steps
        self.metrics, self.features, self.against = tuple(metrics), features, against
        self.batch_size, self.file, self.say = min(batch_size, num), file, say
        self.figures: dict[int, Figures] = {}
        self._seen = 0
        self._evaluation: Evaluation | None = None

    def cost(self, trainer: Any) -> str:
        """One line: network passes of an evaluation, and how long one will take, from a timed batch."""
        sampler, classes = self._sampler(trainer), self._classes(trainer)
        shape = trainer.data.shape
        step = seconds_per_step(sampler, shape, batch_size=self.batch_size, classes=classes)
        evaluation = self._prepared(trainer)
        batch = next(evaluation.reference.batches(0, self.batch_size, self.batch_size))
        evaluation.extractor(batch)  # the first call costs more
        look = timed(lambda: evaluation.extractor(batch)) / len(batch)
        seconds = step * len(sampler) * self.num / self.batch_size + look * self.num
        left = max(0, trainer.settings.images - trainer.images_seen) // self.every
        return (
            f"evaluation: {self.num:,} samples of {len(sampler)} steps = {self.num * len(sampler):,} network passes, "
            f"about {seconds:.0f} s, every {self.every:,} images ({left} times, {left * seconds / 60:.1f} min in all), "
            f"and {look * evaluation.real_images:.0f} s once for {evaluation.real_images:,} real images"
        )

    def on_start(self, trainer: Any) -> None:
        """Prints the cost before anything is spent."""
        self._seen = trainer.images_seen
        self.say(self.cost(trainer))
        self._forget_after(trainer.images_seen)

    def on_step(self, trainer: Any, report: Any) -> None:
        """Evaluates where a multiple of `every` has been reached."""
        before, self._seen = self._seen, report.images_seen
        if report.images_seen // self.every > before // self.every:
            try:
                self.evaluate(trainer)
            except (RuntimeError, ValueError) as error:  # samples that are not finite: no reason to end a training
                self.say(f"after {report.images_seen:,} images: no evaluation, {error}")

    def evaluate(self, trainer: Any) -> Figures:
        """The figures now; also in `figures[images_seen]`, in the file, and said."""
        began = time.perf_counter()
        evaluation = self._prepared(trainer)
        samples = drawn(
            self._sampler(trainer),
            range(self.num),
            trainer.data.shape,
            seed=trainer.settings.seed,
            classes=self._classes(trainer),
            batch_size=self.batch_size,
        )
        found, floor = evaluation.of(samples), evaluation.floor_figures()
        self.figures[trainer.images_seen] = found
        shown = ", ".join(f"{name} {value:.4g} (real images {floor[name]:.4g})" for name, value in found.items())
        note = f"; {evaluation.extractor.name}"
        note += f", {evaluation.extractor.note}" if evaluation.extractor.note else ""
        self.say(f"after {trainer.images_seen:,} images: {shown}{note} ({time.perf_counter() - began:.0f} s)")
        if self.file is not None:
            self._append(trainer.images_seen, found)
        return found

    def _sampler(self, trainer: Any) -> Any:
        steps = min(self.steps, trainer.schedule.num_timesteps)
        return trainer.sampler(steps=steps, method="ddim", clip=bool(len(trainer.data.shape) == 3))

    def _classes(self, trainer: Any) -> tuple[int, ...] | None:
        classes = attribute(trainer.model, "num_classes")
        return tuple(range(classes)) if isinstance(classes, int) else None

    def _prepared(self, trainer: Any) -> Evaluation:
        if self._evaluation is None:
            reference, floor = real_parts(self.open_split, self.against, trainer.settings.seed)
            extractor = self.features
            if isinstance(extractor, str):
                device = trainer.device
                # Features of the train split, whatever samples are compared with.
                extractor = choose(extractor, trainer.data, device=device, say=self.say)
            self._evaluation = Evaluation(
                extractor, reference, floor, metrics=self.metrics, num=self.num, batch_size=self.batch_size,
                seed=trainer.settings.seed,
            )  # fmt: skip
        return self._evaluation

    def _forget_after(self, images_seen: int) -> None:
        """Takes out of the file what a run that goes on from a checkpoint is going to measure again."""
        if self.file is None or not self.file.exists():
            return
        head, *lines = self.file.read_text(encoding="utf-8").splitlines() or [""]
        kept = [line for line in lines if line.split(",")[0].isdecimal() and int(line.split(",")[0]) <= images_seen]
        if len(kept) < len(lines):
            beside = self.file.with_name(f"{self.file.name}.part")
            beside.write_text("\n".join([head, *kept]) + "\n", encoding="utf-8")
            beside.replace(self.file)

    def _append(self, images_seen: int, figures: Figures) -> None:
        assert self.file is not None
        new = not self.file.exists()
        with open(self.file, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["images_seen", *figures])
            writer.writerow([images_seen, *(repr(value) for value in figures.values())])
