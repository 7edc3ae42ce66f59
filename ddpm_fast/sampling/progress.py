"""A tqdm bar that asks the device how it fares only when it is redrawn."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

REFRESH_SECONDS = 0.5


class Progress:
    """Counts rows; about twice a second redraws the bar and calls `check`, which may raise.

    show: True asks for a bar (ImportError without tqdm), False for none, None for one where stderr is a terminal.
    """

    def __init__(self, rows: int, show: bool | None, check: Callable[[], None]) -> None:
        self._bar = _bar(rows, show)
        self._check = check
        self._pending = 0
        self._drawn = time.monotonic()

    @property
    def shown(self) -> bool:
        """Whether there is a bar."""
        return self._bar is not None

    def advance(self) -> None:
        """One more row is under way."""
        if self._bar is None:
            return
        self._pending += 1
        if time.monotonic() - self._drawn >= REFRESH_SECONDS:
            self._redraw()

    def _redraw(self) -> None:
        self._check()  # waits for the device, so that the bar shows what is done and not what was launched
        self._bar.update(self._pending)
        self._pending = 0
        self._drawn = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._pending)
            self._bar.close()


def _bar(rows: int, show: bool | None) -> Any:
    if show is False or (show is None and not sys.stderr.isatty()):
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        if show is None:
            return None
        raise ImportError("progress=True needs tqdm: pip install tqdm, or pass progress=False") from None
    return tqdm(total=rows, desc="sampling", unit="step")
