"""The time of every implementation of every layer of a network, by the trial that plans are made with."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ddpm_fast.inference.candidate import Candidate, Packs, Place
from ddpm_fast.inference.known import read
from ddpm_fast.inference.library_parts import Library
from ddpm_fast.inference.native import Native
from ddpm_fast.inference.network import (
    Attention,
    Conv,
    Down,
    Layer,
    Linear,
    LinearAttention,
    Norm,
    Output,
    RMSNorm,
    Up,
    tensors_of,
)
from ddpm_fast.inference.plan import frame_for, listed, places, signature
from ddpm_fast.inference.planner import stored_dtype
from ddpm_fast.inference.trial import fastest, timer_for

from .clock import setting

REPEATS = 2
"""Trials of a network: what differs by less than the same implementation does between them is noise."""

SPLITS = (1, 2, 4, 8, 16, 32)
WARPS = (4, 8, 16)
OF_THREAD = (4, 32)  # elements of an RMSNorm; with more it would compile for minutes and spill

BENCHMARK = "cudnn.benchmark"
"""The group of the library's convolutions with the algorithm that a trial of cuDNN's finds, not its heuristic. No plan
asks for it, so it stands beside the others and is never the fastest of all."""

Listed = Callable[[Layer, Place], list[Candidate]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer. flop: of its products, a multiply-add is two; bytes: read and written once, weights included. times:
    per implementation the microseconds of each trial; groups: "library", "triton", "native" or BENCHMARK. left_out:
    listed, and said that they cannot serve or computed something else. like: the layer that it was timed as one with.
    """

    layer: str
    kind: str
    pixels: tuple[int, int]
    flop: float
    bytes: float
    times: dict[str, list[float]]
    groups: dict[str, str]
    left_out: list[str]
    like: str

    def best(self, group: str | None = None) -> tuple[str, float] | None:
        """The fastest one, of a group or of all that a plan lists, and its microseconds; None where there is none."""

        def counts(name: str) -> bool:
            own = self.groups[name]
            return own == group if group else own != BENCHMARK

        found = [(min(us), name) for name, us in self.times.items() if counts(name)]
        return (min(found)[1], min(found)[0]) if found else None

    @property
    def spread(self) -> float:
        """How far apart the trials of the fastest one are, relative to it."""
        fastest_one = self.best()
        assert fastest_one is not None
        times = self.times[fastest_one[0]]
        return max(times) / min(times) - 1


def flop(layer: Layer, place: Place) -> float:
    """Of its products, for all images of the place; taps that meet padding count."""
    pixels = place.n * place.h * place.w
    match layer:
        case Norm() | RMSNorm():
            return 0.0
        case Attention():
            tokens = place.h * place.w + (0 if layer.memory is None else layer.memory.shape[-2])
            return 4.0 * pixels * tokens * layer.target.channels
        case LinearAttention():
            tokens = place.h * place.w + layer.memory.shape[-1]
            return 2.0 * place.n * (tokens + place.h * place.w) * layer.target.channels**2 / layer.heads
        case Conv():
            assert place.target is not None
            return 2.0 * place.target[..., 0].numel() * layer.weight.numel()
        case Up():
            return 2.0 * pixels * layer.weight.numel()
        case Down():
            return 2.0 * pixels / 4 * layer.weight.numel()
        case Linear() | Output():
            return 2.0 * pixels * layer.weight.numel()


def moved(layer: Layer, place: Place) -> float:
    """Bytes that must be read and written once: activations, weights in the activations' dtype."""
    size = torch.empty((), dtype=place.dtype).element_size()
    views = [view for view in (place.source, place.target, place.pooled, place.residual) if view is not None]
    total = float(sum(view.numel() for view in views) * size)
    image = 4.0 * place.n * place.h * place.w
    if place.source is None and isinstance(layer, Conv):
        total += image * layer.weight.shape[1]
    if place.target is None and isinstance(layer, Output):
        total += image * layer.weight.shape[0]
    return total + sum(tensor.numel() for tensor in tensors_of(layer)) * size


def group_of(candidate: Candidate) -> str:
    """Whose implementation it is: a library's (cuDNN, cuBLAS, oneDNN) with our pointwise op, its convolution with all
    that follows in one pass, Triton's, C++."""
    if isinstance(candidate, Library) or candidate.name.startswith("conv2d"):
        return "library"
    if candidate.name.startswith("conv2d, then"):  # its class cannot be imported without Triton
        return "library, one pass"
    return "native" if isinstance(candidate, Native) else "triton"


def of_library(layer: Layer, place: Place) -> list[Candidate]:
    """The library's of what a plan lists."""
    return [one for one in listed(layer, place) if group_of(one) == "library"]


def _of_triton(found: list[Candidate]) -> list[Candidate]:
    return [one for one in found if group_of(one) == "triton"]


def all_splits(layer: Layer, place: Place) -> list[Candidate]:
    """What a plan lists, and every listed tile with its sum cut into any number of parts, added either way."""
    found = listed(layer, place)
    names = {candidate.name for candidate in found}
    for one in list(found):
        tile, kind = getattr(one, "tile", None), getattr(one, "kind", "")
        if tile is None or kind == "first":
            continue
        from ddpm_fast.backends.triton.conv_call import TAPS
        from ddpm_fast.inference.gpu_tiles import JOINED

        assert isinstance(layer, (Conv, Up, Linear))
        channels = layer.weight.shape[not isinstance(layer, Up)]
        for splits, joined in itertools.product(SPLITS, (False, True)):
            if joined and tile.m * tile.n > JOINED:
                continue
            split = dataclasses.replace(tile, splits=splits, joined=joined)
            other = dataclasses.replace(one, tile=split)  # type: ignore[type-var]
            if TAPS.get(kind, 1) * channels // tile.k >= 2 * splits and other.name not in names:
                names.add(other.name)
                found.append(other)
    return found


def all_blocks(layer: Layer, place: Place) -> list[Candidate]:
    """What a plan lists, and the norms with every block of channels or pixels and every number of warps."""
    found = listed(layer, place)
    if not isinstance(layer, (Norm, RMSNorm)) or not any(group_of(one) == "triton" for one in found):
        return found
    from ddpm_fast.backends.triton.norm import MAX_SPAN
    from ddpm_fast.inference.gpu_layers import TritonNorm, TritonRMSNorm

    channels, more = layer.source.channels, list[Candidate]()
    if isinstance(layer, Norm):
        width = channels // layer.groups
        spans = [span for span in range(width, min(channels, MAX_SPAN) + 1, width) if channels % span == 0]
        more = [TritonNorm(span, warps) for span in spans for warps in WARPS]
    else:
        width = 1 << (channels - 1).bit_length()
        fitting = [(2**i, warps) for i in range(10) for warps in WARPS if 2**i <= place.h * place.w]
        more = [
            TritonRMSNorm(pixels, warps)
            for pixels, warps in fitting
            if OF_THREAD[0] <= pixels * width // (32 * warps) <= OF_THREAD[1]
        ]
    names = {one.name for one in found}
    return [*found, *(one for one in more if one.name not in names)]


def timed(
    model: torch.nn.Module, n: int, h: int, w: int, dtype: torch.dtype, which: Listed = listed
) -> tuple[list[Row], list[str]]:
    """The layers of a model (float32, eval mode, on its device) for n images of h x w; and what computed them wrongly,
    in the check's own words. Whatever takes part was checked against float32 first, as for a plan."""
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        network = read(model)
        device = network.time.weight.device
        packs = Packs()
        spots = places(network, n, h, w, stored_dtype(dtype, device), device, packs)
        frame = frame_for(network, n, h, w, device)
        marks = [signature(layer, place) for layer, place in zip(network.layers, spots, strict=True)]
        if device.type == "cuda" and any(group_of(one) == "triton" for one in which(network.layers[0], spots[0])):
            from ddpm_fast.inference.gpu import compile_ahead

            compile_ahead(network.layers, spots, frame, lambda *at: _of_triton(which(*at)), marks)
        trials = [fastest(network.layers, spots, frame, which, marks) for _ in range(REPEATS)]
        with setting(torch.backends.cudnn, "benchmark", True):
            sought = fastest(network.layers, spots, frame, of_library, marks)
    first: dict[Any, str] = {}
    rows = []
    for i, (layer, place, mark) in enumerate(zip(network.layers, spots, marks, strict=True)):
        times: dict[str, list[float]] = {}
        for trial in trials:
            for name, us in trial[i].times:
                if us is not None:
                    times.setdefault(name, []).append(us)
        for name, us in sought[i].times:
            if us is not None and isinstance(layer, (Conv, Up, Down, Output)):
                times[f"{name}, {BENCHMARK}"] = [us]
        candidates = {one.name: group_of(one) for one in which(layer, place)}
        rows.append(
            Row(
                layer.name,
                type(layer).__name__,
                (place.h, place.w),
                flop(layer, place),
                moved(layer, place),
                times,
                {name: candidates.get(name, BENCHMARK) for name in times},
                sorted(candidates.keys() - times.keys()),
                first.setdefault(mark, layer.name),
            )
        )
    return rows, sorted({str(one.message) for one in warned if "computes layer" in str(one.message)})


def sums(rows: list[Row]) -> dict[str, dict[str, float]]:
    """Microseconds of all layers with the fastest of each, and with one group's where it has any: {"us", "without"},
    without: layers that the group does not serve, for which the fastest of all stands."""
    groups = sorted({group for row in rows for group in row.groups.values()})
    result = {}
    for group in (None, *groups):
        found = [(row.best(group), row.best()) for row in rows]
        us = sum((own or best)[1] for own, best in found if best is not None)
        result[group or "best of all"] = {"us": us, "without": float(sum(own is None for own, _ in found))}
    return result


def between_events(device: torch.device) -> float:
    """Microseconds that the trial's timing shows for a layer that does nothing: part of every figure of it."""
    nothing = [lambda frame: None] * 50
    frame: Any = None
    return min(sum(timer_for(device)(nothing, frame)) / len(nothing) for _ in range(5)) * 1e6
