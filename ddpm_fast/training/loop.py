"""One optimiser step of a model that returns its own loss: accumulation, autocast, clipping, EMA."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor, nn

from .ema import EMA
from .update import PRECISIONS, Update


class Loop:
    """Takes optimiser steps; everything that a step changes is in `model`, `optimizer`, `scaler`, `ema`.

    Args:
        model: model(batch) is the mean loss of a batch, a scalar tensor.
        optimizer: of the model's parameters.
        ema: updated after each step, or None.
        accumulate: batches a step; the loss is the mean over them.
        max_grad_norm: the gradient's norm over all parameters is scaled down to this.
        precision: None (float32), "bf16", or "fp16" (CUDA only; the loss is scaled, `scaler`).
        device: of the model; batches are moved there.

    Raises ValueError for an unknown precision, and for fp16 on a CPU.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        ema: EMA | None = None,
        accumulate: int = 1,
        max_grad_norm: float = 1.0,
        precision: str | None = None,
    ) -> None:
        check_precision(precision, device)
        self.model, self.optimizer, self.ema, self.device = model, optimizer, ema, device
        self.accumulate = accumulate
        self._update = Update(
            list(model.parameters()), optimizer, device=device, max_grad_norm=max_grad_norm, precision=precision
        )

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """Of the loss in fp16."""
        return self._update.scaler

    def step(self, batches: Iterator[Tensor]) -> float:
        """One step on the next `accumulate` batches; the loss.

        Ctrl-C waits until the step is whole. Raises FloatingPointError, before any weight is changed, if the loss or
        (without a scaler, which sees to it) the gradient is not finite.
        """
        with uninterrupted():
            self.model.train()
            total = torch.zeros((), device=self.device)
            try:
                for _ in range(self.accumulate):
                    batch = next(batches).to(self.device, non_blocking=True)
                    with self._update.autocast():
                        loss = self.model(batch) / self.accumulate
                    self._update.backward(loss)
                    total += loss.detach()
                value, _ = self._update.apply(total)
            finally:
                self.optimizer.zero_grad()  # after an error, too: the next step starts from none
            if self.ema is not None:
                self.ema.update()
        return value


def check_precision(precision: str | None, device: torch.device) -> None:
    """ValueError for a precision that is not known, or that `device` cannot train in."""
    if precision is None:
        return
    if precision not in PRECISIONS:
        raise ValueError(f"mixed precision must be {' or '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp16" and device.type != "cuda":
        raise ValueError(f"fp16 trains on CUDA devices only, and the model is on {device}; use bf16")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """What is inside runs to its end before Ctrl-C takes effect; a second Ctrl-C takes effect at once.

    Where somebody has a handler of their own for it, or in another thread than the main one, nothing is done.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked = False

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt
