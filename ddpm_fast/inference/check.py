"""Whether an implementation computes its layer: run once on what lies in the source, against PyTorch in float32."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .candidate import Bound, Candidate, Frame, Place
from .library import resampled, stride_of
from .network import Attention, Conv, Down, Layer, Linear, LinearAttention, Norm, Output, RMSNorm, Up

CHECKED_IMAGES = 8
# |got - exact| / |exact| over a layer's output. Weights, stored inputs and outputs are rounded once each: far below.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TF32_BOUND = 3e-3  # of float32 on a GPU where PyTorch may round the factors to TF32, as it then does in the model too

Served = tuple[Candidate, Bound]


def tf32_allowed() -> bool:
    """Whether PyTorch's convolutions may round float32 factors to TF32 on a GPU."""
    try:
        return bool(torch.backends.cudnn.allow_tf32)
    except RuntimeError:  # torch 2.9 and later, where convolutions and recurrent layers were told different things
        return bool(torch.backends.cudnn.conv.fp32_precision == "tf32")  # type: ignore[attr-defined]


def bound_of(dtype: torch.dtype, device: torch.device) -> float:
    """The relative error that a layer may have."""
    if dtype == torch.float32 and device.type == "cuda" and tf32_allowed():
        return TF32_BOUND
    return BOUNDS[dtype]


def exact(layer: Layer, place: Place, frame: Frame, images: Tensor) -> Tensor:
    """The layer's output for some images, computed by PyTorch from what lies in its source: (n, c, h, w).

    In float32, on a GPU in float64, where float32 may mean TF32.
    """
    dtype = torch.float64 if place.device.type == "cuda" else torch.float32

    def nchw(view: Tensor) -> Tensor:
        return view[images].permute(0, 3, 1, 2).to(dtype)

    x = frame.x[images].to(dtype) if place.source is None else nchw(place.source)
    match layer:
        case Attention() | LinearAttention():
            return _mixed(layer, x)
        case Norm() | RMSNorm():
            y = _normed(layer, x, frame, images)
        case Up():
            return F.conv_transpose2d(x, layer.weight.to(dtype), layer.bias.to(dtype), stride=2)
        case Down():
            return F.conv2d(x, layer.weight.to(dtype), layer.bias.to(dtype), stride=2)
        case Output():
            weight = layer.weight.to(dtype)
            return F.conv2d(x, weight, layer.bias.to(dtype), padding=weight.shape[-1] // 2)
        case Linear():
            y = F.conv2d(x, layer.weight.to(dtype)[:, :, None, None], layer.bias.to(dtype))
        case Conv():
            weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
            y = F.conv2d(resampled(x, layer), weight, bias, stride=stride_of(layer), padding=layer.padding)
            if layer.silu:
                y = F.silu(y)
            if layer.temb is not None:
                y = y + frame.temb(layer.temb, y.shape[1])[images][:, :, None, None]
    return y if place.residual is None else y + nchw(place.residual)


def _normed(layer: Norm | RMSNorm, x: Tensor, frame: Frame, images: Tensor) -> Tensor:
    """A norm of x (n, c, h, w), with modulation and activation."""
    weight = layer.weight.to(x.dtype)
    if isinstance(layer, Norm):
        y = F.group_norm(x, layer.groups, weight, layer.bias.to(x.dtype), layer.eps)
    else:
        y = F.normalize(x, dim=1, eps=layer.eps) * weight[:, None, None]
    if layer.modulation is not None:
        scale, shift = frame.temb(layer.modulation, 2 * x.shape[1])[images][:, :, None, None].to(x.dtype).chunk(2, 1)
        y = y * (1 + scale) + shift
    return F.silu(y) if layer.silu else y


def _mixed(layer: Attention | LinearAttention, x: Tensor) -> Tensor:
    """What attention makes of x (n, 3c, h, w)."""
    n, c, h, w = x.shape
    # [n, heads, pixels, c / heads] each
    q, k, v = x.view(n, 3, layer.heads, c // 3 // layer.heads, h * w).transpose(3, 4).unbind(1)
    if layer.memory is not None:
        memory = layer.memory.to(x.dtype)
        keys, values = memory.mT if isinstance(layer, LinearAttention) else memory
        k, v = torch.cat([keys.expand(n, *keys.shape), k], 2), torch.cat([values.expand(n, *values.shape), v], 2)
    if isinstance(layer, LinearAttention):
        y = q.softmax(3) * layer.scale @ (k.softmax(2).mT @ v)
    else:
        y = torch.softmax(q @ k.mT * layer.scale, dim=-1) @ v
    return y.mT.reshape(n, c // 3, h, w)


def error(layer: Layer, place: Place, frame: Frame, bound: Bound, expected: Tensor, images: Tensor) -> float:
    """Relative error of one run in its output, and in the pooled one; infinite where something was left unwritten."""
    target = frame.out if place.target is None else place.target
    target.fill_(float("nan"))
    if place.pooled is not None:
        place.pooled.fill_(float("nan"))
    bound(frame)
    got = target[images].to(expected.dtype)
    if place.target is not None:
        got = got.permute(0, 3, 1, 2)
    result = _relative(got, expected)
    if place.pooled is not None:
        pooled = place.pooled[images].permute(0, 3, 1, 2).to(expected.dtype)
        result = max(result, _relative(pooled, F.max_pool2d(expected, 2)))
    return result


def _relative(got: Tensor, expected: Tensor) -> float:
    norm = float((got - expected).norm() / expected.norm().clamp_min(1e-30))
    return norm if norm == norm else float("inf")


def serving(
    layer: Layer, place: Place, frame: Frame, candidates: Sequence[Candidate], wanted: int | None = None
) -> list[Served]:
    """The candidates that run and compute the right thing, in their order; only the first `wanted` of them if given.

    RuntimeError where none does. A wrong one is warned about; one that says it cannot serve is left out.
    """
    images = torch.arange(place.n, device=place.device)
    if place.n > CHECKED_IMAGES:
        images = torch.linspace(0, place.n - 1, CHECKED_IMAGES, device=place.device).round().long()
    expected = exact(layer, place, frame, images)
    if not bool(torch.isfinite(expected).all()):
        raise RuntimeError(
            f"layer {layer.name} gives values that are not finite for normal images, so no fused plan can be checked: "
            f"the model's weights hold NaN or infinity, or its activations overflow {place.dtype}"
        )
    limit = bound_of(place.dtype, place.device)
    result: list[Served] = []
    reasons: list[str] = []
    for candidate in candidates:
        try:
            bound = candidate.prepare(layer, place)
            wrong = error(layer, place, frame, bound, expected, images)
        except (RuntimeError, ValueError, NotImplementedError) as reason:
            reasons.append(f"{candidate.name}: {reason}")
            continue
        if wrong > limit:
            reasons.append(f"{candidate.name}: relative error {wrong:.2g}")
            warnings.warn(
                f"fused plan: {candidate.name} computes layer {layer.name} with a relative error of {wrong:.2g}, more "
                f"than {limit:.2g}; it is not used",
                RuntimeWarning,
                stacklevel=2,
            )
            continue
        result.append((candidate, bound))
        if len(result) == wanted:
            break
    if not result:
        raise RuntimeError(f"no implementation serves layer {layer.name}: {'; '.join(reasons)}")
    return result
