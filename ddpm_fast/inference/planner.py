"""Makes plans: places the layers, chooses an implementation of each, and remembers what was measured."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from . import native
from .candidate import Bound, Candidate, Frame, Packs, Place
from .check import serving, tf32_allowed
from .ending import gpu, paying_step
from .library import onednn_works
from .module import Module, Modules
from .network import Layer, Network
from .plan import Plan, frame_for, listed, places, signature
from .trial import Ranking, fastest

KEPT_MEASUREMENTS = 64
# On a CPU a larger batch takes the choices of one with so many pixels: layers scale, and its trial would take minutes.
TRIED_PIXELS = 64 * 32 * 32

# What was measured in this process, by all that it depends on: rankings per layer, and the dtype in which the module
# itself won, if it did.
_measured: OrderedDict[tuple[Any, ...], tuple[list[Ranking], torch.dtype | None]] = OrderedDict()


def forget_measurements() -> None:
    """Measures anew from now on."""
    _measured.clear()


def stored_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """What activations are stored in: the dtype asked for, or float32 where a CPU has no fast way with it."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    fast = bool(native.isas(dtype)) if native.available() else onednn_works(dtype)
    return dtype if fast else torch.float32


def make(
    network: Network, n: int, h: int, w: int, dtype: torch.dtype, packs: Packs, modules: Modules, deterministic: bool
) -> Plan:
    """A plan for n images of h x w pixels in about `dtype` (see `stored_dtype`).

    modules: the model as it is, by dtype; where one of them is faster, the plan says so and is not to be used.
    deterministic: the first implementation that computes the right thing, in the fixed order of `listed`; no times.
    """
    device = network.time.weight.device
    stored = stored_dtype(dtype, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"no plan for {n} images of {h} x {w} yet; run once before capturing a CUDA graph")
    spots = places(network, n, h, w, stored, device, packs)
    frame = frame_for(network, n, h, w, device)
    marks = tuple(signature(layer, place) for layer, place in zip(network.layers, spots, strict=True))
    around = (torch.get_num_threads(), tuple(native.isas()), tf32_allowed())
    key = (marks, stored, dtype, str(device), *around)
    known = None if deterministic else _measured.get(key)
    tried = min(n, max(1, TRIED_PIXELS // (h * w))) if device.type == "cpu" else n
    kernels = gpu() if known is None and device.type == "cuda" else None
    if kernels is not None:
        most = 1 if deterministic else None

        def ours(layer: Layer, place: Place) -> list[Candidate]:
            found: list[Candidate] = kernels.candidates(layer, n, place.h, place.w, stored, device)
            return found[:most]

        kernels.compile_ahead(network.layers, spots, frame, ours, marks)
    if deterministic:
        choices = _first(network, spots, frame)
    elif known is None and n > tried:
        choices = make(network, tried, h, w, dtype, packs, modules, deterministic).choices
    elif known is None:
        choices = fastest(network.layers, spots, frame, listed, marks)
    else:
        choices = known[0]
    with packs.recording() as uses:  # bound once more, for what the chosen ones need and nothing else
        bounds = _bound(network, spots, choices)
    plan = Plan(network, n, h, w, stored, bounds, choices, set(uses))
    if device.type == "cpu":
        plan.tried = tried
    if known is not None:
        plan.module = None if known[1] is None else modules[known[1]]
    elif not deterministic:
        plan.module = _faster(plan, frame, [modules[kind] for kind in {dtype: None, stored: None}])
        _measured[key] = (choices, None if plan.module is None else plan.module.dtype)
        while len(_measured) > KEPT_MEASUREMENTS:
            _measured.popitem(last=False)
    one_image = not network.self_condition and network.out_channels == network.in_channels
    if plan.module is None and not deterministic and one_image:
        plan.run(frame.x, frame.out, frame.time_table, frame.time_rows)
        plan.step = paying_step(network.layers[-1], spots[-1], bounds[-1], frame)
    return plan


def _faster(plan: Plan, frame: Frame, modules: list[Module]) -> Module | None:
    """The model itself, in the dtype asked for or in the one that the plan stores, where that is the fastest of all."""
    out = torch.zeros_like(frame.out)

    def run() -> None:
        plan.run(frame.x, out, plan.own_table, plan.own_rows)

    x, condition = frame.x, None
    if plan.network.self_condition:
        condition, x = x.chunk(2, dim=1)
    seconds = [(module.beats(run, x, plan.label_rows, condition), module) for module in modules]
    faster = [(taken, module) for taken, module in seconds if taken is not None]
    return min(faster, key=lambda one: one[0])[1] if faster else None


def _first(network: Network, spots: list[Place], frame: Frame) -> list[Ranking]:
    choices = []
    for layer, place in zip(network.layers, spots, strict=True):
        (one,) = serving(layer, place, frame, listed(layer, place), wanted=1)
        choices.append(Ranking(layer.name, [(one[0].name, None)]))
    return choices


def _bound(network: Network, spots: list[Place], choices: list[Ranking]) -> list[Bound]:
    """The chosen candidates, by their names, bound to these places."""

    def bind(layer: Layer, place: Place, name: str) -> Bound:
        (one,) = (candidate for candidate in listed(layer, place) if candidate.name == name)
        return one.prepare(layer, place)

    return [
        bind(layer, place, ranking.chosen) for layer, place, ranking in zip(network.layers, spots, choices, strict=True)
    ]
