"""3x3 convolutions whose weight gradient is made of matrix products, where PyTorch's own is slow on a CPU.

On images of few places with many channels, the deep levels of a U-Net, oneDNN takes the gradient of the weights ten
and more times as long as the convolution itself. As nine matrix products, one per tap, it costs what it should.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_PLACES, FEWEST_SAMPLES, FEWEST_WEIGHTS = 16, 4, 2**17
"""Measured (AVX512-BF16, 2 threads, batches 1 to 128): up to 4x4 places and from 256 x 512 channels on the products are
1.2 to 40 times as fast, in bfloat16 and in float32; beyond, oneDNN's own gradient is."""


def conv3x3(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """layer(x), with a gradient that is fast on a CPU; any layer that is no plain 3x3 convolution is simply called."""
    if not (x.device.type == "cpu" and torch.is_grad_enabled() and _is_small(x, layer) and _is_plain(layer)):
        y: Tensor = layer(x)
        return y
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    x = x.to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    small: Tensor = _Small.apply(x, layer.weight, bias)
    return small


def _is_small(x: Tensor, layer: nn.Conv2d) -> bool:
    if x.dim() != 4:
        return False
    n, channels, height, width = x.shape
    weights = channels * layer.out_channels
    return n >= FEWEST_SAMPLES and 0 < height * width <= MOST_PLACES and weights >= FEWEST_WEIGHTS


def _is_plain(layer: nn.Conv2d) -> bool:
    """Whether calling the layer is a 3x3 convolution with stride 1 and a border of zeros, and nothing else."""
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return (
        type(layer) is nn.Conv2d
        and geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
        and not any(hooks)
        and layer.weight.requires_grad
    )


class _Small(torch.autograd.Function):
    """The convolution of x (N, C, H, W) in x's dtype; the weights may have another one, and so does their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.weight_dtype, ctx.has_bias = weight.dtype, bias is not None
        return F.conv2d(x, cast, bias, padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (g,) = grads
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        g = g.contiguous(memory_format=torch.channels_last)
        g_x = None
        if need_x:
            g_x = torch.ops.aten.convolution_backward(
                g, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
            )[0]
        g_weight = weight_gradient(x, g, ctx.weight_dtype) if need_weight else None
        return g_x, g_weight, g.sum((0, 2, 3)) if need_bias and ctx.has_bias else None


def weight_gradient(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient (out, in, 3, 3) of the weights of a 3x3 convolution with a border of zeros, in channels_last.

    That of tap (i, j) is the product over all places p whose neighbour is inside: sum_p g[p] x[p + (i - 1, j - 1)]^T.

    Args:
        x: (N, in, H, W), the convolution's input.
        g: (N, out, H, W), the gradient of its output, in x's dtype.
        dtype: of the result.
    """
    height, width = x.shape[2:]
    places, gradients = x.permute(0, 2, 3, 1), g.permute(0, 2, 3, 1)
    allocate = x.new_empty if min(height, width) > 1 else x.new_zeros
    result = allocate((g.shape[1], 3, 3, x.shape[1]), dtype=dtype)
    for i in range(3):
        for j in range(3):
            if abs(i - 1) >= height or abs(j - 1) >= width:
                continue  # no neighbour there
            of_x = places[:, max(0, i - 1) : height + min(0, i - 1), max(0, j - 1) : width + min(0, j - 1)]
            of_g = gradients[:, max(0, 1 - i) : height + min(0, 1 - i), max(0, 1 - j) : width + min(0, 1 - j)]
            product = of_g.reshape(-1, g.shape[1]).t() @ of_x.reshape(-1, x.shape[1])
            result[:, i, j] = product
    return result.permute(0, 3, 1, 2)
