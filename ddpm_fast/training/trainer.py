"""`Trainer`: trains a diffusion model; its state is a function of the seed and of how many images it has seen."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import make_rng
from ..sampler import Sampler
from ..schedule import Schedule
from . import build, learning_rate, streams
from .data import as_data, prefetch
from .generators import lent
from .loop import check_precision, uninterrupted
from .settings import Settings
from .state import load_network_state, load_optimizer_state, network_state, optimizer_state
from .update import Update

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclasses.dataclass(frozen=True)
class StepReport:
    """What a step was like; `seconds` is how long it took, waiting for its images included."""

    images_seen: int
    step: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float


class Trainer:
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
        ema, ema_power: the average of the weights: decay min(ema, 1 - (1 + n)^-ema_power) at step n, so that it does not
            hold on to the beginning (ema_power=None: ema from the first step on). ema=None: no average. Buffers are
            copied.
        channels_last: memory format of the network and its images (N, C, H, W).
        compile: torch.compile the network.
        sync_batchnorm: batch statistics over all processes; otherwise they are each micro-batch's own.
        seed: of everything that is drawn; torch's generators are left as they were.
        device: None: where the model is, or where that is a CPU but there is CUDA, the current GPU.
        workers: processes that read images; None: as many as help.
        save_every, keep: images between checkpoints, and how many of them stay.
        resume: whether to go on from the newest checkpoint in `out`.

    Attributes: images_seen, steps_done, model, ema (an `EMA` or None), optimizer, schedule, data, settings, device;
    callbacks, a list of objects with any of on_start(trainer), on_step(trainer, StepReport), on_save(trainer, path) and
    on_end(trainer).

    Raises ValueError and TypeError for bad arguments, before anything is changed.
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
        self.settings = Settings(**{field.name: given[field.name] for field in dataclasses.fields(Settings)})
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a ddpm_fast.Schedule, got {type(schedule).__name__}")
        self.schedule, self.data = schedule, as_data(data)
        self.out = None if out is None else Path(out)
        self.settings.check_shares(1)
        self.device = build.device_for(model, device)
        check_precision(precision, self.device)
        self._conditional = build.check(model, schedule, self.data, self.settings)

        self.model = model.to(self.device)
        self._channels_last = channels_last and len(self.data.shape) == 3
        if self._channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.objective = build.objective_for(self.model, schedule, self.data, self.settings, self.device)
        build.probe(self.model, self.data, self.objective, self.device, self._conditional)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build.adamw(parameters, self.settings) if optimizer is None else optimizer(parameters)
        self._base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._update = Update(
            parameters, self.optimizer, device=self.device, max_grad_norm=max_grad_norm, precision=precision
        )
        self.ema = build.average(self.model, self.settings)
        self._network: Callable[..., Any] = torch.compile(self.model) if compile else self.model

        self.images_seen = self.steps_done = 0
        self.stopped: str | None = None
        self.callbacks: list[Any] = []
        self._order = streams.Order(seed, len(self.data))
        self._rng = make_rng(seed, 0, self.device)
        self._position = self._rng[1]  # of the first image of a micro-batch, written without waiting for the device
        self._batches: Iterator[Tensor] | None = None

    # -- training -----------------------------------------------------------------------------------------------------

    def train(self, until: int | None = None) -> None:
        """Steps until `images` (or `until`, if that is less) images have been seen.

        Ctrl-C takes effect between two steps (a second one at once): everything then belongs together, and `train` goes
        on from there. FloatingPointError names the step whose loss or gradient was not finite.
        """
        goal = self.settings.images if until is None else min(until, self.settings.images)
        self._call("on_start")
        try:
            while self.images_seen < goal:
                self.step()
        finally:
            self._call("on_end")

    def step(self) -> float:
        """One step of the optimiser; the loss, mean over the batch.

        Raises FloatingPointError, naming the step, if the loss or the gradient is not finite. Weights, optimiser,
        average and position are then those before the step; buffers (BatchNorm's statistics) have seen its images.
        """
        began, report = time.perf_counter(), None
        try:
            with uninterrupted():
                lr = self._set_learning_rate()
                try:
                    loss, norm = self._update.apply(self._forward_backward())
                except FloatingPointError as error:
                    raise FloatingPointError(self._diverged(error)) from None
                finally:
                    self.optimizer.zero_grad()  # after an error, too: the next step starts from none
                self._finish_step()
                report = StepReport(self.images_seen, self.steps_done, loss, lr, norm, time.perf_counter() - began)
        finally:
            if report is None:
                self._batches = None  # they are ahead of a step that was not taken
            else:
                self._call("on_step", report)
        return report.loss

    def _forward_backward(self) -> Tensor:
        """Gradients into the parameters; the mean loss."""
        size, first = self.settings.batch_size // self.settings.accumulate, self.images_seen
        told = self.objective.self_condition and streams.batch_coin(self.settings.seed, first, 0.5)
        if not self.model.training:
            self.model.train()
        if self._batches is None:
            self._batches = prefetch(self.data, self._indices(first), self.settings.workers)
        total = None
        with lent(self.device) as reseed:
            for position in self._micro_batches(first):
                images = self._to_device(next(self._batches))
                if self._channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                labels = self._labels(position, size)
                self._position.fill_(position)
                reseed(streams.dropout_seed(self.settings.seed, position))
                with self._update.autocast():
                    loss = self.objective(self._network, images, labels, self._rng, told) / self.settings.accumulate
                self._update.backward(loss)
                total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total

    def _finish_step(self) -> None:
        if self.ema is not None:
            self.ema.update()
        self.images_seen += self.settings.batch_size
        self.steps_done += 1

    def _set_learning_rate(self) -> float:
        """Of the step to come, into the optimiser; that of the first group."""
        chosen = self.settings
        factor = learning_rate.factor(
            self.images_seen, images=chosen.images, warmup=chosen.warmup, schedule=chosen.lr_schedule
        )
        for group, base in zip(self.optimizer.param_groups, self._base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(factor * base)
            else:
                group["lr"] = factor * base
        return factor * self._base_lrs[0]

    def _diverged(self, error: FloatingPointError) -> str:
        return (
            f"training stopped at step {self.steps_done + 1} (after {self.images_seen} images): {error}; the weights are "
            f"those of step {self.steps_done}. Try a lower lr, warmup, or bf16 instead of fp16"
        )

    def _call(self, event: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            function = getattr(callback, event, None)
            if function is not None:
                function(self, *arguments)

    # -- what a step is made of ---------------------------------------------------------------------------------------

    def _micro_batches(self, first: int) -> range:
        """The position at which each micro-batch of the step begins."""
        return range(first, first + self.settings.batch_size, self.settings.batch_size // self.settings.accumulate)

    def _indices(self, first: int) -> Iterator[Tensor]:
        """Of the images of each micro-batch, from a step on and without end."""
        size = self.settings.batch_size // self.settings.accumulate
        while True:
            for position in self._micro_batches(first):
                yield self._order.indices(position, size)
            first += self.settings.batch_size

    def _labels(self, position: int, count: int) -> Tensor | None:
        if not self._conditional:
            return None
        assert self.data.labels is not None
        return self._to_device(self.data.labels[self._order.indices(position, count)])

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

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

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that a step changes: (tensors by name, the rest, ready for JSON).

        The tensors are the live ones, not copies: "model.<key>", "ema.<key>", "optimizer.<i>.<name>", and the
        "schedule.betas", float64.
        """
        moments, rest = optimizer_state(self.optimizer)
        tensors = {**network_state("model.", self.model), **moments}
        if self.ema is not None:
            tensors.update(network_state("ema.", self.ema.ema_model))
        tensors["schedule.betas"] = torch.tensor(self.schedule.betas)
        scaler = self._update.scaler
        state = {
            "images_seen": self.images_seen,
            "step": self.steps_done,
            "seed": self.settings.seed,
            "batch_size": self.settings.batch_size,
            "ema_step": None if self.ema is None else int(self.ema.step),
            "optimizer": rest,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return tensors, state

    def load_state(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Goes back to what `state` gave; the values are copied. The caller has checked that they are of this run."""
        load_optimizer_state(self.optimizer, tensors, state["optimizer"])
        load_network_state("model.", self.model, tensors)
        if self.ema is not None:
            load_network_state("ema.", self.ema.ema_model, tensors)
            self.ema.go_on_from(state["ema_step"])
        if self._update.scaler is not None and state["scaler"] is not None:
            self._update.scaler.load_state_dict(state["scaler"])
        self.images_seen, self.steps_done = state["images_seen"], state["step"]
        self._batches = None
