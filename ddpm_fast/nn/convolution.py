"""Convolutions of a U-Net in training on a CPU, as matrix products where PyTorch's own are slow.

On images of few places with many channels, and transposed, oneDNN takes the gradient of the weights ten and more times
as long as the convolution itself. As matrix products it costs what it should. Each function calls the layer wherever
it is not a plain one, or oneDNN was measured to be as fast (AVX512-BF16, 2 threads, batches 1 to 128).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST_PLACES, FEWEST_SAMPLES, FEWEST_WEIGHTS = 16, 4, 2**17
"""Up to 4x4 places and from 256 x 512 channels on, products are 1.2 to 40 times as fast, in float32 too."""

MOST_DENSE_PLACES = 4
"""Up to so many places, in 16 bits, the whole convolution is one product with a matrix from all places to all."""

MOST_COLUMN_CHANNELS = 4
"""An image's first layer, in 16 bits: up to so many channels the places' neighbourhoods are laid out as rows."""

FEWEST_TRANSPOSED = 2**13
"""Input times output channels of a transposed convolution in 16 bits, 4 to 18 times as fast."""

Half = (torch.bfloat16, torch.float16)


def conv3x3(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """layer(x), x (N, C, H, W), with a gradient that is fast on a CPU."""
    if _trains_on_cpu(x, layer) and _is_plain(layer, nn.Conv2d, 3, 1, 1):
        dtype = _compute_dtype(x)
        kind = _kind(x, layer, dtype)
        if kind != "onednn":
            y: Tensor = _Conv3x3.apply(x.to(dtype), layer.weight, _cast(layer.bias, dtype), kind)
            return y
    y = layer(x)
    return y


def conv_transpose2x2(x: Tensor, layer: nn.ConvTranspose2d) -> Tensor:
    """layer(x), x (N, C, H, W) -> (N, C', 2 H, 2 W), with a gradient that is fast on a CPU."""
    if _trains_on_cpu(x, layer) and _is_plain(layer, nn.ConvTranspose2d, 2, 2, 0):
        dtype = _compute_dtype(x)
        if dtype in Half and layer.in_channels * layer.out_channels >= FEWEST_TRANSPOSED:
            y: Tensor = _ConvTranspose2x2.apply(x.to(dtype), layer.weight, _cast(layer.bias, dtype))
            return y
    y = layer(x)
    return y


def _trains_on_cpu(x: Tensor, layer: nn.Module) -> bool:
    return x.device.type == "cpu" and x.dim() == 4 and x.numel() > 0 and torch.is_grad_enabled()


def _is_plain(layer: Any, of: type[nn.Module], kernel: int, stride: int, padding: int) -> bool:
    """Whether calling the layer is the convolution with this geometry, of trained weights, and nothing else."""
    geometry = (layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode)
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return bool(
        type(layer) is of
        and geometry == ((kernel,) * 2, (stride,) * 2, (padding,) * 2, (1, 1), 1, "zeros")
        and getattr(layer, "output_padding", (0, 0)) == (0, 0)
        and not any(hooks)
        and layer.weight.requires_grad
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _kind(x: Tensor, layer: nn.Conv2d, dtype: torch.dtype) -> str:
    """How a 3x3 convolution is done: "dense", "products" or "columns", or "onednn"."""
    n, channels, height, width = x.shape
    if n < FEWEST_SAMPLES:
        return "onednn"
    if channels * layer.out_channels >= FEWEST_WEIGHTS and height * width <= MOST_PLACES:
        return "dense" if dtype in Half and height * width <= MOST_DENSE_PLACES else "products"
    return "columns" if dtype in Half and channels <= MOST_COLUMN_CHANNELS and not x.requires_grad else "onednn"


def _rows(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N H W, C)"""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


class _Conv3x3(torch.autograd.Function):
    """The convolution in x's dtype; the weights may have another one, and so does their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
        ctx.kind, ctx.weight_dtype, ctx.has_bias = kind, weight.dtype, bias is not None
        used = weight.to(x.dtype)
        if kind != "dense":
            ctx.save_for_backward(x, used)
            return F.conv2d(x, used, bias, padding=1)
        n, _, height, width = x.shape
        used = dense_matrix(used, height, width)
        ctx.save_for_backward(x, used)
        places = _rows(x).view(n, -1)
        y = F.linear(places, used, None if bias is None else bias.repeat(height * width))
        return y.view(n, height, width, -1).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, used = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        g = grads[0].contiguous(memory_format=torch.channels_last)
        g_x = None
        if need_x and ctx.kind == "dense":
            n, channels, height, width = x.shape
            g_x = (_rows(g).view(n, -1) @ used).view(n, height, width, channels).permute(0, 3, 1, 2)
        elif need_x:
            g_x = torch.ops.aten.convolution_backward(
                g, x, used, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
            )[0]
        g_weight = None
        if need_weight:
            of_weight = weight_gradient_by_columns if ctx.kind == "columns" else weight_gradient
            g_weight = of_weight(x, g, ctx.weight_dtype)
        return g_x, g_weight, g.sum((0, 2, 3)) if need_bias and ctx.has_bias else None, None


def dense_matrix(weight: Tensor, height: int, width: int) -> Tensor:
    """The matrix (places' out channels, places' in channels) of the 3x3 convolution of images of up to 2x2 places."""
    out, channels = weight.shape[:2]
    taps = weight.permute(0, 2, 3, 1)
    places = [(i, j) for i in range(height) for j in range(width)]
    result = weight.new_zeros((len(places), out, len(places), channels))
    for p, (i, j) in enumerate(places):
        for q, (k, m) in enumerate(places):
            if abs(k - i) <= 1 and abs(m - j) <= 1:
                result[p, :, q] = taps[:, k - i + 1, m - j + 1]
    return result.view(len(places) * out, len(places) * channels)


def weight_gradient(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient (out, in, 3, 3) of the weights of a 3x3 convolution with a border of zeros, in channels_last.

    That of tap (i, j) is the product over all places p whose neighbour is inside: sum_p g[p] x[p + (i - 1, j - 1)]^T.

    Args:
        x: (N, in, H, W), the convolution's input.
        g: (N, out, H, W), the gradient of its output, in x's dtype.
        dtype: of the result.
    """
    height, width = x.shape[2:]
    allocate = x.new_empty if min(height, width) > 1 else x.new_zeros
    result = allocate((g.shape[1], 3, 3, x.shape[1]), dtype=dtype)
    for i in range(3):
        for j in range(3):
            if abs(i - 1) >= height or abs(j - 1) >= width:
                continue  # no neighbour there
            of_x = x[:, :, max(0, i - 1) : height + min(0, i - 1), max(0, j - 1) : width + min(0, j - 1)]
            of_g = g[:, :, max(0, 1 - i) : height + min(0, 1 - i), max(0, 1 - j) : width + min(0, 1 - j)]
            result[:, i, j] = _rows(of_g).t() @ _rows(of_x)
    return result.permute(0, 3, 1, 2)


def weight_gradient_by_columns(x: Tensor, g: Tensor, dtype: torch.dtype) -> Tensor:
    """The same as one product with the 3x3 neighbourhoods of all places, 9 times as many numbers as x has."""
    height, width = x.shape[2:]
    bordered = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    taps = [bordered[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    product = _rows(g).t() @ torch.stack(taps, 3).view(-1, 9 * x.shape[1])
    return product.to(dtype).view(-1, 3, 3, x.shape[1]).permute(0, 3, 1, 2)


class _ConvTranspose2x2(torch.autograd.Function):
    """The transposed convolution with stride 2 in x's dtype: each place becomes 2x2 places of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        used = weight.to(x.dtype)
        ctx.save_for_backward(x, used)
        ctx.weight_dtype, ctx.has_bias = weight.dtype, bias is not None
        return F.conv_transpose2d(x, used, bias, stride=2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (g,) = grads
        x, used = ctx.saved_tensors
        n, channels, height, width = x.shape
        need_x, need_weight, need_bias = ctx.needs_input_grad
        squares = g.permute(0, 2, 3, 1).reshape(n, height, 2, width, 2, -1).transpose(2, 3)
        squares = squares.reshape(n * height * width, -1)  # the 2x2 places that come of a place side by side
        g_x = g_weight = None
        if need_x:
            g_x = squares @ used.permute(0, 2, 3, 1).reshape(channels, -1).t()
            g_x = g_x.view(n, height, width, channels).permute(0, 3, 1, 2)
        if need_weight:
            product = (_rows(x).t() @ squares).to(ctx.weight_dtype)
            g_weight = product.view(channels, 2, 2, -1).permute(0, 3, 1, 2)
        return g_x, g_weight, g.sum((0, 2, 3)) if need_bias and ctx.has_bias else None
