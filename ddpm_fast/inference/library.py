"""Implementations out of PyTorch's own operators: they serve any device, dtype and channel count.

    conv2d                 the public convolution, then bias, SiLU and time embedding in one pass
    onednn                 the CPU library's convolution with weights laid out beforehand (a private op, tested for)
    im2col                 the nine neighbours of every pixel side by side, times [9 in, out]: small images
    window                 2x2 images, 4 in -> 4 out as one dense matrix: no products with padding, 16/36 of the work
    gemm                   ConvTranspose2d(2, stride 2) as [pixels, in] x [in, 4 out]; 1x1 layers; the last in float32
    group_norm, attention  our op of that name; scaled_dot_product_attention

Views here are [n, h, w, c]; `_nchw` gives operators their (n, c, h, w).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .candidate import Bound, Candidate, Frame, Place
from .network import Attention, Conv, Layer, Linear, Norm, Output, Up

Weighted = Conv | Up | Linear | Output

IM2COL_PIXELS = 16  # above, the ninefold copy costs more than the convolution loses


@dataclasses.dataclass(frozen=True)
class Library:
    """One way to run layers of one kind."""

    name: str
    bind: Callable[[Layer, Place], Bound]

    def prepare(self, layer: Layer, place: Place) -> Bound:
        return self.bind(layer, place)


def candidates(
    layer: Layer, n: int, h: int, w: int, dtype: torch.dtype, device: torch.device
) -> list[Candidate]:  # every module of implementations has this signature
    """What can serve this layer, the safest first. h, w: of its source."""
    match layer:
        case Up():
            return [Library("conv_transpose2d", _transposed), Library("gemm", _up_gemm)]
        case Linear():
            return [Library("gemm", _linear)]
        case Norm():
            return [Library("group_norm_silu", _norm)]
        case Attention():
            return [Library("attention", _attention)]
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


def _reordered(weight: Tensor, size: tuple[int, ...]) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, size)
    return packed


def _swish(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    act = "swish" if silu else "none"
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(x, weight, bias, [1, 1], [1, 1], [1, 1], 1, act, [None], "")
    return y


def _nchw(view: Tensor) -> Tensor:
    return view.permute(0, 3, 1, 2)


def _source(layer: Layer, place: Place) -> Callable[[Frame], Tensor]:
    """frame -> what the layer reads, (n, c, h, w) in the plan's dtype, channels last."""
    if place.source is None:
        dtype = place.dtype
        return lambda frame: frame.x.to(dtype, memory_format=torch.channels_last)
    source = _nchw(place.source)
    return lambda frame: source


def _packed(layer: Weighted, place: Place, key: str, form: Callable[[Tensor], Tensor]) -> Tensor:
    """form(weight) in the plan's dtype, kept. What is kept holds on to the layer and not to the place, which goes."""
    dtype = place.dtype
    return place.packs.get(layer, (key, dtype), lambda: form(layer.weight).to(dtype, copy=True))


def stride_of(layer: Conv) -> int:
    """Of the convolution."""
    return 2 if layer.resample == "down" else 1


def resampled(x: Tensor, layer: Conv) -> Tensor:
    """What `layer` convolves, with its padding, of x (n, c, h, w)."""
    if layer.resample == "up":
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    return F.pad(x, (0, 1, 0, 1)) if layer.resample == "down" and not layer.padding else x


def _weight(layer: Weighted, place: Place) -> Tensor:
    return _packed(layer, place, "weight", lambda w: w.contiguous(memory_format=torch.channels_last))


def _bias(layer: Weighted, place: Place) -> Tensor:
    dtype = place.dtype
    return place.packs.get(layer, ("bias", dtype), lambda: layer.bias.to(dtype, copy=True))


def _finish(layer: Conv, place: Place) -> Callable[[Tensor, Frame], None]:
    """What stores act(y + bias) + temb + residual for a y (n, c, h, w), and where it is wanted each 2x2's maximum."""
    assert place.target is not None
    target, act = _nchw(place.target), "silu" if layer.silu else None
    pooled = None if place.pooled is None else _nchw(place.pooled)
    residual = None if place.residual is None else _nchw(place.residual)

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
    source, weight, finish = _source(layer, place), _weight(layer, place), _finish(layer, place)

    def run(frame: Frame) -> None:
        x = resampled(source(frame), layer)
        finish(F.conv2d(x, weight, stride=stride_of(layer), padding=layer.padding), frame)

    return run


def _onednn(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Conv)
    assert place.target is not None
    conv, target = layer, _nchw(place.target)
    source, bias = _source(layer, place), _bias(layer, place)
    pooled = None if place.pooled is None else _nchw(place.pooled)
    residual = None if place.residual is None else _nchw(place.residual)
    dtype, size = place.dtype, (place.n, layer.weight.shape[1], place.h, place.w)
    key = ("onednn", dtype, size)

    def packed() -> Tensor:
        return _reordered(layer.weight.to(dtype), size)

    place.packs.get(layer, key, packed)

    def run(frame: Frame) -> None:
        y = _swish(source(frame), place.packs.get(layer, key, packed), bias, conv.silu)
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
    weight = _packed(layer, place, "im2col", lambda w: w.permute(2, 3, 1, 0).reshape(9 * c, out))

    def run(frame: Frame) -> None:
        inner.copy_(source)
        cells.copy_(neighbours)
        finish(_nchw(torch.mm(columns, weight).view(n, h, w, out)), frame)

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
    weight = _packed(layer, place, "window", dense_window)

    def run(frame: Frame) -> None:
        finish(_nchw(torch.mm(source.reshape(n, 4 * c), weight).view(n, 2, 2, out)), frame)

    return run


def _transposed(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Up)
    assert place.target is not None
    source, target = _source(layer, place), _nchw(place.target)
    weight, bias = _weight(layer, place), _bias(layer, place)

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
    weight = _packed(layer, place, "gemm", lambda w: w.permute(0, 2, 3, 1).reshape(c, 4 * out))
    bias = place.packs.get(layer, ("gemm bias", dtype), lambda: layer.bias.repeat(4).to(dtype))

    def run(frame: Frame) -> None:
        y = torch.addmm(bias, source.reshape(n * h * w, c), weight)
        cells.copy_(y.view(n, h, w, 2, 2, out).transpose(2, 3))

    return run


def _linear(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Linear)
    source, target, residual = place.source, place.target, place.residual
    assert source is not None
    assert target is not None
    c = source.shape[3]
    weight, bias = _packed(layer, place, "linear", lambda w: w.T), _bias(layer, place)

    def run(frame: Frame) -> None:
        y = torch.addmm(bias, source.reshape(-1, c), weight).view(target.shape)
        if residual is None:
            target.copy_(y)
        else:
            torch.add(y, residual, out=target)

    return run


def _norm(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Norm)
    assert place.target is not None
    norm, source, target = layer, _source(layer, place), _nchw(place.target)
    act: Literal["silu"] | None = "silu" if layer.silu else None

    def run(frame: Frame) -> None:
        scale = shift = None
        if norm.modulation is not None:
            scale, shift = frame.temb(norm.modulation, 2 * len(norm.weight)).chunk(2, dim=1)
        target.copy_(
            ops.group_norm_silu(
                source(frame), norm.groups, norm.weight, norm.bias, scale=scale, shift=shift, eps=norm.eps, act=act
            )
        )

    return run


def _attention(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Attention)
    source, target, attention = place.source, place.target, layer
    assert source is not None
    assert target is not None
    n, h, w, c = target.shape

    def run(frame: Frame) -> None:
        # [n, pixels, 3, heads, c / heads] -> three of [n, heads, pixels, c / heads]
        q, k, v = source.reshape(n, h * w, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
        target.copy_(y.transpose(1, 2).reshape(n, h, w, c))

    return run


def _output_conv(layer: Layer, place: Place) -> Bound:
    assert isinstance(layer, Output)
    assert place.source is not None
    source, output = _nchw(place.source), layer
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
        frame.out.copy_(_nchw(F.linear(source.float(), weight, layer.bias)))

    return run
