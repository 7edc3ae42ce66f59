"""The last layer and the reverse step in one pass, where an implementation has both and it pays."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..noise import make_rng
from .candidate import Bound, Frame, Place
from .network import Layer, Output
from .trial import timer_for

# step(x, table, t_of_row, row, rng, bad_row, x0_out), as ops.ddpm_step with the network's output as m
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], None]

# a, b, c1, c2, c3, c4, s, clip: every term but x0_prev's at work
EXAMPLE = [1.1, 0.4, 0.3, 0.6, -0.2, 0.0, 0.1, 1.5]
BOUND = 1e-4  # relative; the two may add up the products of the last layer in different orders
ROUNDS = 5


def gpu() -> Any:
    """`ddpm_fast.inference.gpu`, None without Triton."""
    return importlib.import_module("ddpm_fast.inference.gpu") if importlib.util.find_spec("triton") else None


def one_pass_step(layer: Layer, place: Place) -> Step | None:
    """What offers to do both at once here, unchecked."""
    kernels = gpu() if place.device.type == "cuda" else None
    if kernels is None or not isinstance(layer, Output):
        return None
    step: Step | None = kernels.output_step(layer, place)
    return step


def paying_step(layer: Layer, place: Place, separate: Bound, frame: Frame) -> Step | None:
    """One pass for layer and reverse step, if there is one here, it computes the same, and it is faster than two.

    separate: the layer alone. The layer's source holds what the layers before made of frame.x.
    """
    step = one_pass_step(layer, place)
    if step is None:
        return None
    device = place.device
    table = torch.tensor([EXAMPLE], device=device)
    t_of_row = torch.zeros(1, dtype=torch.int32, device=device)
    row = torch.zeros(1, dtype=torch.int64, device=device)
    bad_row = torch.full((1,), -1, dtype=torch.int32, device=device)
    rng = make_rng(0, 0, device)

    def two_passes(frame: Frame) -> None:
        separate(frame)
        ops.ddpm_step(frame.x, frame.out, table, t_of_row, row, rng, bad_row=bad_row)

    def one_pass(frame: Frame) -> None:
        step(frame.x, table, t_of_row, row, rng, bad_row, None)

    frames = [Frame(frame.x.clone(), frame.out, frame.time_table, frame.time_rows) for _ in range(2)]
    try:
        for run, own in zip((two_passes, one_pass), frames, strict=True):
            run(own)
        wrong = float((frames[1].x - frames[0].x).norm() / frames[0].x.norm())
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    if not wrong < BOUND:
        warnings.warn(
            f"fused plan: last layer and reverse step in one pass differ by {wrong:.2g} from one after the other, more "
            f"than {BOUND:.2g}; they run separately",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    timer = timer_for(device)
    seconds = [timer([two_passes, one_pass], frames[0]) for _ in range(ROUNDS)]
    return step if min(times[1] for times in seconds) < min(times[0] for times in seconds) else None
