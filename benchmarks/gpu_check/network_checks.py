"""Small networks of each kind through the Triton layers of fused plans, against the model in float64."""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import torch
from torch import nn

from ddpm_fast import inference
from ddpm_fast.inference import gpu, gpu_layers, library
from ddpm_fast.inference.candidate import Packs
from ddpm_fast.inference.check import BOUNDS, error, exact
from ddpm_fast.inference.known import read
from ddpm_fast.inference.plan import frame_for, places
from gpu_check import op_cases  # noqa: F401  (puts tests/ on the path)
from gpu_check.op_checks import Result

from plan_networks import ddpm_unet, rms_unet, unet  # isort: skip

NETWORKS: dict[str, tuple[Any, dict[str, Any], int, int]] = {
    # name: how it is made, with what, side of an image, images
    "UNet": (unet, {"num_classes": 3, "width": 32}, 16, 5),
    "UNet down to 1x1": (unet, {}, 4, 17),
    "DDPMUNet": (ddpm_unet, {"resnet_time_scale_shift": "scale_shift", "block_out_channels": (32, 64)}, 16, 3),
    "RMSNormUNet": (rms_unet, {"dim": 32}, 16, 3),
}
SMALL: dict[str, tuple[Any, dict[str, Any], int, int]] = {
    "UNet": (unet, {"num_classes": 3}, 8, 1),
    "UNet down to 1x1": (unet, {}, 4, 2),
    "DDPMUNet": (ddpm_unet, {}, 4, 1),
    "RMSNormUNet": (rms_unet, {"dim_mults": (1,)}, 4, 1),
}
INTERPRETED = (4, 90)
"""Multiprocessors and capability that programs are cut for in the interpreter: few and large ones."""


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the norms."""
    value = float((got.double().cpu() - expected.cpu()).norm() / expected.norm())
    return min(value, 1e12) if value == value else 1e12  # JSON has no infinity


class Network:
    """A network on a device, images for it, and what the model makes of them in float64."""

    def __init__(self, name: str, device: torch.device, small: bool) -> None:
        make, options, self.side, self.n = (SMALL if small else NETWORKS)[name]
        self.model: nn.Module = make(**options).to(device)
        self.read = read(self.model)
        self.frame = frame_for(self.read, self.n, self.side, self.side, device)
        self.t = torch.linspace(0, 999, self.n, device=device).round()
        self.labels = () if self.frame.label_rows is None else (self.frame.label_rows,)
        self.exact = copy.deepcopy(self.model).double()(self.frame.x.double(), self.t, *self.labels)

    def compare(self, what: str, got: torch.Tensor, dtype: torch.dtype, result: Result) -> None:
        wrong = distance(got, self.exact)
        result.cases += 1
        result.error = max(result.error, wrong)
        if not wrong < 3 * BOUNDS[dtype]:
            result.failures.append(f"{what}: relative error {wrong:.2g}, bound {3 * BOUNDS[dtype]:.2g}")


@torch.no_grad()
def check_layers(name: str, dtype: torch.dtype, device: torch.device, small: bool = False) -> Result:
    """Each layer alone by our first candidate (the library's where we have none), then all of them in a row."""
    result, began = Result(), time.perf_counter()
    it = Network(name, device, small)
    spots = places(it.read, it.n, it.side, it.side, dtype, device, Packs())
    numbers = gpu.processors(device) if device.type == "cuda" else INTERPRETED
    images, ours = torch.arange(it.n, device=device), 0
    for layer, place in zip(it.read.layers, spots, strict=True):
        listed = gpu_layers.listed(layer, it.n, place.h, place.w, dtype, *numbers)
        ours += bool(listed)
        candidate = (listed or library.candidates(layer, it.n, place.h, place.w, dtype, device))[0]
        expected = exact(layer, place, it.frame, images)
        wrong = error(layer, place, it.frame, candidate.prepare(layer, place), expected, images)
        result.cases += 1
        if not wrong < BOUNDS[dtype]:
            result.failures.append(
                f"{name} {dtype}: layer {layer.name} by {candidate.name}: relative error {wrong:.2g}, "
                f"bound {BOUNDS[dtype]:.2g}"
            )
    if not ours:
        result.failures.append(f"{name} {dtype}: no layer is served by our kernels")
    it.compare(f"{name} {dtype}: the layers in a row", it.frame.out, dtype, result)
    result.seconds = time.perf_counter() - began
    return result


@torch.no_grad()
def check_plan(name: str, dtype: torch.dtype, device: torch.device, small: bool = False) -> Result:
    """The plan that `inference.compile` makes, all candidates tried. One that computes something else is a failure,
    though the trial, which warns of it, then leaves it out."""
    result, began = Result(), time.perf_counter()
    it = Network(name, device, small)
    plan = inference.compile(it.model, dtype=dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        it.compare(f"{name} {dtype}: the plan", plan(it.frame.x, it.t, *it.labels), dtype, result)
    result.failures += [f"{name} {dtype}: {w.message}" for w in caught if issubclass(w.category, RuntimeWarning)]
    result.seconds = time.perf_counter() - began
    return result
