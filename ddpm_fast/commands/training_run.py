"""A training run as the command line has it: from a configuration to a `Trainer` with everything around it."""

from __future__ import annotations

import errno
import functools
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import torch

from .. import __version__
from ..demo.train import bf16_pays
from ..training import Trainer
from ..training.checkpoints import FOLDER, newest_first
from ..training.data.base import describe
from ..training.processes import LostContact
from . import values
from .config import AUTO, Config
from .errors import CommandError, one_line
from .grids import Grids, drawable
from .log import Log, Plot, TensorBoard
from .networks import build_network, build_schedule
from .progress import Progress, Voice, duration
from .training_setup import check_writable, opened, with_labels, world

CONFIG, LOG, PLOT, SAMPLES, TENSORBOARD = "config.toml", "log.csv", "loss.png", "samples", "tensorboard"
METRICS = "metrics.csv"
DIVERGED, INTERRUPTED = 1, 128 + signal.SIGINT


class TrainingRun:
    """One call of `ddpm-fast train`.

    config: checked, with a source of data and a folder. seconds: of training, after which it stops; None: no limit.
    """

    def __init__(self, config: Config, *, seconds: float | None, quiet: bool) -> None:
        self.world = world(config.training.device)
        self.seconds, self.quiet = seconds, quiet or not self.world.is_main
        self.voice = Voice(sys.stdout)
        self.out = Path(str(config.output.out))
        if self.world.is_main:
            check_writable(self.out)
        self.data = opened(config.data, config.data.split)
        config, classes = with_labels(config, self.data)
        self.schedule = build_schedule(config.schedule)
        network, options = build_network(config.model, self.data.shape, classes, config.training.seed)
        precision = config.training.precision
        if precision == AUTO:
            precision = "bf16" if bf16_pays(self.world.device) else None
        self.config = config.replaced({"model": {"options": options}, "training": {"precision": precision}})
        self.trainer = Trainer(network, self.schedule, self.data, **self._arguments())

    def _arguments(self) -> dict[str, Any]:
        """Of the `Trainer`."""
        chosen = vars(self.config.training).copy()
        chosen |= {"device": self.world.device, "flip": self.config.data.flip, "workers": self.config.data.workers}
        output = self.config.output
        return chosen | {"out": self.out, "keep": output.keep, "save_every": output.save_every}

    def _every(self, images: int | str | None, parts: int) -> int | None:
        """An interval in images; auto is one of so many parts of the run."""
        if images is None or isinstance(images, int):
            return images
        return max(self.config.training.batch_size, self.config.training.images // parts)

    # -- doing it -------------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Trains to the end or until it is stopped; the exit code."""
        trainer, images = self.trainer, self.config.training.images
        if self.world.is_main:
            self._begin()
        if trainer.images_seen >= images:
            self._say(f"nothing to do: this run has seen {trainer.images_seen:,} images; --images N goes on to N")
            return 0
        began = time.perf_counter()
        progress = Progress(images, quiet=self.quiet, stream=self.voice)
        stop = _Stop(self.seconds, progress)
        grids = self._callbacks(progress, stop) if self.world.is_main else None
        try:
            with self._explained():
                trainer.train()
                if grids is not None and trainer.stopped is None and not grids.path(trainer.images_seen).exists():
                    grids.draw(trainer)
        except KeyboardInterrupt:
            self._say(f"stopped by Ctrl-C: {self._where_it_is()}")
            return INTERRUPTED
        in_time = self.world.any(stop.fired)
        if trainer.stopped is not None and not in_time:
            self._say(f"stopped by {trainer.stopped}: {self._where_it_is()}")
            return 128 + signal.Signals[trainer.stopped]
        self._end(time.perf_counter() - began, in_time)
        return 0

    def _begin(self) -> None:
        """Prints and keeps what was chosen."""
        text = values.write_toml(self.config.sections())
        self._say(f"ddpm_fast {__version__} train\n\n{text}")
        parameters = sum(parameter.numel() for parameter in self.trainer.model.parameters())
        self._say(f"{describe(self.data)}\n{self.config.model.kind} of {parameters:,} parameters, {self._where()}")
        if self.trainer.images_seen:
            self._say(f"going on after {self.trainer.images_seen:,} images")
        with self._explained():
            beside = self.out / (CONFIG + ".part")
            beside.write_text(f"# ddpm_fast {__version__}: ddpm-fast train --config takes this file\n\n{text}", "utf-8")
            beside.replace(self.out / CONFIG)

    def _where(self) -> str:
        device = self.world.device
        name = (
            torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
        )
        return name if self.world.size == 1 else f"{self.world.size} processes ({name})"

    def _callbacks(self, progress: Progress, stop: _Stop) -> Grids | None:
        """Hangs onto the trainer what follows it; the grids, if there are any."""
        config, out = self.config, self.out
        log = Log(out / LOG, self._every(config.output.log_every, 1000) or 1)
        callbacks: list[Any] = [log, progress]
        if config.output.plot:
            title = f"{self.data.name}: {config.training.loss} of {config.training.prediction}"
            callbacks.append(Plot(out / PLOT, log, title))
        grids = None
        if config.sampling.sample_every is not None and drawable(self.data.shape):
            chosen = config.sampling
            grids = Grids(
                out / SAMPLES,
                self._every(chosen.sample_every, 10),
                rows=chosen.sample_rows,
                steps=min(chosen.sample_steps, config.schedule.timesteps),
                guidance=chosen.sample_guidance,
                say=self._say if self.quiet else progress.say,
            )
            callbacks.append(grids)
        if config.output.tensorboard:
            board = TensorBoard(out / TENSORBOARD, log)
            callbacks.insert(0, board)  # before the log, which tells it of its rows
            if grids is not None:
                grids.drawn.append(board.picture)
        if config.sampling.eval_every is not None:
            callbacks.append(self._evaluation(config.sampling.eval_every, progress))
        self.trainer.callbacks += [*callbacks, stop]
        return grids

    def _evaluation(self, every: int, progress: Progress) -> Any:
        from ..metrics.hooks import Evaluate  # only those who ask for it wait for it

        chosen = self.config.sampling
        return Evaluate(
            functools.partial(opened, self.config.data),
            every=every,
            num=chosen.eval_samples,
            steps=chosen.sample_steps,
            file=self.out / METRICS,
            say=self._say if self.quiet else progress.say,
        )

    def _end(self, seconds: float, in_time: bool) -> None:
        seen, images = self.trainer.images_seen, self.config.training.images
        if in_time:
            self._say(f"stopped after {duration(seconds)}: {self._where_it_is()}")
        else:
            self._say(f"done: {seen:,} images of {images:,}, the last part in {duration(seconds)}")
        self._say(f"  checkpoints   {self.out / FOLDER}")
        self._say(f"  losses        {self.out / LOG}" + (f", {self.out / PLOT}" if self.config.output.plot else ""))
        if (self.out / SAMPLES).is_dir():
            self._say(f"  samples       {self.out / SAMPLES}")
        drawn = self.out / "drawn"
        self._say(f"  draw more     ddpm-fast sample {quote(str(self.out))} --num 64 --out {quote(str(drawn))}")

    def _where_it_is(self) -> str:
        return f"saved after {self.trainer.images_seen:,} images; ddpm-fast train --out {quote(str(self.out))} goes on"

    def _last_checkpoint(self) -> str:
        with_it = newest_first(self.out / FOLDER) if (self.out / FOLDER).is_dir() else []
        if not with_it:
            return "no checkpoint was written yet"
        return f"{with_it[0].path} ({with_it[0].images_seen:,} images) is whole, and the same command goes on from it"

    def _say(self, text: str) -> None:
        if not self.quiet:
            print(text, file=self.voice, flush=True)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What ends a run that had begun, as one line with the checkpoint that it can go on from."""
        try:
            yield
        except FloatingPointError as error:
            raise CommandError(one_line(error), DIVERGED) from error  # names the last checkpoint itself
        except OSError as error:
            what = "the disk is full" if error.errno == errno.ENOSPC else one_line(error)
            raise CommandError(f"{what}; {self._last_checkpoint()}") from error
        except LostContact as error:
            raise CommandError(one_line(error)) from error
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                size = f"--batch-size {self.config.training.batch_size}"
                raise CommandError(f"out of memory with {size}; try --accumulate 4, or a smaller network") from error
            raise


class _Stop:
    """A callback that ends the training after so many seconds as SIGTERM would: between two steps, saved.

    It is the last callback: what the others do before the first step is not training.
    """

    def __init__(self, seconds: float | None, progress: Progress) -> None:
        self.seconds, self.progress, self.fired = seconds, progress, False

    def on_start(self, trainer: Any) -> None:
        if self.seconds is not None:
            self.progress.deadline = time.perf_counter() + self.seconds

    def on_step(self, trainer: Any, report: Any) -> None:
        deadline = self.progress.deadline
        if deadline is not None and not self.fired and time.perf_counter() >= deadline:
            self.fired = True
            signal.raise_signal(signal.SIGTERM)
