"""Which implementation of each layer is the fastest here: checked against float32, then timed in the network's order.

A layer timed on its own, again and again, has its weights and images in the cache, which in a network they are not. So
whole passes are made, each with another of the candidates in every layer, and every layer is timed within them.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .candidate import Bound, Candidate, Frame, Place
from .library import resampled, stride_of
from .native import NativeLayer
from .network import Attention, Layer, Linear, Norm, Output, Up

ROUNDS = 5  # timings per candidate that is still in
SECONDS, AT_LEAST = 1.2, 3  # for all rounds, but every candidate still in is timed so often whatever it takes
HOPELESS, SLOWER = 2.0, 1.5  # times the best of two runs: out before the rounds, out after two of them
CLOSE = 1.05  # within this of the fastest, what is listed first is taken, so that noise decides less
APART = 1.15  # ours join up with their neighbours into one call, and wake no second set of threads: worth this much
CHECKED_IMAGES = 8
# |got - exact| / |exact| over a layer's output. Weights, stored inputs and outputs are rounded once each: far below.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
TF32_BOUND = 3e-3  # of float32 on a GPU where PyTorch may round the factors to TF32, as it then does in the model too


def bound_of(dtype: torch.dtype, device: torch.device) -> float:
    """The relative error that a layer may have."""
    if dtype == torch.float32 and device.type == "cuda" and torch.backends.cudnn.allow_tf32:
        return TF32_BOUND
    return BOUNDS[dtype]


@dataclasses.dataclass
class Ranking:
    """What was chosen for a layer: (candidate's name, microseconds) from the fastest on; one entry without times where
    nothing was measured."""

    layer: str
    times: list[tuple[str, float | None]]

    @property
    def chosen(self) -> str:
        return self.times[0][0]


@dataclasses.dataclass(eq=False)
class Contender:
    candidate: Candidate
    bound: Bound
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def samples(self) -> int:
        return len(self.seconds)


def exact(layer: Layer, place: Place, frame: Frame, images: Tensor) -> Tensor:
    """The layer's output for some images, computed by PyTorch from what lies in its source: (n, c, h, w).

    In float32, on a GPU in float64, where float32 may mean TF32.
    """
    dtype = torch.float64 if place.device.type == "cuda" else torch.float32

    def nchw(view: Tensor) -> Tensor:
        return view[images].permute(0, 3, 1, 2).to(dtype)

    x = frame.x[images].to(dtype) if place.source is None else nchw(place.source)
    if isinstance(layer, Attention):
        n, c, h, w = x.shape
        q, k, v = x.view(n, 3, layer.heads, c // 3 // layer.heads, h * w).transpose(3, 4).unbind(1)
        y = torch.softmax(q @ k.transpose(2, 3) * layer.scale, dim=-1) @ v
        return y.transpose(2, 3).reshape(n, c // 3, h, w)
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)
    if isinstance(layer, Norm):
        y = F.group_norm(x, layer.groups, weight, bias, layer.eps)
        if layer.modulation is not None:
            scale, shift = frame.temb(layer.modulation, 2 * x.shape[1])[images][:, :, None, None].to(dtype).chunk(2, 1)
            y = y * (1 + scale) + shift
        return F.silu(y) if layer.silu else y
    if isinstance(layer, Up):
        return F.conv_transpose2d(x, weight, bias, stride=2)
    if isinstance(layer, Output):
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)
    if isinstance(layer, Linear):
        y = F.conv2d(x, weight[:, :, None, None], bias)
    else:
        y = F.conv2d(resampled(x, layer), weight, bias, stride=stride_of(layer), padding=layer.padding)
        if layer.silu:
            y = F.silu(y)
        if layer.temb is not None:
            y = y + frame.temb(layer.temb, y.shape[1])[images][:, :, None, None]
    return y if place.residual is None else y + nchw(place.residual)


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
) -> list[Contender]:
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
    result: list[Contender] = []
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
        result.append(Contender(candidate, bound))
        if len(result) == wanted:
            break
    if not result:
        raise RuntimeError(f"no implementation serves layer {layer.name}: {'; '.join(reasons)}")
    return result


Timer = Callable[[Sequence[Bound], Frame], list[float]]


def timed_on_host(bounds: Sequence[Bound], frame: Frame) -> list[float]:
    """Seconds of each call, one after the other."""
    result = []
    for bound in bounds:
        start = time.perf_counter()
        bound(frame)
        result.append(time.perf_counter() - start)
    return result


def timed_on_gpu(bounds: Sequence[Bound], frame: Frame) -> list[float]:
    """Seconds of each call on the device, between events. The device waits first, so that launches run ahead of it."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(bounds) + 1)]
    torch.cuda._sleep(2_000_000 + 200_000 * len(bounds))  # clock cycles: about 0.1 ms a layer
    events[0].record()
    for bound, event in zip(bounds, events[1:], strict=True):
        bound(frame)
        event.record()
    events[-1].synchronize()
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]


def timer_for(device: torch.device) -> Timer:
    """How calls are timed on this device."""
    return timed_on_gpu if device.type == "cuda" else timed_on_host


def fastest(
    layers: Sequence[Layer],
    places: Sequence[Place],
    frame: Frame,
    listed: Callable[[Layer, Place], list[Candidate]],
) -> list[Ranking]:
    """Per layer the fastest of the listed implementations that compute the right thing, and how the others fared."""
    timer = timer_for(frame.x.device)
    contenders: list[list[Contender]] = []
    rankings: list[dict[str, float]] = []

    def settle(i: int, limit: float) -> None:
        """Records times; drops what is more than `limit` times slower than the best."""
        best = min(contender.best for contender in contenders[i])
        rankings[i] |= {contender.candidate.name: contender.best for contender in contenders[i]}
        contenders[i] = [contender for contender in contenders[i] if contender.best <= limit * best]

    for i, (layer, place) in enumerate(zip(layers, places, strict=True)):
        contenders.append(serving(layer, place, frame, listed(layer, place)))
        rankings.append({})
        for contender in contenders[i]:
            contender.seconds += timer([contender.bound], frame)
            if contender.best > HOPELESS * min(other.best for other in contenders[i] if other.seconds):
                contender.seconds += timer([contender.bound], frame)  # something may have come in between
        settle(i, HOPELESS)
        for contender in contenders[i]:
            contender.seconds.clear()

    start, passes = time.perf_counter(), 0
    while passes < 2 or any(len(some) > 1 and some[-1].samples < ROUNDS for some in contenders):
        late = time.perf_counter() - start > SECONDS
        if late and all(contender.samples >= AT_LEAST for some in contenders for contender in some):
            break
        turn = [min(some, key=lambda contender: contender.samples) for some in contenders]
        for contender, seconds in zip(turn, timer([contender.bound for contender in turn], frame), strict=True):
            contender.seconds.append(seconds)
        for i, some in enumerate(contenders):
            if len(some) > 1 and all(contender.samples > 1 for contender in some):
                settle(i, SLOWER)
        passes += 1
    choices = []
    for i, layer in enumerate(layers):
        ours = [contender for contender in contenders[i] if isinstance(contender.bound, NativeLayer)]
        if ours and min(one.best for one in ours) <= APART * min(one.best for one in contenders[i]):
            contenders[i] = ours
        settle(i, CLOSE)
        winner = contenders[i][0]
        name = winner.candidate.name
        order = sorted(rankings[i].items(), key=lambda item: (item[0] != name, item[1]))
        choices.append(Ranking(layer.name, [(key, seconds * 1e6) for key, seconds in order]))
    return choices
