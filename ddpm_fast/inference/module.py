"""The model as PyTorch runs it: what a plan is compared with once, and what serves where it turns out to be faster."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .trial import busy_seconds

CLEARLY = 1.3  # times faster than the module, and no more comparisons are made
COMPARISONS = 4


class Module:
    """Calls the model in `dtype`: itself where its parameters are of it, else a copy (half dtypes: channels last)."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self.dtype = model, dtype
        self._copy: nn.Module | None = None

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None, x_self_cond: Tensor | None = None) -> Tensor:
        model = self._model
        if any(parameter.dtype != self.dtype for parameter in model.parameters()):
            if self._copy is None:
                self._copy = copy.deepcopy(model).to(self.dtype).eval().requires_grad_(False)
                if self.dtype != torch.float32:
                    self._copy = self._copy.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            model = self._copy
        memory = torch.contiguous_format if self.dtype == torch.float32 else torch.channels_last
        x = x.to(self.dtype, memory_format=memory)
        if x_self_cond is None:
            y = model(x, t, labels)
        else:
            y = model(x, t, x_self_cond=x_self_cond.to(self.dtype, memory_format=memory))
        sample: Tensor = y if isinstance(y, Tensor) else y.sample  # what diffusers' models return has it there
        return sample

    def refresh(self) -> None:
        """Brings the copy, where there is one, up to date, in place."""
        if self._copy is not None:
            self._copy.load_state_dict(self._model.state_dict())

    def beats(
        self, plan: Callable[[], None], x: Tensor, labels: Tensor | None = None, x_self_cond: Tensor | None = None
    ) -> float | None:
        """The seconds of a call where it is faster than the plan, both run in turn; else None.

        On a GPU those that the device is busy: with neither would a captured step wait for the host.
        """
        t = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        on_gpu = x.device.type == "cuda"

        def seconds(run: Callable[[], object]) -> float:
            if on_gpu:
                return busy_seconds([run])[0]
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        def module() -> None:
            self(x, t, labels, x_self_cond)

        ours = min(seconds(plan), seconds(plan))
        try:
            if on_gpu:
                module()  # which loads kernels
            first = seconds(module)
        except RuntimeError:  # not every model runs in every dtype; lucidrains' Unet does in float32 alone
            return None
        if first > COMPARISONS * ours:  # a cold one, yet far behind
            return None
        theirs = seconds(module)
        for _ in range(COMPARISONS - 1):
            if theirs > CLEARLY * ours:
                break
            ours, theirs = min(ours, seconds(plan)), min(theirs, seconds(module))
        return theirs if theirs < ours else None


class Modules(dict[torch.dtype, Module]):
    """A `Module` per dtype, made when it is asked for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def __missing__(self, dtype: torch.dtype) -> Module:
        self[dtype] = Module(self._model, dtype)
        return self[dtype]

    def keep(self, wanted: set[Module]) -> None:
        """Frees the others' copies of the model."""
        for dtype in [dtype for dtype, module in self.items() if module not in wanted]:
            del self[dtype]
