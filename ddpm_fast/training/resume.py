"""Where a run's checkpoints are kept, whether one of them is of this run, and signals that end a run in good order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from . import checkpoints
from .checkpoints import Checkpoint

_MISSING = object()


class Stops:
    """Which signal has asked the run to end: "SIGTERM", "SIGINT" or None."""

    asked: str | None = None


@contextlib.contextmanager
def noticed() -> Iterator[Stops]:
    """SIGTERM and Ctrl-C inside are noted, so that a step is finished and saved first. A second Ctrl-C takes effect at
    once. Where somebody has a handler of their own, or in another thread than the main one, nothing is done.
    """
    stops = Stops()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stops.asked == "SIGINT":
            raise KeyboardInterrupt
        stops.asked = signal.Signals(number).name

    defaults: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number, handler in defaults.items() if signal.getsignal(number) is handler]
    for number in ours:
        signal.signal(number, note)
    try:
        yield stops
    finally:
        for number in ours:
            signal.signal(number, defaults[number])


class RunFolder:
    """The checkpoints of a run: OUT/checkpoints.

    keep: how many stay. Nothing is made or changed before `prepare`.
    """

    def __init__(self, out: Path, keep: int) -> None:
        self.folder, self.keep = out / checkpoints.FOLDER, keep
        self.last: Path | None = None
        """The checkpoint written or read last."""

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, tensors on the CPU; broken ones are passed over with a warning. None before the
        first one is written; ValueError where there are some and none is whole, for to start over would lose them.
        """
        if not self.folder.is_dir():
            return None
        for found in checkpoints.whole(self.folder):
            return found
        if any(self.folder.glob("*.safetensors")):
            raise ValueError(
                f"none of the checkpoints in {self.folder} is whole (see the warnings); move them away to start over"
            )
        return None

    def prepare(self) -> None:
        """Makes the folder and deletes what a killed run was writing. OSError naming it where that is not allowed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_temporaries(self.folder)
            probe = self.folder / ".writable"  # to be told now, not when hours of training are to be saved
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise type(error)(error.errno, f"cannot write to {self.folder}: {error.strerror}") from None

    def write(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
        """A new checkpoint; the oldest ones go when it is on the disk."""
        path = self.folder / checkpoints.file_name(state["images_seen"])
        checkpoints.write(path, tensors, state, config)
        self.last = path
        checkpoints.prune(self.folder, self.keep, good=path)
        return path


def check_same(found: Checkpoint, now: Mapping[str, Any], betas: Tensor) -> None:
    """ValueError naming everything that decides a run's result and is not as it was when `found` was written.

    now: {"network", "schedule", "training", "data"} as in a checkpoint; betas: float64 [T].
    """
    before = found.config
    wrong = _differences("network", before, now, inner="options")
    saved = found.tensors.get("schedule.betas")
    if saved is None or saved.shape != betas.shape or not bool((saved == betas).all()):
        wrong.append(f"schedule was {before.get('schedule', {}).get('label')}, is {now['schedule']['label']}")
    wrong += _differences("training", before, now) + _differences("data", before, now, ignored="name")
    if wrong:
        raise ValueError(
            f"{found.path} is of another run: {'; '.join(wrong)}. Go on with what it was trained with, or train in "
            "another folder"
        )


def _differences(
    part: str,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    inner: str | None = None,
    ignored: tuple[str, ...] = (),
) -> list[str]:
    """ "name was x, is y" for every value of a part that differs, and for those of a dict `inner` in it."""
    old, new = before.get(part) or {}, now[part]
    wrong = []
    for name in dict.fromkeys((*old, *new)):
        a, b = old.get(name, _MISSING), new.get(name, _MISSING)
        if name == inner and isinstance(a, dict) and isinstance(b, dict):
            wrong += _differences(part, {part: a}, {part: b})
        elif name != ignored and _plain(a) != _plain(b):
            label = name if part == "training" else f"{part} {name}"
            wrong.append(f"{label} was {_word(a)}, is {_word(b)}")
    return wrong


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _word(value: Any) -> str:
    return "not set" if value is _MISSING else repr(_plain(value))
