"""From a loss to new weights: mixed precision, the guard against what is not finite, clipping, the optimiser's step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}
_SMALLEST_SCALE = 1e-6  # of fp16's loss: below, it is not the scale that makes gradients overflow


class Update:
    """One optimiser's part of a step.

    Args:
        parameters: those that are trained.
        optimizer: of them.
        device: of the parameters.
        max_grad_norm: the gradient's norm over all parameters is scaled down to this; None leaves it.
        precision: None (float32), "bf16", or "fp16" (the loss is scaled, `scaler`).
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        max_grad_norm: float | None = 1.0,
        precision: str | None = None,
    ) -> None:
        self.parameters, self.optimizer, self.device = list(parameters), optimizer, device
        self.max_grad_norm = max_grad_norm
        self._dtype = PRECISIONS[precision] if precision is not None else None
        self.scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None

    def autocast(self) -> Any:
        """The context of a forward pass."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def apply(self, loss: Tensor, agree: Callable[[Tensor], list[float]] | None = None) -> tuple[float, float]:
        """Clips the gradients that lie in the parameters and takes the step; (loss, norm of the gradient).

        loss: of the whole step, a scalar, for the guard. agree: makes one of what several processes have, [loss, norm].
        Raises FloatingPointError, before any weight is changed, if the loss or (without a scaler, which sees to it) the
        gradient is not finite. The gradients stay where they are: the caller frees them.
        """
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        both = torch.stack([loss.detach(), _norm(gradients, loss)])
        value, norm = both.tolist() if agree is None else agree(both)  # the only wait for the device in a step
        if not math.isfinite(value) or (self.scaler is None and not math.isfinite(norm)):
            if self.scaler is not None:
                self.scaler.update()  # closes the step that it has seen
            raise FloatingPointError(
                f"the loss is {value}" if not math.isfinite(value) else f"the gradient's norm is {norm}"
            )
        if self.max_grad_norm is not None and self.max_grad_norm < norm < math.inf:
            torch._foreach_mul_(gradients, self.max_grad_norm / (norm + 1e-6))
        if self.scaler is None:
            self.optimizer.step()
            return value, norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not math.isfinite(norm) and self.scaler.get_scale() < _SMALLEST_SCALE:
            raise FloatingPointError(f"the gradient's norm is {norm} in fp16 whatever the loss is scaled by")
        return value, norm


def _norm(gradients: list[Tensor], like: Tensor) -> Tensor:
    """The Euclidean norm of all of them together, in the dtype of `like`."""
    if not gradients:
        return torch.zeros_like(like)
    norms = [norm.to(like.dtype) for norm in torch._foreach_norm(gradients)]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total
