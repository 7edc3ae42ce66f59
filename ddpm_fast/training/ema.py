"""The exponential moving average of a model's weights, by the rule and with the state dict of ema-pytorch."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

Slot = tuple[dict[str, Any], dict[str, Any], str]  # where a tensor of the average lies, where that of the model


class EMA(nn.Module):
    """A copy of `model`, `ema_model`, whose floating parameters and buffers follow the model's own.

    Of the calls of `update`, counted from n = 0, only those that `update_every` divides do anything:

        n <= update_after_step:  ema = weights
        later:                   ema = decay ema + (1 - decay) weights
                                 decay = clamp(1 - (1 + e / inv_gamma)^-power, min_value, beta), 0 where e <= 0
                                 e = n - update_after_step

    so that the average never contains the weights of the beginning, and looks back further as training goes on. The
    first call copies. State dict: `initted`, `step` (calls so far), `online_model.*` (the model's own weights),
    `ema_model.*`; files of ema-pytorch load here, those of old releases included, and ours load there.

    Args:
        model: what is averaged; kept, not copied, as `online_model`.
        beta: the largest decay, 0..1.
        update_every, update_after_step, inv_gamma, power, min_value: see above.
        buffers: "average": floating buffers are averaged like weights and integers stay as they were, as ema-pytorch
            does it; "copy": all buffers become the model's own at every update, which is what BatchNorm's statistics
            and counters are meant for.
    """

    initted: Tensor
    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        beta: float = 0.9999,
        *,
        update_every: int = 10,
        update_after_step: int = 100,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        min_value: float = 0.0,
        buffers: str = "average",
    ) -> None:
        super().__init__()
        if not 0.0 <= beta <= 1.0:
            raise ValueError(f"beta must be in 0..1, got {beta}")
        if update_every < 1:
            raise ValueError(f"update_every must be at least 1, got {update_every}")
        if buffers not in ("average", "copy"):
            raise ValueError(f"buffers must be 'average' or 'copy', got {buffers!r}")
        self.online_model = model
        self.ema_model = copy.deepcopy(model).requires_grad_(False)
        self.beta, self.update_every, self.update_after_step = beta, update_every, update_after_step
        self.inv_gamma, self.power, self.min_value = inv_gamma, power, min_value
        self.buffers_are_copied = buffers == "copy"
        # The buffers are for the state dict. What is decided is decided by numbers of the host, which wait for nothing.
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("step", torch.tensor(0))
        self._initted, self._step = False, 0
        self._slots = self._find_slots()

    def decay(self, step: int) -> float:
        """How much of the average the call number `step` keeps."""
        epoch = step - self.update_after_step
        if epoch <= 0:
            return 0.0
        return float(min(max(1 - (1 + epoch / self.inv_gamma) ** -self.power, self.min_value), self.beta))

    @torch.no_grad()
    def update(self) -> None:
        """To be called after every optimiser step."""
        step, first = self._step, not self._initted
        self._step, self._initted = step + 1, True
        self.step.fill_(self._step)
        self.initted.fill_(True)
        if not first and step % self.update_every:
            return
        average, current = self._tensors(0)
        if first or step <= self.update_after_step:
            torch._foreach_copy_(average, current)
        elif self.beta < 1:  # ema-pytorch leaves a beta of 1 out of the ramp as well
            torch._foreach_lerp_(average, current, 1 - self.decay(step))
        if self._slots[1]:
            torch._foreach_copy_(*self._tensors(1))

    def _tensors(self, which: int) -> tuple[list[Tensor], list[Tensor]]:
        """Those that are averaged (0) or copied (1), of both models."""
        pairs = self._slots[which]
        return [ours[name] for ours, _, name in pairs], [theirs[name] for _, theirs, name in pairs]

    def _find_slots(self) -> tuple[list[Slot], list[Slot]]:
        """Found once: walking through a network's modules takes longer than averaging a small one."""
        averaged: list[Slot] = []
        copied: list[Slot] = []
        seen = set()
        for ours, theirs in zip(self.ema_model.modules(), self.online_model.modules(), strict=True):
            for owned, own in ((ours._parameters, theirs._parameters), (ours._buffers, theirs._buffers)):
                for name, tensor in own.items():
                    if tensor is None or id(tensor) in seen:
                        continue
                    seen.add(id(tensor))
                    if self.buffers_are_copied and own is theirs._buffers:
                        copied.append((owned, own, name))
                    elif tensor.is_floating_point() or tensor.is_complex():
                        averaged.append((owned, own, name))
        return averaged, copied

    def go_on_from(self, step: int) -> None:
        """As after `step` calls of `update`; the averaged weights were loaded into `ema_model`."""
        self._step, self._initted = step, step > 0
        self.step.fill_(self._step)
        self.initted.fill_(self._initted)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.ema_model(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in (prefix + "initted", prefix + "step"):
            if name in state_dict:
                state_dict[name] = state_dict[name].reshape(())  # old releases: shape (1,)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._initted, self._step = bool(self.initted), int(self.step)
