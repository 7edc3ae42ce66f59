"""BatchNorm folded into the convolution before it: in eval mode both are affine, so one convolution does for two."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class UnreadableError(TypeError):
    """A module that a plan cannot be read from; says what about it."""


def plain(tensor: Tensor) -> Tensor:
    """A float32, contiguous copy of a weight."""
    return tensor.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def conv_bn(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """weight [out, in, kh, kw] and bias [out], float32, of norm(conv(x)) with the running statistics.

    With s = gamma / sqrt(var + eps): w' = s w, b' = s (b - mean) + beta, computed in float64 and rounded once.
    """
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    scale = torch.rsqrt(var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    bias = -mean.double() if conv.bias is None else conv.bias.detach().double() - mean.double()
    bias = bias * scale
    if norm.bias is not None:
        bias = bias + norm.bias.detach().double()
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    return plain(weight), plain(bias)
