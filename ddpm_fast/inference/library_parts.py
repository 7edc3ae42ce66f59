"""What every implementation out of PyTorch's operators needs: views as operators want them, weights in a dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from .candidate import Bound, Frame, Place
from .network import Conv, Down, Layer, Linear, Output, Up

Weighted = Conv | Up | Down | Linear | Output


@dataclasses.dataclass(frozen=True)
class Library:
    """One way to run layers of one kind."""

    name: str
    bind: Callable[[Layer, Place], Bound]

    def prepare(self, layer: Layer, place: Place) -> Bound:
        return self.bind(layer, place)


def nchw(view: Tensor) -> Tensor:
    """A view [n, h, w, c] as operators take it: (n, c, h, w), channels last."""
    return view.permute(0, 3, 1, 2)


def source_of(layer: Layer, place: Place) -> Callable[[Frame], Tensor]:
    """frame -> what the layer reads, (n, c, h, w) in the plan's dtype, channels last."""
    if place.source is None:
        dtype = place.dtype
        return lambda frame: frame.x.to(dtype, memory_format=torch.channels_last)
    source = nchw(place.source)
    return lambda frame: source


def packed(layer: Weighted, place: Place, key: str, form: Callable[[Tensor], Tensor]) -> Tensor:
    """form(weight) in the plan's dtype, kept. What is kept holds on to the layer and not to the place, which goes."""
    dtype = place.dtype
    return place.packs.get(layer, (key, dtype), lambda: form(layer.weight).to(dtype, copy=True))


def weight_of(layer: Weighted, place: Place) -> Tensor:
    """The weight in the plan's dtype, channels last, kept."""
    return packed(layer, place, "weight", lambda w: w.contiguous(memory_format=torch.channels_last))


def bias_of(layer: Weighted, place: Place) -> Tensor:
    """The bias in the plan's dtype, kept."""
    dtype = place.dtype
    return place.packs.get(layer, ("bias", dtype), lambda: layer.bias.to(dtype, copy=True))
