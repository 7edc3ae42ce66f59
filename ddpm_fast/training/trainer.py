"""`Trainer`: trains a diffusion model; its state is a function of the seed and of how many images it has seen."""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..sampler import Sampler
from ..schedule import Schedule
from . import checkpoints
from .loop import uninterrupted
from .resume import SIGNALS, RunFolder, Stops, config_of, noticed, open_run, take
from .settings import Settings
from .steps import MakeOptimizer, Steps


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a step was like; `seconds` is how long it took, waiting for its images included."""

    images_seen: int
    step: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


class Trainer(Steps):
    """Trains `model` to denoise, from (seed, number of images seen) alone: stopped anywhere and continued, it ends with
    the same weights.

    Args:
        model: a Module called as model(x, t), or model(x, t, labels) where `model.num_classes` says so; see `Sampler`.
        schedule: the noising.
        data: `Data`, a tensor or array (N, ...) of uint8 images or floats in model range, (images, labels), a Dataset.
        out: the run's folder; None keeps everything in memory.
        images: how many images to train on in all, whole batches: the last one may go beyond.
        batch_size: images a step, over all processes.
        prediction: what the network learns to give: "eps", "x0" or "v" = sqrt(ab) eps - sqrt(1 - ab) x0.
        loss, huber_delta: "mse", "l1", or "huber" with its delta.
        weighting, min_snr_gamma, p2_gamma, p2_k: loss weights by timestep, "min-snr" or "p2", see `loss_weights`.
        offset_noise: adds so much of one normal per image and channel to the noise.
        label_dropout: the share of labels replaced by `model.null_label`, for guidance; 0.1 is usual.
        self_condition: every other step tells the network its own estimate of x0; None: as `model.self_condition`.
        flip: mirrors every other image.
        lr, betas, weight_decay: of AdamW; or
        optimizer: parameters -> an optimiser of your own, whose learning rates are what `lr` is otherwise.
        warmup, lr_schedule: images over which the learning rate rises; then "constant", or "cosine" down to 0.
        accumulate: micro-batches a step.
        max_grad_norm: the gradient is scaled down to this norm; None leaves it.
        precision: None (as the model is), "bf16" or "fp16" (CUDA; the loss is scaled): autocast.
        ema, ema_power: the average of the weights: decay min(ema, 1 - (1 + n)^-ema_power) at step n, so that it does
            not hold on to the beginning (ema_power=None: ema at once). ema=None: no average. Buffers are copied.
        channels_last: memory format of the network and its images (N, C, H, W).
        compile: torch.compile the network.
        sync_batchnorm: batch statistics over all processes; otherwise they are each micro-batch's own.
        seed: of everything that is drawn; torch's generators are left as they were.
        device: None: where the model is, or where that is a CPU but there is CUDA, the current GPU.
        workers: processes that read images; None: as many as help.
        save_every, keep: images between checkpoints (None: ten minutes), and how many of them stay.
        resume: whether to go on from the newest checkpoint in `out`; False wants a folder without any. Broken ones are
            passed over with a warning. A run goes on with the model, data and settings it was started with: images (but
            for "cosine"), save_every, keep, workers, device, compile, channels_last and accumulate may change.

    Attributes: images_seen, steps_done, model, ema (an `EMA` or None), optimizer, schedule, data, settings, device,
    world (a `World`), objective, out; stopped: None, or the signal that ended `train`; callbacks: a list of objects
    with any of on_start(trainer), on_step(trainer, StepReport), on_save(trainer, path) and on_end(trainer), called in
    process 0.

    Raises ValueError and TypeError for bad arguments, before anything is changed; ValueError for a checkpoint in `out`
    of another run and while another process trains in `out`, OSError where `out` cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        data: Any,
        *,
        out: str | os.PathLike[str] | None = None,
        images: int = 100_000,
        batch_size: int = 128,
        prediction: str = "eps",
        loss: str = "mse",
        huber_delta: float = 1.0,
        weighting: str | None = None,
        min_snr_gamma: float = 5.0,
        p2_gamma: float = 1.0,
        p2_k: float = 1.0,
        offset_noise: float = 0.0,
        label_dropout: float = 0.0,
        self_condition: bool | None = None,
        flip: bool = False,
        lr: float = 2e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        optimizer: MakeOptimizer | None = None,
        warmup: int = 0,
        lr_schedule: str = "constant",
        accumulate: int = 1,
        max_grad_norm: float | None = 1.0,
        precision: str | None = None,
        ema: float | None = 0.9999,
        ema_power: float | None = 0.75,
        channels_last: bool = True,
        compile: bool = False,
        sync_batchnorm: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
        workers: int | None = None,
        save_every: int | None = None,
        keep: int = 3,
        resume: bool = True,
    ) -> None:
        given = locals()
        chosen = {field.name: given[field.name] for field in dataclasses.fields(Settings)}
        super().__init__(model, schedule, data, Settings(**chosen), optimizer=optimizer, device=device)
        self.out = None if out is None else _folder(out)
        self.stopped: str | None = None
        self.callbacks: list[Any] = []
        self._savable = False
        self._config = config_of(self, own=optimizer is not None)
        self._run = None if self.out is None else RunFolder(self.out, keep, save_every)
        self._stops = Stops()
        self._agreed: str | None = None
        if self._run is not None:
            open_run(self, self._run, self._config)

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, until: int | None = None) -> None:
        """Steps until `images` (or `until`, if that is less) images have been seen; saves from time to time, and then.

        SIGTERM, SIGHUP and Ctrl-C (to any of the processes) wait until the step is taken and saved; `stopped` then
        names the signal, and after Ctrl-C KeyboardInterrupt follows. A second Ctrl-C takes effect at once. Raises
        FloatingPointError, naming the step and the last checkpoint, if the loss or gradient was not finite; OSError if
        a checkpoint cannot be written: those that are there stay, and `train` and `save` may be called again;
        ValueError while another process trains in the same folder.
        """
        if until is not None and (isinstance(until, bool) or not isinstance(until, numbers.Integral)):
            raise TypeError(f"until must be a number of images, got {until!r}")
        goal = self.settings.images if until is None else min(int(until), self.settings.images)
        self.stopped = self._agreed = None
        self._call("on_start")
        try:
            with self._alone(), noticed() as self._stops:
                while self.images_seen < goal and not self._asked():
                    self.step()
                    self._save_if_due()
                if self._run is not None and not self._run.is_saved(self.images_seen):
                    self.save()
                # The others wait here for process 0, which writes.
                self.stopped = next((name for name in SIGNALS if self.world.any(self._stops.asked == name)), None)
        finally:
            self._call("on_end")
        if self.stopped == "SIGINT":
            raise KeyboardInterrupt

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """No other run trains in this one's folder meanwhile; process 0 sees to it."""
        return contextlib.nullcontext() if self._run is None or not self.world.is_main else self._run.held()

    def _asked(self) -> bool:
        """Whether to stop now. Several processes have agreed on it in the step before."""
        return (self._stops.asked if self.world.size == 1 else self._agreed) is not None

    def _agree(self, both: Tensor) -> list[float]:
        """Beside loss and norm, whether a process was asked to stop: one call for all that is to be agreed on."""
        if self.world.size == 1:
            return super()._agree(both)
        asked = both.new_tensor([float(self._stops.asked == name) for name in SIGNALS])
        loss, norm, *wishes = self.world.mean(torch.cat([both, asked])).tolist()
        self._agreed = next((name for name, wish in zip(SIGNALS, wishes, strict=True) if wish), None)
        return [loss, norm]

    def step(self) -> float:
        """One step of the optimiser; the loss, mean over the batch.

        Raises FloatingPointError, naming the step, if the loss or the gradient is not finite. Weights, optimiser,
        average and position are then those before the step; buffers (BatchNorm's statistics) have seen its images.
        """
        began, report = time.perf_counter(), None
        try:
            with uninterrupted():
                loss, lr, norm = self.take_step()
                report = StepReport(self.images_seen, self.steps_done, loss, lr, norm, time.perf_counter() - began)
        finally:
            if report is not None:
                self._call("on_step", report)
        return loss

    def _saved_last(self) -> str:
        return "" if self._run is None or self._run.last is None else f", the last checkpoint is {self._run.last}"

    def _call(self, event: str, *arguments: Any) -> None:
        if not self.world.is_main:
            return
        for callback in self.callbacks:
            function = getattr(callback, event, None)
            if function is not None:
                function(self, *arguments)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self) -> Path:
        """Writes a checkpoint into the run's folder, OUT/checkpoints; its path. The oldest beyond `keep` go.

        Process 0 writes, from its own buffers; the others do nothing. Raises ValueError without `out`, and OSError if
        it cannot be written: those that are there stay.
        """
        if self._run is None:
            raise ValueError("this Trainer has no folder to save in; give it one: Trainer(..., out=)")
        if self.world.is_main:
            path = self._run.write(*self.state(), self._config)
            self._call("on_save", path)
        return self._run.path(self.images_seen)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Goes on from a checkpoint: a file, or the newest whole one in a run's folder. In every process.

        Raises FileNotFoundError; ValueError for a broken file, and for one of another model, data or settings that
        decide the result. Then nothing has changed.
        """
        found = checkpoints.read(checkpoints.find(path))
        take(self, found, self._config)
        if self._run is not None:
            self._run.took(found.path, found.images_seen)

    def _save_if_due(self) -> None:
        """Process 0 looks at its clock; the others meet it again in the next step."""
        if self._run is not None and self.world.is_main and not self._savable:
            checkpoints.check(*self.state(), self._config)  # now that the optimiser has a state
            self._savable = True
        if self._run is not None and self.world.is_main and self._run.is_due(self.images_seen):
            self.save()

    # -- what comes out -----------------------------------------------------------------------------------------------

    def sampler(self, ema: bool = True, **options: Any) -> Sampler:
        """A `Sampler` of the averaged weights (of the trained ones with ema=False, or without an average).

        options: of `Sampler`; prediction, shape and self_condition are what was trained unless given.
        """
        model = self.ema.ema_model if ema and self.ema is not None else self.model
        trained = {
            "prediction": self.settings.prediction,
            "shape": self.data.shape,
            "self_condition": self.objective.self_condition,
        }
        return Sampler(model, self.schedule, **{**trained, **options})


def _folder(out: str | os.PathLike[str]) -> Path:
    """As an absolute path: a run stays where it was begun when the working folder changes."""
    if not os.fspath(out):
        raise ValueError("out must name a folder, got an empty text; None keeps everything in memory")
    return Path(out).absolute()
