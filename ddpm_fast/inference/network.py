"""A network as a plan sees it: a list of fused layers between named buffers, BatchNorm folded, nothing placed yet.

Buffers are named here and allocated by the executor once the batch and the image size are known. Memory is channels
last: buffer[n, y, x, c]. A `Slice` is a run of channels of a buffer, so that a skip connection is concatenated by
writing both halves where they belong. Weights are float32, whatever the plan computes in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

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


def whole(name: str, channels: int, level: int) -> Slice:
    """All of a buffer."""
    return Slice(Buffer(name, channels, level), 0, channels)


@dataclasses.dataclass(frozen=True, eq=False)
class Conv:
    """y = act(conv2d(x, weight, padding=1) + bias) + temb[n, c] + residual; 3x3; act: identity or SiLU.

    weight [out, in, 3, 3], bias [out]. source: where x lies, None for the image itself (float32 NCHW), which may also
    be convolved with [out, in, 7, 7] and padding 3. temb: the first of `out` columns of the time table, None for no
    time embedding. pooled: also gets the 2x2 maximum of y, only where there is no residual. A target shares no channel
    with what a layer reads, here as everywhere.
    resample: "up" convolves the image with every pixel doubled in both directions; "down" has stride 2 and, where
    `padding` is 0, pads at the far ends only.
    """

    name: str
    weight: Tensor
    bias: Tensor
    source: Slice | None
    target: Slice
    silu: bool = True
    temb: int | None = None
    pooled: Slice | None = None
    residual: Slice | None = None
    resample: Literal["none", "up", "down"] = "none"
    padding: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class Up:
    """y = conv_transpose2d(x, weight, bias, stride=2); 2x2 kernel: weight [in, out, 2, 2], bias [out]."""

    name: str
    weight: Tensor
    bias: Tensor
    source: Slice
    target: Slice


@dataclasses.dataclass(frozen=True, eq=False)
class Down:
    """y = conv2d(x, weight, bias, stride=2); 2x2 kernel: weight [out, in, 2, 2], bias [out]. Even H and W."""

    name: str
    weight: Tensor
    bias: Tensor
    source: Slice
    target: Slice


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """y = weight x + bias + residual at every pixel (a 1x1 convolution): weight [out, in], bias [out]."""

    name: str
    weight: Tensor
    bias: Tensor
    source: Slice
    target: Slice
    residual: Slice | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Norm:
    """y = act(GroupNorm(x) (1 + scale[n, c]) + shift[n, c]), with the norm's own weight [c] and bias [c].

    modulation: the first of 2c columns of the time table, [scale | shift]; None for neither.
    """

    name: str
    weight: Tensor
    bias: Tensor
    source: Slice
    target: Slice
    groups: int
    eps: float
    silu: bool = True
    modulation: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class RMSNorm:
    """y = act(x / max(|x|, eps) weight[c] (1 + scale[n, c]) + shift[n, c]) + residual, |x| over a pixel's channels.

    weight holds the factor sqrt(c), too. modulation: the first of 2c columns of the time table, [scale | shift]; None
    for neither.
    """

    name: str
    weight: Tensor
    source: Slice
    target: Slice
    eps: float
    silu: bool = True
    modulation: int | None = None
    residual: Slice | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Attention:
    """y = softmax(q k^T scale) v over the pixels of an image, `heads` times side by side.

    source: 3c channels [q | k | v], target: c, both cut into heads. memory: keys and values of further tokens,
    [2, heads, tokens, c / heads], the same for every image.
    """

    name: str
    source: Slice
    target: Slice
    heads: int
    scale: float
    memory: Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class LinearAttention:
    """y[p] = (sum_j K[j] v[j]^T)^T (scale softmax(q[p])), per head; K = softmax of k over all tokens j, per channel.

    The softmax of q runs over a head's channels. source: 3c channels [q | k | v], target: c, both cut into heads.
    memory: keys and values of further tokens, [2, heads, c / heads, tokens] (tokens last, as the module keeps them).
    """

    name: str
    source: Slice
    target: Slice
    heads: int
    scale: float
    memory: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Output:
    """m = conv2d(x, weight) + bias; 1x1 or 3x3 kernel (padding 1): weight [out, in, k, k]; m is float32 NCHW."""

    name: str
    weight: Tensor
    bias: Tensor
    source: Slice


Layer = Conv | Up | Down | Linear | Norm | RMSNorm | Attention | LinearAttention | Output


def tensors_of(layer: Layer) -> tuple[Tensor, ...]:
    """A layer's own weights."""
    match layer:
        case RMSNorm():
            return (layer.weight,)
        case Attention() | LinearAttention():
            return () if layer.memory is None else (layer.memory,)
        case _:
            return (layer.weight, layer.bias)


@dataclasses.dataclass(frozen=True, eq=False)
class TimeTable:
    """The time embedding of every block at once, all blocks side by side.

        e = features(t), or with an mlp (w1, b1, w2, b2): e = w2 mlp_act(w1 features(t) + b1) + b2
        temb = e @ weight.T + bias, or with an mlp: SiLU(e + labels[label]) @ weight.T + bias

    weight [columns, time_dim], bias [columns]. features: t (N,) -> float32 (N, features). feature_weights: the tensors
    that it computes with; where they are written anew in place, it computes with the new ones.
    labels: what a class adds, or None. Without an mlp [classes, columns], to temb (its embedding times the same
    weight); with one [classes, time_dim], to e. null_label: the class that an image without a label has; None where
    every image needs one.
    """

    weight: Tensor
    bias: Tensor
    features: Callable[[Tensor], Tensor]
    labels: Tensor | None = None
    null_label: int | None = None
    mlp: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    mlp_act: Literal["silu", "gelu"] = "silu"
    feature_weights: tuple[Tensor, ...] = ()

    @property
    def added_labels(self) -> Tensor | None:
        """[classes, columns], what is added to temb; None where there is no such table."""
        return None if self.mlp is not None else self.labels

    @property
    def joint(self) -> bool:
        """Whether temb is no sum of what t and what a label makes of it."""
        return self.mlp is not None and self.labels is not None

    @property
    def classes(self) -> int | None:
        """How many labels there are; None for an unconditional network."""
        return None if self.labels is None else len(self.labels)


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
    """Layers in the order in which they run, and what they need to know of time.

    divisor: H and W of an image must be multiples of it. self_condition: what is convolved first is [x0 of the step
    before, or zeros | x], side by side; in_channels counts both. Every tensor is float32, contiguous, on one device,
    and its own: nothing here shares memory with the module that it was read from.
    """

    layers: tuple[Layer, ...]
    in_channels: int
    divisor: int
    time: TimeTable
    self_condition: bool = False

    @property
    def image_channels(self) -> int:
        """Channels of x."""
        return self.in_channels // 2 if self.self_condition else self.in_channels

    @property
    def out_channels(self) -> int:
        """Channels of m; more than the image's where the network also predicts a variance."""
        last = self.layers[-1]
        assert isinstance(last, Output)
        return last.weight.shape[0]

    def tensors(self) -> list[Tensor]:
        """Every tensor, in an order that another reading of the same architecture repeats."""
        result = [tensor for layer in self.layers for tensor in tensors_of(layer)]
        result += [self.time.weight, self.time.bias, *(self.time.mlp or ()), *self.time.feature_weights]
        return result if self.time.labels is None else [*result, self.time.labels]

    def numbers(self) -> list[float]:
        """What a reading holds besides tensors that may change while the architecture stays: the norms' eps."""
        return [layer.eps for layer in self.layers if isinstance(layer, (Norm, RMSNorm))]
