"""Norms and attention out of PyTorch's operators, and our ops of the norms' names; see library.py."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .candidate import Bound, Frame, Place
from .library_parts import nchw, source_of
from .network import Attention, Layer, LinearAttention, Norm, RMSNorm


def norm(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Norm)
    assert place.target is not None
    part, source, target = layer, source_of(layer, place), nchw(place.target)
    act: Literal["silu"] | None = "silu" if layer.silu else None

    def run(frame: Frame) -> None:
        scale = shift = None
        if part.modulation is not None:
            scale, shift = frame.temb(part.modulation, 2 * len(part.weight)).chunk(2, dim=1)
        target.copy_(
            ops.group_norm_silu(
                source(frame), part.groups, part.weight, part.bias, scale=scale, shift=shift, eps=part.eps, act=act
            )
        )

    return run


def rms_norm(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, RMSNorm)
    assert place.target is not None
    part, source, target = layer, source_of(layer, place), nchw(place.target)
    residual = None if place.residual is None else nchw(place.residual)
    weight = place.packs.get(layer, "without sqrt(c)", lambda: layer.weight / len(layer.weight) ** 0.5)
    act: Literal["silu"] | None = "silu" if layer.silu else None

    def run(frame: Frame) -> None:
        scale = shift = None
        if part.modulation is not None:
            scale, shift = frame.temb(part.modulation, 2 * len(weight)).chunk(2, dim=1)
        y = ops.rms_norm_silu(source(frame), weight, scale=scale, shift=shift, residual=residual, eps=part.eps, act=act)
        target.copy_(y)

    return run


def attention(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Attention)
    heads, scale, target = layer.heads, layer.scale, place.target
    assert target is not None
    n, h, w, c = target.shape
    memory = None if layer.memory is None else _memory(layer, layer.memory, place)

    def run(frame: Frame) -> None:
        q, k, v = _heads(place, heads)
        if memory is not None:
            k, v = _with(memory, k, v)
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
        target.copy_(y.transpose(1, 2).reshape(n, h, w, c))

    return run


def linear_attention(layer: Layer, place: Place) -> Bound:
    """The softmax of k is divided by its sum before products are rounded, so that nothing grows with the image."""
    assert isinstance(layer, LinearAttention)
    heads, scale, target = layer.heads, layer.scale, place.target
    assert target is not None
    n, h, w, c = target.shape
    memory = _memory(layer, layer.memory, place)

    def run(frame: Frame) -> None:
        q, k, v = _heads(place, heads)
        k, v = _with(memory, k, v)
        context = k.softmax(dim=2).transpose(2, 3) @ v
        y = q.softmax(dim=3) @ (context * scale)
        target.copy_(y.transpose(1, 2).reshape(n, h, w, c))

    return run


def _heads(place: Place, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of a layer's source, each [n, heads, pixels, c / heads]."""
    assert place.source is not None
    parts = place.source.reshape(place.n, place.h * place.w, 3, heads, -1).permute(2, 0, 3, 1, 4)
    return parts[0], parts[1], parts[2]


def _memory(layer: Attention | LinearAttention, memory: Tensor, place: Place) -> Tensor:
    """Keys and values of the further tokens in the plan's dtype, [2, heads, tokens, c / heads], kept."""
    dtype, last = place.dtype, isinstance(layer, LinearAttention)
    return place.packs.get(layer, ("memory", dtype), lambda: (memory.mT if last else memory).to(dtype, copy=True))


def _with(memory: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Those tokens, the same for every image, before its own."""
    keys, values = memory[:, None].expand(-1, k.shape[0], -1, -1, -1)
    return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
