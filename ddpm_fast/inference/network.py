"""A network as a plan sees it: a list of fused layers between named buffers, BatchNorm folded, nothing placed yet.

Buffers are named here and allocated by the executor once the batch and the image size are known. Memory is channels
last: buffer[n, y, x, c]. A `Slice` is a run of channels of a buffer, so that a skip connection is concatenated by
writing both halves where they belong. Weights are float32, whatever the plan computes in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Buffer:
    """Activations of (H >> level, W >> level) pixels."""

    name: str
    channels: int
    level: int


@dataclasses.dataclass(frozen=True)
class Slice:
    """Channels first .. first + channels of a buffer."""

    buffer: Buffer
    first: int
    channels: int


@dataclasses.dataclass(frozen=True, eq=False)
class Conv:
    """y = act(conv2d(x, weight, padding=1) + bias) + temb[n, c]; 3x3, stride 1; act: identity or SiLU.

    weight [out, in, 3, 3], bias [out]. source: where x lies, None for the image itself (float32 NCHW). temb: the first
    of `out` columns of the time table, None for no time embedding. pooled: also gets the 2x2 maximum of y.
    """

    name: str
    weight: Tensor
    bias: Tensor
    source: Slice | None
    target: Slice
    silu: bool = True
    temb: int | None = None
    pooled: Slice | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Up:
    """y = conv_transpose2d(x, weight, bias, stride=2); 2x2 kernel: weight [in, out, 2, 2], bias [out]."""

    name: str
    weight: Tensor
    bias: Tensor
    source: Slice
    target: Slice


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """m = conv2d(x, weight) + bias; 1x1 kernel: weight [out, in, 1, 1]; m is float32 (N, out, H, W), contiguous."""

    name: str
    weight: Tensor
    bias: Tensor
    source: Slice


Layer = Conv | Up | Output


@dataclasses.dataclass(frozen=True, eq=False)
class TimeTable:
    """The time embedding of every block at once, all blocks side by side: temb = features(t) @ weight.T + bias.

    weight [columns, time_dim], bias [columns]; labels [classes, columns], what a class adds (its embedding times the
    same weight), or None. null_label: the class that an image without a label has. features: t (N,) -> float32
    (N, time_dim), without parameters.
    """

    weight: Tensor
    bias: Tensor
    features: Callable[[Tensor], Tensor]
    labels: Tensor | None = None
    null_label: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Layers in the order in which they run, and what they need to know of time.

    divisor: H and W of an image must be multiples of it. Every tensor is float32, contiguous, on one device, and its
    own: nothing here shares memory with the module that it was read from.
    """

    layers: tuple[Layer, ...]
    in_channels: int
    divisor: int
    time: TimeTable

    def tensors(self) -> list[Tensor]:
        """Every tensor, in an order that another reading of the same architecture repeats."""
        result = [tensor for layer in self.layers for tensor in (layer.weight, layer.bias)]
        result += [self.time.weight, self.time.bias]
        return result if self.time.labels is None else [*result, self.time.labels]
