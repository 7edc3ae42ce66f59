"""The steps of training: everything that a step changes, what it is made of, and its state as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..noise import make_rng
from ..schedule import Schedule
from . import build, learning_rate, streams
from .data import as_data, prefetch
from .generators import lent
from .loop import check_precision
from .parallel import averaging, check_agreed, check_used, parallel
from .processes import World, share
from .settings import Settings
from .state import load_network_state, load_optimizer_state, network_state, optimizer_state
from .update import Update

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


class Steps:
    """Takes optimiser steps on `model`; a `Trainer` without run folder, checkpoints and callbacks.

    The arguments and attributes are those of `Trainer`.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        data: Any,
        settings: Settings,
        *,
        optimizer: MakeOptimizer | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a ddpm_fast.Schedule, got {type(schedule).__name__}")
        called, model = model, getattr(model, "_orig_mod", model)  # torch.compile's wrapper; keys are the network's own
        build.check_values(model)
        self.settings, self.schedule, self.data = settings, schedule, as_data(data)
        self.world = World.from_environment(build.device_for(model, device))
        self.device = self.world.device
        settings.check_shares(self.world.size)
        check_agreed(self.world, settings, self.data)
        check_precision(settings.precision, self.device)
        self._conditional = build.check(model, schedule, self.data, settings)

        self.model = model.to(self.device)
        self._channels_last = settings.channels_last and len(self.data.shape) == 3
        if self._channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.objective = build.objective_for(self.model, schedule, self.data, settings, self.device)
        build.probe(self.model, self.data, self.objective, self.device, self._conditional)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = build.optimizer_of(parameters, settings, optimizer)
        trained = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        self._left_out = [parameter for parameter in parameters if id(parameter) not in trained]
        self._base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._update = Update(
            [parameter for parameter in parameters if id(parameter) in trained],
            self.optimizer,
            device=self.device,
            max_grad_norm=settings.max_grad_norm,
            precision=settings.precision,
        )
        self.world.broadcast_(self.model.state_dict().values())
        self.ema = build.average(self.model, settings)
        self._network = parallel(
            called.to(self.device), self.world, compile=settings.compile, sync_batchnorm=settings.sync_batchnorm
        )
        self._all_used = self.world.size == 1

        self.images_seen = self.steps_done = 0
        self._size = settings.batch_size // (self.world.size * settings.accumulate)  # of a micro-batch
        self._order = streams.Order(settings.seed, len(self.data))
        self._rng = make_rng(settings.seed, 0, self.device)
        self._position = self._rng[1]  # of the first image of a micro-batch, written without waiting for the device
        self._batches: Iterator[Tensor] | None = None

    def take_step(self) -> tuple[float, float, float]:
        """One step of the optimiser: (loss, learning rate, norm of the gradient).

        Raises FloatingPointError, naming the step, if the loss or the gradient is not finite. Weights, optimiser,
        average and position are then those before the step; buffers (BatchNorm's statistics) have seen its images.
        """
        with self._modes():
            return self._take_step()

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        """A step is the same step whatever modes of torch its caller is in."""
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            yield

    def _take_step(self) -> tuple[float, float, float]:
        lr = self._set_learning_rate()
        self._zero_grad()  # a callback may have left some
        try:
            with self.world.contact():
                loss, norm = self._update.apply(self._forward_backward(), self._agree)
        except BaseException as error:
            self._batches = None  # they are ahead of a step that was not taken
            if isinstance(error, FloatingPointError):
                raise FloatingPointError(self._diverged(error)) from None
            raise
        finally:
            self._zero_grad()
        self._finish_step()
        return loss, lr, norm

    def _zero_grad(self) -> None:
        """Also of the parameters that an optimiser of the user's own leaves out."""
        self.optimizer.zero_grad()
        for parameter in self._left_out:
            parameter.grad = None

    def _agree(self, both: Tensor) -> list[float]:
        """[loss, norm of the gradient] of all processes; the norm is the same in all, being of averaged gradients."""
        values: list[float] = self.world.mean(both).tolist()
        return values

    def _forward_backward(self) -> Tensor:
        """Gradients into the parameters; the mean loss."""
        first = self.images_seen
        micro_batches = self._micro_batches(first)
        told = self.objective.self_condition and streams.batch_coin(self.settings.seed, first, 0.5)
        if not self.model.training:
            self.model.train()
        if self._batches is None:
            self._batches = prefetch(self.data, self._indices(first), self.settings.workers)
        total = None
        with lent(self.device) as reseed:
            for position in micro_batches:
                images = self._to_device(self._checked(next(self._batches)))
                if self._channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
                labels = self._labels(position)
                self._position.fill_(position)
                reseed(streams.dropout_seed(self.settings.seed, position))
                with averaging(self._network, last=position == micro_batches[-1]):
                    with self._update.autocast():
                        loss = self.objective(self._network, images, labels, self._rng, told) / self.settings.accumulate
                    if not loss.requires_grad:
                        raise ValueError(
                            "the loss depends on no parameter that requires grad: the model must compute its output "
                            "from them, not under no_grad and without detach()"
                        )
                    self._update.backward(loss)
                if not self._all_used:
                    check_used(self.model)
                    self._all_used = True
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
            f"training stopped at step {self.steps_done + 1} (after {self.images_seen} images): {error}; the weights "
            f"are those of step {self.steps_done}{self._saved_last()}. Try a lower lr, warmup, or bf16 instead of fp16"
        )

    def _saved_last(self) -> str:
        """The end of a sentence: which checkpoint there is to go back to."""
        return ""

    # -- what a step is made of ---------------------------------------------------------------------------------------

    def _micro_batches(self, first: int) -> range:
        """The position at which each micro-batch of this process begins, in the step that begins at `first`."""
        begin, end = share(self.settings.batch_size, self.world.rank, self.world.size)
        return range(first + begin, first + end, self._size)

    def _indices(self, first: int) -> Iterator[Tensor]:
        """Of the images of each micro-batch, from a step on and without end."""
        while True:
            for position in self._micro_batches(first):
                yield self._order.indices(position, self._size)
            first += self.settings.batch_size

    def _checked(self, images: Tensor) -> Tensor:
        """What the data gave. TypeError and ValueError unless it is what it says of itself."""
        if not isinstance(images, Tensor):
            raise TypeError(f"{self.data.name}: batch() must give a tensor, got {type(images).__name__}")
        shape = (self._size, *self.data.shape)
        if images.shape != shape or images.dtype != self.data.dtype:
            raise ValueError(
                f"{self.data.name}: batch() must give {self.data.dtype} of shape {shape}, got {images.dtype} of shape "
                f"{tuple(images.shape)}"
            )
        return images

    def _labels(self, position: int) -> Tensor | None:
        if not self._conditional:
            return None
        assert self.data.labels is not None
        return self._to_device(self.data.labels[self._order.indices(position, self._size)])

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None}  # an iterator is no state, and is not copied

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._position = self._rng[1]

    # -- as a whole -------------------------------------------------------------------------------------------------

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
