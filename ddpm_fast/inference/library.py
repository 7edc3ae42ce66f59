"""Implementations out of PyTorch's own operators: they serve any device, dtype and channel count.

    conv2d                 the public convolution, then bias, SiLU and time embedding in one pass
    onednn                 the CPU library's convolution with weights laid out beforehand (a private op, tested for)
    im2col                 the nine neighbours of every pixel side by side, times [9 in, out]: small images
    window                 2x2 images, 4 in -> 4 out as one dense matrix: no products with padding, 16/36 of the work
    gemm                   ConvTranspose2d(2, stride 2) as [pixels, in] x [in, 4 out]; 1x1 layers; the last in float32
    group_norm, attention  our op of that name; scaled_dot_product_attention

Views here are [n, h, w, c]; `nchw` gives operators their (n, c, h, w).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from . import library_tokens as tokens
from .candidate import Bound, Candidate, Frame, Place
from .library_parts import Library, bias_of, nchw, packed, source_of, weight_of
from .network import Attention, Conv, Down, Layer, Linear, LinearAttention, Norm, Output, RMSNorm, Up

IM2COL_PIXELS = 16  # above, the ninefold copy costs more than the convolution loses


def candidates(
    layer: Layer, n: int, h: int, w: int, dtype: torch.dtype, device: torch.device
) -> list[Candidate]:  # every module of implementations has this signature
    """What can serve this layer, the safest first. h, w: of its source."""
    match layer:
        case Up():
            return [Library("conv_transpose2d", _transposed), Library("gemm", _up_gemm)]
        case Down():
            return [Library("conv2d", _strided), Library("gemm", _down_gemm)]
        case Linear():
            return [Library("gemm", _linear)]
        case Norm():
            return [Library("group_norm_silu", tokens.norm)]
        case RMSNorm():
            return [Library("rms_norm_silu", tokens.rms_norm)]
        case Attention():
            return [Library("attention", tokens.attention)]
        case LinearAttention():
            return [Library("linear_attention", tokens.linear_attention)]
        case Output():
            return [Library("gemm", _output_gemm) if layer.weight.shape[-1] == 1 else Library("conv2d", _output_conv)]
        case Conv(resample="up" | "down"):
            return [Library("conv2d", _conv2d)]
    # The same library's convolution either way: the public one has nothing to win where the other works.
    fused = device.type == "cpu" and onednn_works(dtype)
    result = [Library("onednn", _onednn) if fused else Library("conv2d", _conv2d)]
    if layer.source is not None:
        if h == w == 2:
            result.append(Library("window", _window))
        elif h * w <= IM2COL_PIXELS:
            result.append(Library("im2col", _im2col))
    return [*result]


@functools.cache
def onednn_works(dtype: torch.dtype) -> bool:
    """Whether this torch has the private ops, this CPU serves the dtype, and the result is that of conv2d."""
    if dtype == torch.float16 or not torch.backends.mkldnn.is_available():
        return False
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        with torch.inference_mode(False), torch.no_grad():
            x = torch.linspace(-1, 1, 16 * 16).view(1, 4, 4, 16).permute(0, 3, 1, 2).to(dtype)
            weight, bias = torch.linspace(-1, 1, 16 * 16 * 9).view(16, 16, 3, 3).to(dtype), torch.ones(16).to(dtype)
            got = _swish(x, _reordered(weight, (1, 16, 4, 4)), bias, True)
            expected = F.silu(F.conv2d(x.float(), weight.float(), bias.float(), padding=1))
        return bool(torch.allclose(got.float(), expected, rtol=0.02, atol=0.05))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _reordered(weight: Tensor, size: tuple[int, ...], padding: int = 1) -> Tensor:
    pads = [padding, padding]
    result: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, pads, [1, 1], [1, 1], 1, size)
    return result


def _swish(x: Tensor, weight: Tensor, bias: Tensor, silu: bool, padding: int = 1) -> Tensor:
    act, pads, one = "swish" if silu else "none", [padding, padding], [1, 1]
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, pads, one, one, 1, act, [None], "")
    return y


def stride_of(layer: Conv) -> int:
    """Of the convolution."""
    return 2 if layer.resample == "down" else 1


def resampled(x: Tensor, layer: Conv) -> Tensor:
    """What `layer` convolves, with its padding, of x (n, c, h, w)."""
    if layer.resample == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.pad(x, (0, 1, 0, 1)) if layer.resample == "down" and not layer.padding else x


def _finish(layer: Conv, place: Place) -> Callable[[Tensor, Frame], None]:
    """What stores act(y + bias) + temb + residual for a y (n, c, h, w), and where it is wanted each 2x2's maximum."""
    assert place.target is not None
    target, act = nchw(place.target), "silu" if layer.silu else None
    pooled = None if place.pooled is None else nchw(place.pooled)
    residual = None if place.residual is None else nchw(place.residual)

    def finish(y: Tensor, frame: Frame) -> None:
        temb = None if layer.temb is None else frame.temb(layer.temb, layer.bias.shape[0])
        y = ops.add_bias_temb(y, layer.bias, temb, act=act)  # type: ignore[arg-type]
        if residual is None:
            target.copy_(y)
        else:
            torch.add(y, residual, out=target)
        if pooled is not None:
            pooled.copy_(F.max_pool2d(target, 2))

    return finish


def _conv2d(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Conv)
    source, weight, finish = source_of(layer, place), weight_of(layer, place), _finish(layer, place)

    def run(frame: Frame) -> None:
        x = resampled(source(frame), layer)
        finish(F.conv2d(x, weight, stride=stride_of(layer), padding=layer.padding), frame)

    return run


def _onednn(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Conv)
    assert place.target is not None
    conv, target = layer, nchw(place.target)
    source, bias = source_of(layer, place), bias_of(layer, place)
    pooled = None if place.pooled is None else nchw(place.pooled)
    residual = None if place.residual is None else nchw(place.residual)
    dtype, size = place.dtype, (place.n, layer.weight.shape[1], place.h, place.w)
    key = ("onednn", dtype, size)

    def reordered() -> Tensor:
        return _reordered(layer.weight.to(dtype), size, conv.padding)

    place.packs.get(layer, key, reordered)

    def run(frame: Frame) -> None:
        y = _swish(source(frame), place.packs.get(layer, key, reordered), bias, conv.silu, conv.padding)
        if conv.temb is not None:
            y += frame.temb(conv.temb, y.shape[1])[:, :, None, None].to(y.dtype)
        if residual is not None:
            y += residual
        target.copy_(y)
        if pooled is not None:
            pooled.copy_(F.max_pool2d(target, 2))

    return run


def _im2col(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Conv)
    source, finish = place.source, _finish(layer, place)
    assert source is not None
    n, h, w, c = source.shape
    out = layer.weight.shape[0]
    padded = source.new_zeros(n, h + 2, w + 2, c)
    inner = padded[:, 1:-1, 1:-1]
    # [n, h, w, 3, 3, c]: pixel (y + i, x + j) of the padded image for every (y, x) and (i, j)
    s = padded.stride()
    neighbours = padded.as_strided((n, h, w, 3, 3, c), (s[0], s[1], s[2], s[1], s[2], 1))
    columns = source.new_zeros(n * h * w, 9 * c)
    cells = columns.view(n, h, w, 3, 3, c)
    weight = packed(layer, place, "im2col", lambda w: w.permute(2, 3, 1, 0).reshape(9 * c, out))

    def run(frame: Frame) -> None:
        inner.copy_(source)
        cells.copy_(neighbours)
        finish(nchw(torch.mm(columns, weight).view(n, h, w, out)), frame)

    return run


def dense_window(weight: Tensor) -> Tensor:
    """[out, in, 3, 3] -> [4 in, 4 out]: what pixel p of a 2x2 image, padded with zeros, adds to pixel q.

    Between pixels (y, x) -> (y', x') lies the tap (y - y' + 1, x - x' + 1). Pixels count row by row.
    """
    out, c = weight.shape[:2]
    dense = weight.new_zeros(4, c, 4, out)
    for p in range(4):
        for q in range(4):
            tap = (p // 2 - q // 2 + 1, p % 2 - q % 2 + 1)
            dense[p, :, q] = weight[:, :, tap[0], tap[1]].T
    return dense.view(4 * c, 4 * out)


def _window(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Conv)
    source, finish, out = place.source, _finish(layer, place), layer.weight.shape[0]
    assert source is not None
    n, c = source.shape[0], source.shape[3]
    weight = packed(layer, place, "window", dense_window)

    def run(frame: Frame) -> None:
        finish(nchw(torch.mm(source.reshape(n, 4 * c), weight).view(n, 2, 2, out)), frame)

    return run


def _transposed(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Up)
    assert place.target is not None
    source, target = source_of(layer, place), nchw(place.target)
    weight, bias = weight_of(layer, place), bias_of(layer, place)

    def run(frame: Frame) -> None:
        target.copy_(F.conv_transpose2d(source(frame), weight, bias, stride=2))

    return run


def _up_gemm(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Up)
    source, target = place.source, place.target
    assert source is not None
    assert target is not None
    n, h, w, c = source.shape
    out, dtype = layer.weight.shape[1], place.dtype
    # [n, h, 2, w, 2, out], so that one product's rows go where their four pixels are
    cells = target.unflatten(2, (w, 2)).unflatten(1, (h, 2))
    weight = packed(layer, place, "gemm", lambda w: w.permute(0, 2, 3, 1).reshape(c, 4 * out))
    bias = place.packs.get(layer, ("gemm bias", dtype), lambda: layer.bias.repeat(4).to(dtype))

    def run(frame: Frame) -> None:
        y = torch.addmm(bias, source.reshape(n * h * w, c), weight)
        cells.copy_(y.view(n, h, w, 2, 2, out).transpose(2, 3))

    return run


def _strided(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Down)
    assert place.target is not None
    source, target = source_of(layer, place), nchw(place.target)
    weight, bias = weight_of(layer, place), bias_of(layer, place)

    def run(frame: Frame) -> None:
        target.copy_(F.conv2d(source(frame), weight, bias, stride=2))

    return run


def _down_gemm(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Down)
    source, target = place.source, place.target
    assert source is not None
    assert target is not None
    _, h, w, c = source.shape
    out = layer.weight.shape[0]
    # [n, h / 2, w / 2, 2, 2, c], so that one row of the product's left side is the four pixels of a result
    cells = source.unflatten(2, (w // 2, 2)).unflatten(1, (h // 2, 2)).transpose(2, 3)
    weight = packed(layer, place, "gemm", lambda w: w.permute(2, 3, 1, 0).reshape(4 * c, out))
    bias = bias_of(layer, place)

    def run(frame: Frame) -> None:
        y = torch.addmm(bias, cells.reshape(-1, 4 * c), weight)
        target.copy_(y.view(target.shape))

    return run


def _linear(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Linear)
    source, target, residual = place.source, place.target, place.residual
    assert source is not None
    assert target is not None
    c = source.shape[3]
    weight, bias = packed(layer, place, "linear", lambda w: w.T), bias_of(layer, place)
    whole = target.view(-1, target.shape[3]) if residual is None and target.is_contiguous() else None

    def run(frame: Frame) -> None:
        if whole is not None:
            torch.addmm(bias, source.reshape(-1, c), weight, out=whole)
            return
        y = torch.addmm(bias, source.reshape(-1, c), weight).view(target.shape)
        if residual is None:
            target.copy_(y)
        else:
            torch.add(y, residual, out=target)

    return run


def _output_conv(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Output)
    assert place.source is not None
    source, output = nchw(place.source), layer
    weight = _packed_float(layer, place)

    def run(frame: Frame) -> None:
        frame.out.copy_(F.conv2d(source.float(), weight, output.bias, padding=1))

    return run


def _packed_float(layer: Output, place: Place) -> Tensor:
    """The last layer's weight in float32, channels last."""
    return place.packs.get(layer, "float weight", lambda: layer.weight.to(memory_format=torch.channels_last, copy=True))


def _output_gemm(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Output)
    source = place.source
    assert source is not None
    out, c = layer.weight.shape[:2]
    weight = layer.weight.view(out, c)

    def run(frame: Frame) -> None:
        frame.out.copy_(nchw(F.linear(source.float(), weight, layer.bias)))

    return run
