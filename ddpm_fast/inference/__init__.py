"""Fused inference plans: the same network, BatchNorm folded, one pass per layer, each by its fastest implementation.

`net = ddpm_fast.inference.compile(unet)` and then `net(x, t)`; or `ddpm_fast.Sampler(unet, schedule, fused=True)`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .compiled import DTYPES, Compiled
from .known import reader_of, unknown_reason

__all__ = ["DTYPES", "Compiled", "compile", "knows", "unknown_reason"]


def compile(
    model: nn.Module,
    *,
    dtype: torch.dtype | None = None,
    timesteps: Tensor | None = None,
    deterministic: bool = False,
    verbose: bool = False,
) -> Compiled:
    """A `Compiled` of a model that `knows` knows: called like the model, returns float32, without gradients.

    model: in eval mode, on the device where it is to run. It is not changed.
    dtype: of activations and weights: float32, bfloat16, float16; None for the model's own. Sums are float32. A CPU
        that does not multiply in the dtype (float16: none does here) computes in float32, which is no less exact.
    timesteps: [rows], real: the values of t that `at_rows` is to serve, their embeddings computed now.
    deterministic: no trial decides; a fixed rule chooses, so that a size gives the same bits each time on one machine.
    verbose: print every new plan, a line per layer.

    The first call for a batch and image size makes a plan: seconds of trial on a CPU, remembered in this process. A
    plan that the model itself outruns is not used. The last 8 are kept.

    Raises TypeError for a model that is not known (it lists what is), ValueError for one in training mode and for a
    dtype that plans do not compute in.
    """
    reader_of(model)  # says what is known, before anything else about the model
    if any(part.training for part in model.modules()):
        raise ValueError("the model is in training mode; a fused plan is of eval mode: call model.eval() first")
    return Compiled(model, dtype=dtype, timesteps=timesteps, deterministic=deterministic, verbose=verbose)


def knows(model: object) -> bool:
    """Whether a plan can be read from the model; `unknown_reason` says why not."""
    return unknown_reason(model) is None
