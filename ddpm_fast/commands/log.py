"""The log of a training run: log.csv, loss.png and a TensorBoard log."""

from __future__ import annotations

import csv
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

COLUMNS = ("images_seen", "step", "loss", "lr", "grad_norm", "images_per_second")
Row = tuple[int, int, float, float, float, float]
_REDRAW = 60.0  # seconds between two plots
_SMOOTHED = 40  # points that the smooth curve of the plot is averaged over, at most


class Log:
    """A callback of `Trainer` that appends rows to a CSV file; a run that goes on drops rows that it will write again.

    A row is the mean over the steps since the row before: loss, gradient's norm and images per second of training. One
    is written every `every` images and with every checkpoint, so that a resumed run has the rows of one that was not
    stopped.

    rows: those in the file, oldest first.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.rows: list[Row] = []
        self.listeners: list[Callable[[Row], None]] = []
        self._steps: list[Any] = []
        self._seen = 0

    def on_start(self, trainer: Any) -> None:
        """Keeps the rows up to where the run goes on."""
        self._seen = trainer.images_seen
        self.rows = [row for row in read(self.path) if row[0] <= self._seen] if self.path.exists() else []
        beside = self.path.with_name(self.path.name + ".part")
        with open(beside, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(self.rows)
        os.replace(beside, self.path)

    def on_step(self, trainer: Any, report: Any) -> None:
        before = self._steps[-1].images_seen if self._steps else self._seen
        self._steps.append(report)
        if report.images_seen // self.every > before // self.every:
            self._write()

    def on_save(self, trainer: Any, path: Path) -> None:
        self._write()

    def on_end(self, trainer: Any) -> None:
        self._write()

    def _write(self) -> None:
        """A row of the steps since the last one, if there are any."""
        if not self._steps:
            return
        last, count = self._steps[-1], len(self._steps)
        seconds = sum(step.seconds for step in self._steps)
        row: Row = (
            last.images_seen,
            last.step,
            sum(step.loss for step in self._steps) / count,
            last.lr,
            sum(step.grad_norm for step in self._steps) / count,
            round((last.images_seen - self._seen) / seconds, 2) if seconds > 0 else 0.0,
        )
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        self.rows.append(row)
        self._seen, self._steps = last.images_seen, []
        for listener in self.listeners:
            listener(row)


def read(path: Path) -> list[Row]:
    """The rows of a log; one that was cut off while it was written is left out. ValueError for another kind of file."""
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    if lines and tuple(lines[0]) != COLUMNS:
        raise ValueError(f"{path} is no log of this program: its first line is not {','.join(COLUMNS)}; move it away")
    rows = []
    for line in lines[1:]:
        if len(line) != len(COLUMNS):
            continue
        try:
            loss, lr, norm, rate = (float(text) for text in line[2:])
            rows.append((int(line[0]), int(line[1]), loss, lr, norm, rate))
        except ValueError:
            continue
    return rows


class Plot:
    """A callback that draws the rows of a `Log` as loss.png: every minute, with every checkpoint and at the end."""

    def __init__(self, path: Path, log: Log, title: str) -> None:
        self.path, self.log, self.title = path, log, title
        self._drawn, self._when = 0, time.monotonic()

    def on_step(self, trainer: Any, report: Any) -> None:
        if time.monotonic() - self._when >= _REDRAW:
            self._draw()

    def on_save(self, trainer: Any, path: Path) -> None:
        self._draw()

    def on_end(self, trainer: Any) -> None:
        self._draw()

    def _draw(self) -> None:
        if self.log.rows and self.log.rows[-1][0] != self._drawn:
            draw_loss(self.path, self.log.rows, self.title)
            self._drawn = self.log.rows[-1][0]
        self._when = time.monotonic()


def draw_loss(path: Path, rows: list[Row], title: str) -> None:
    """Loss over images seen, every row and a running mean; logarithmic where the loss falls by more than five times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no window, and none of pyplot's global state
    from matplotlib.figure import Figure

    x, y = [row[0] for row in rows], [row[2] for row in rows]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    few = len(rows) < 10
    axes.plot(x, y, color="tab:blue", alpha=1.0 if few else 0.3, linewidth=1, marker="o" if few else None, markersize=3)
    if not few:
        axes.plot(x, running_mean(y, max(2, min(_SMOOTHED, len(y) // 10))), color="tab:blue", linewidth=1.8)
    if min(y) > 0 and max(y) > 5 * min(y):
        axes.set_yscale("log")
    axes.set_xlim(0, x[-1])
    axes.set_xlabel("images seen")
    axes.set_ylabel("training loss")
    axes.set_title(title, fontsize=11)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3, which="both")
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        canvas.print_png(file)
    os.replace(beside, path)


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of the `window` values around each; fewer at the beginning, where a loss falls fast, and at the end."""
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for i in range(len(values)):
        reach = min(i, window // 2)
        first, last = i - reach, min(len(values), i + reach + 1)
        result.append((sums[last] - sums[first]) / (last - first))
    return result


class TensorBoard:
    """A callback that writes the rows of a `Log`, and pictures, for TensorBoard; x is the number of images seen."""

    def __init__(self, folder: Path, log: Log) -> None:
        self._folder = folder
        self._writer: Any = None
        log.listeners.append(self._row)

    def on_start(self, trainer: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self._folder), purge_step=trainer.images_seen + 1)

    def on_end(self, trainer: Any) -> None:
        self._writer.close()

    def picture(self, images_seen: int, picture: Any) -> None:
        """picture: uint8 (height, width, 3)."""
        self._writer.add_image("samples", picture, images_seen, dataformats="HWC")

    def _row(self, row: Row) -> None:
        for name, value in zip(COLUMNS[2:], row[2:], strict=True):
            self._writer.add_scalar(name, value, row[0])
