"""The live line of a training run: how far, the loss, images per second, the time that is left."""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

_REDRAW = 0.2  # seconds between two states of the line in a terminal
_PRINT = 30.0  # seconds between two lines elsewhere
_HORIZON = 50  # steps over which the shown loss is averaged
_WINDOW = 50  # steps over which the speed is
_CLEAR = "\r\x1b[K"


class Voice:
    """Standard output, which may not be there or go away (`| head`, a lost terminal, a full disk). Training is worth
    more than what it says: it goes on in silence.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        self._try(lambda stream: stream.write(text))

    def flush(self) -> None:
        self._try(lambda stream: stream.flush())

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def _try(self, action: Callable[[TextIO], object]) -> None:
        if self._stream is None:
            return
        try:
            action(self._stream)
        except OSError:
            with contextlib.suppress(OSError):  # what is in its buffer would be tried again when Python ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            self._stream = None


class Progress:
    """A callback of `Trainer`: in a terminal one line that is rewritten, elsewhere a line now and then.

    Args:
        images: the number that training ends at.
        stream: where to write; None is stdout. quiet: nothing but what `say` is told.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        images: int,
        *,
        quiet: bool = False,
        stream: TextIO | Voice | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.images, self.quiet = images, quiet
        self.deadline: float | None = None
        """The clock's time at which training will be stopped."""
        self._stream = Voice(sys.stdout) if stream is None else stream
        self._clock = clock
        self._live = self._stream.isatty()
        self._shown, self._last = False, clock()
        self._loss = self._weight = 0.0
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=_WINDOW)
        self._seen: int | None = None
        self._drawn: int | None = None  # what was seen when the line was written last

    def on_start(self, trainer: Any) -> None:
        self._seen = trainer.images_seen

    def on_step(self, trainer: Any, report: Any) -> None:
        """Counts a step, and draws the line when it is time."""
        self._recent.append((report.images_seen - (self._seen or 0), report.seconds))
        self._seen = report.images_seen
        self._loss += (report.loss - self._loss) / min(self._weight + 1, _HORIZON)
        self._weight += 1
        now = self._clock()
        if not self.quiet and now - self._last >= (_REDRAW if self._live else _PRINT):
            self._last = now
            self._draw(self.line(now))

    def on_end(self, trainer: Any) -> None:
        """Leaves the last state of the line standing."""
        if self._weight and not self.quiet:
            if self._seen != self._drawn:
                self._draw(self.line(self._clock()))
            if self._live:
                self._stream.write("\n")
                self._stream.flush()
                self._shown = False

    def say(self, text: str) -> None:
        """A line of its own, above the live one."""
        if self._shown:
            self._stream.write(_CLEAR)
            self._shown, self._drawn = False, None
        print(text, file=self._stream, flush=True)

    @property
    def speed(self) -> float:
        """Images per second of the last steps, without what happens between them."""
        seconds = sum(taken for _, taken in self._recent)
        return sum(images for images, _ in self._recent) / seconds if seconds > 0 else 0.0

    def line(self, now: float) -> str:
        """What there is to say."""
        seen = self._seen or 0
        parts = [f"{100 * min(1.0, seen / self.images):5.1f} %", f"{seen:,} of {self.images:,} images"]
        parts += [f"loss {self._loss:.4g}", f"{_rate(self.speed)} images/s"]
        left = (self.images - seen) / self.speed if self.speed > 0 else None
        if left is not None and left > 0:
            if self.deadline is not None and now + left > self.deadline:
                parts.append(f"stops in {duration(max(0.0, self.deadline - now))} ({duration(left)} left)")
            else:
                parts.append(f"{duration(left)} left")
        return " | ".join(parts)

    def _draw(self, line: str) -> None:
        self._drawn = self._seen
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._stream.write(_CLEAR + line[:width])
            self._shown = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()


def duration(seconds: float) -> str:
    """4:07, 1:02:03 or 2 d 03:04:05."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
