"""How far `ddpm-fast sample` is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

_LINE_SECONDS = 30.0  # between lines where there is no terminal


class Bar:
    """Samples drawn: a tqdm bar on a terminal, else a line now and then. of_steps: the sampler shows its own instead,
    where there is one block only."""

    def __init__(self, total: int, blocks: int, shown: bool, say: Callable[[str], None]) -> None:
        self._total, self._done, self._say = total, 0, say
        self._bar: Any = None
        self._began = self._said = time.monotonic()
        shown = shown and sys.stderr.isatty()
        self.of_steps = bool(shown and blocks == 1 and _tqdm())
        if shown and not self.of_steps and (tqdm := _tqdm()) is not None:
            self._bar = tqdm(total=total, unit=" samples", desc="sampling", dynamic_ncols=True)

    def advance(self, count: int) -> None:
        """So many more."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif (now := time.monotonic()) - self._said >= _LINE_SECONDS and self._done < self._total:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate
            self._say(f"{self._done:,} of {self._total:,} samples, {rate:.1f} a second, {_clock(left)} left")

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
