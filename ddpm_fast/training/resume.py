"""Where a run's checkpoints are kept, when they are written, whether one of them is of this run; and signals."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checkpoints
from .checkpoints import Checkpoint
from .lock import alone

if TYPE_CHECKING:
    from .steps import Steps

SECONDS = 600.0  # between checkpoints, where no number of images is given
SIGNALS = (
    "SIGINT",
    "SIGTERM",
    "SIGHUP",
)  # that end a run in good order; the first one that was sent to a process counts
_MISSING = object()


class Stops:
    """Which signal has asked the run to end: "SIGTERM", "SIGHUP", "SIGINT" or None."""

    asked: str | None = None


@contextlib.contextmanager
def noticed() -> Iterator[Stops]:
    """SIGTERM, SIGHUP and Ctrl-C inside are noted, so that a step is finished and saved first. A second Ctrl-C takes
    effect at once. Where somebody has a handler of their own, or in another thread than the main one, nothing is done.
    """
    stops = Stops()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and stops.asked == "SIGINT":
            raise KeyboardInterrupt
        stops.asked = signal.Signals(number).name

    defaults: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    if hasattr(signal, "SIGHUP"):  # the terminal is gone; nohup ignores it, and then so do we
        defaults[signal.SIGHUP] = signal.SIG_DFL
    ours = []
    if threading.current_thread() is threading.main_thread():
        ours = [number for number, handler in defaults.items() if signal.getsignal(number) is handler]
    try:
        for number in ours:
            signal.signal(number, note)
        yield stops
    finally:
        for number in ours:
            signal.signal(number, defaults[number])


class RunFolder:
    """The checkpoints of a run, in OUT/checkpoints.

    Args:
        out: the run's folder. Nothing is made or changed before `prepare`.
        keep: how many checkpoints stay.
        every: images from one to the next; None: ten minutes.
    """

    def __init__(self, out: Path, keep: int, every: int | None) -> None:
        self.folder, self.keep, self.every = out / checkpoints.FOLDER, keep, every
        self.last: Path | None = None
        """The checkpoint that was written or taken up last."""
        self._at, self._when = 0, time.monotonic()  # images seen and time of the last one, or of the beginning

    def newest(self) -> Checkpoint | None:
        """The newest whole checkpoint, tensors on the CPU; broken ones are passed over with a warning. None before the
        first one is written; ValueError where there are some and none is whole, for to start over would lose them.
        """
        for found in checkpoints.whole(self.folder):
            return found
        if any(self.folder.glob("*.safetensors")):
            raise ValueError(
                f"none of the checkpoints in {self.folder} is whole (see the warnings); move them away to start over"
            )
        return None

    def check_new(self) -> None:
        """ValueError where there are checkpoints: those of a run that starts over would be taken for theirs."""
        found = checkpoints.newest_first(self.folder)
        if found:
            raise ValueError(
                f"{self.folder} holds a run of {found[0].images_seen} images already; go on with it (resume=True), or "
                "use another folder"
            )

    def prepare(self) -> None:
        """Makes the folder and deletes what a killed run was writing. OSError naming it where that is not allowed,
        ValueError while another process trains there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with alone(self.folder):  # opening its file tells now, not when hours of training are to be saved
                checkpoints.remove_temporaries(self.folder)
        except OSError as error:
            raise OSError(error.errno, f"cannot write to {self.folder}: {error.strerror}") from None

    def held(self) -> contextlib.AbstractContextManager[None]:
        """Keeps other processes from training in this folder meanwhile; ValueError where one does already."""
        with contextlib.suppress(OSError):  # what is wrong with a folder is said by the next line
            self.folder.mkdir(parents=True, exist_ok=True)
        return alone(self.folder)

    def is_due(self, images_seen: int) -> bool:
        """Whether it is time for a checkpoint."""
        if self.every is None:
            return time.monotonic() - self._when >= SECONDS
        return images_seen // self.every > self._at // self.every

    def is_saved(self, images_seen: int) -> bool:
        """Whether the checkpoint after so many images was the last to be written or taken up."""
        return self.last == self.path(images_seen)

    def took(self, path: Path, images_seen: int) -> None:
        """A checkpoint was written or taken up: what `is_due` counts from."""
        self.last, self._at, self._when = path, images_seen, time.monotonic()

    def path(self, images_seen: int) -> Path:
        """Of the checkpoint after so many images."""
        return self.folder / checkpoints.file_name(images_seen)

    def write(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any], config: Mapping[str, Any]) -> Path:
        """A new checkpoint; the oldest ones go when it is on the disk."""
        path = self.path(state["images_seen"])
        with contextlib.suppress(OSError):  # what is wrong is said when the file is written
            self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write(path, tensors, state, config)
        self.took(path, state["images_seen"])
        checkpoints.prune(self.folder, self.keep, good=path)
        return path


def config_of(trainer: Steps, *, own: bool) -> dict[str, Any]:
    """What a run is, ready for JSON: {"network", "schedule", "training", "data"}; it decides the run's result.

    own: whether the optimiser is the user's own; its learning rates then count, and not the settings'.
    """
    schedule, data, optimizer = trainer.schedule, trainer.data, trainer.optimizer
    training = {**trainer.settings.deciding(), "optimizer": type(optimizer).__name__}
    if own:
        training["lr"] = [float(group["lr"]) for group in optimizer.param_groups]
    return {
        "network": checkpoints.network_config(trainer.model),
        "schedule": {"label": repr(schedule), "T": len(schedule.betas)},
        "training": training,
        "data": {
            "name": data.name,
            "shape": list(data.shape),
            "dtype": str(data.dtype).removeprefix("torch."),
            "num_classes": data.num_classes,
            "images": len(data),
            "fingerprint": data.fingerprint(),
        },
    }


def open_run(trainer: Steps, run: RunFolder, config: Mapping[str, Any]) -> None:
    """Lets a new trainer go on from the newest checkpoint in its folder, if it is to, and makes the folder ready.

    Process 0 looks for it, writes and deletes; the others read the file that it has chosen.
    """
    world = trainer.world
    checkpoints.check(*trainer.state(), config)  # to be told now, not when hours of training are to be saved
    if trainer.settings.resume:
        newest = run.newest() if world.is_main else None
        path = world.from_main(None if newest is None else newest.path)
        if path is not None:
            newest = newest or checkpoints.read(path)
            take(trainer, newest, config)
            run.took(path, newest.images_seen)
    elif world.is_main:
        run.check_new()
    if world.is_main:
        run.prepare()
    world.barrier()


def take(trainer: Steps, found: Checkpoint, config: Mapping[str, Any]) -> None:
    """Lets a trainer go on from a checkpoint. ValueError, before anything has changed, where it is of another run."""
    check_same(found, config, torch.from_numpy(trainer.schedule.betas.copy()))
    checkpoints.check_fits(found.part("model"), trainer.model.state_dict(), found.path)
    if trainer.ema is not None:
        checkpoints.check_fits(found.part("ema"), trainer.ema.ema_model.state_dict(), found.path)
    trainer.load_state(found.tensors, found.state)


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
    part: str, before: Mapping[str, Any], now: Mapping[str, Any], *, inner: str = "", ignored: str = ""
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
