"""A network placed in memory for one batch and image size: static buffers, and per layer one implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from . import library, native
from .candidate import Bound, Candidate, Frame, PackName, Packs, Place
from .ending import Step, gpu
from .module import Module
from .network import (
    Attention,
    Conv,
    Layer,
    Linear,
    LinearAttention,
    Network,
    Norm,
    Output,
    RMSNorm,
    Slice,
    tensors_of,
)
from .times import embed
from .trial import Ranking

DIRECT_PIXELS = 64  # fewer than this in a batch and Winograd's larger weights cost more than its fewer products save


def listed(layer: Layer, place: Place) -> list[Candidate]:
    """Every implementation that may serve this layer there, ours first."""
    arguments = (layer, place.n, place.h, place.w, place.dtype, place.device)
    found = native.candidates(*arguments)
    if place.n * place.h * place.w < DIRECT_PIXELS:
        found.sort(key=lambda candidate: candidate.name.startswith("winograd"))
    kernels = gpu() if place.device.type == "cuda" else None
    if kernels is not None:
        found += kernels.candidates(*arguments)
    return [*found, *library.candidates(*arguments)]


def places(
    network: Network, n: int, h: int, w: int, dtype: torch.dtype, device: torch.device, packs: Packs
) -> list[Place]:
    """Allocates the buffers and says, layer by layer, where each works."""
    buffers: dict[str, Tensor] = {}
    columns = network.time.weight.shape[0]

    def view(part: Slice | None) -> Tensor | None:
        if part is None:
            return None
        buffer = part.buffer
        if buffer.name not in buffers:
            size = (n, h >> buffer.level, w >> buffer.level, buffer.channels)
            buffers[buffer.name] = torch.zeros(size, dtype=dtype, device=device)
        return buffers[buffer.name].narrow(3, part.first, part.channels)

    result = []
    for layer in network.layers:
        source = view(layer.source)
        target = None if isinstance(layer, Output) else view(layer.target)
        pooled = view(layer.pooled) if isinstance(layer, Conv) else None
        residual = view(layer.residual) if isinstance(layer, (Conv, Linear, RMSNorm)) else None
        size = (h, w) if source is None else (source.shape[1], source.shape[2])
        result.append(Place(n, *size, dtype, device, source, target, pooled, columns, packs, residual))
    return result


def frame_for(network: Network, n: int, h: int, w: int, device: torch.device) -> Frame:
    """Normal images at timesteps spread over 0..999, with the null label or the first: what a trial runs on."""
    x = torch.randn(n, network.in_channels, h, w, generator=torch.Generator().manual_seed(0)).to(device)
    t = torch.linspace(0, 999, n, device=device).round()
    time = network.time
    rows = torch.arange(n, device=device)
    labels = None if time.labels is None else torch.full_like(rows, time.null_label or 0)
    temb = torch.zeros(n, len(time.weight), device=device)
    embed(time, t, labels, temb)
    out = torch.zeros(n, network.out_channels, h, w, device=device)
    return Frame(x, out, temb, rows, time.added_labels, labels)


class Plan:
    """Runs the network on n images of h x w pixels. One run at a time: the buffers are shared by all of them.

    dtype: of the activations. rows, label_rows: static int64 [n], for the caller to write before a run. choices: per
    layer what was chosen and how long everything took. uses: the packed weights that it needs.
    """

    def __init__(
        self,
        network: Network,
        n: int,
        h: int,
        w: int,
        dtype: torch.dtype,
        bounds: list[Bound],
        choices: list[Ranking],
        uses: set[PackName],
    ) -> None:
        self.n, self.h, self.w, self.dtype = n, h, w, dtype
        self.network, self.choices, self.uses = network, choices, uses
        self.tried = n  # images of the trial that the choices come from
        self.module: Module | None = None  # the model itself, where it was seen to be faster
        self.step: Step | None = None  # last layer and reverse step in one, where that pays
        device, columns = network.time.weight.device, network.time.weight.shape[0]
        self.rows = torch.zeros(n, dtype=torch.int64, device=device)
        self.own_table = torch.zeros(n, columns, device=device)
        self.own_rows = torch.arange(n, device=device)
        time = network.time
        self.label_rows = None if time.labels is None else torch.full_like(self.rows, time.null_label or 0)
        size = (n, network.in_channels, h, w)
        self._both = torch.zeros(size, device=device) if network.self_condition else None  # [x_self_cond | x]
        self._bounds = joined(bounds)
        self._separate, self._before_last = bounds, list[Bound]()

    def fed(self, x: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        """What `run` takes of images x (n, C, h, w): float32, contiguous, after what the network is conditioned on."""
        if self._both is None:
            return x.detach().to(torch.float32).contiguous()
        before, images = self._both.chunk(2, dim=1)
        images.copy_(x)
        if x_self_cond is None:
            before.zero_()
        else:
            before.copy_(x_self_cond)
        return self._both

    def run(self, x: Tensor, out: Tensor, time_table: Tensor, time_rows: Tensor) -> None:
        """x, as `fed` gives it, and out: float32 (n, C, h, w) contiguous, each with its own C, not the same memory."""
        frame = Frame(x, out, time_table, time_rows, self.network.time.added_labels, self.label_rows)
        for bound in self._bounds:
            bound(frame)

    def run_all_but_last(self, x: Tensor, time_table: Tensor, time_rows: Tensor) -> None:
        """What comes before `step`, which does the rest."""
        if not self._before_last:
            self._before_last = joined(self._separate[:-1])
        frame = Frame(x, x, time_table, time_rows, self.network.time.added_labels, self.label_rows)
        for bound in self._before_last:
            bound(frame)

    @property
    def program(self) -> native.Run | None:
        """The one call that a step of this plan is, where it is one."""
        (first, *more) = self._bounds
        return first if isinstance(first, native.Run) and not more and self.module is None else None

    def __str__(self) -> str:
        head = f"{self.n} images of {self.h} x {self.w}, activations in {self.dtype}, {len(self._bounds)} calls a step"
        if self.step is not None:
            head += ", last layer and reverse step in one"
        if self.module is not None:
            head += f"; not used: the model as it is was faster, in {self.module.dtype}"
        if self.tried != self.n and any(us is not None for _, us in self.choices[0].times):
            head += f"; measured with {self.tried} images"
        lines, width = [head], max(len(ranking.layer) for ranking in self.choices)
        for ranking in self.choices:
            shown = [name if us is None else f"{name} {us:.0f} us" for name, us in ranking.times]
            others = f"   ({', '.join(shown[1:])})" if len(shown) > 1 else ""
            lines.append(f"  {ranking.layer:<{width}} {shown[0]}{others}")
        measured = [us for us in (ranking.times[0][1] for ranking in self.choices) if us is not None]
        if measured:
            lines.append(f"  {'sum':<{width}} {sum(measured):.0f} us")
        return "\n".join(lines)


def joined(bounds: list[Bound]) -> list[Bound]:
    """The same work with every run of neighbouring native layers as one call."""
    result: list[Bound] = []
    together: list[native.NativeLayer] = []
    for bound in bounds:
        if isinstance(bound, native.NativeLayer):
            together.append(bound)
            continue
        if together:
            result.append(native.Run(together))
            together = []
        result.append(bound)
    return [*result, native.Run(together)] if together else result


def signature(layer: Layer, place: Place) -> tuple[object, ...]:
    """What a layer's speed depends on, besides the machine."""
    views = (place.source, place.target, place.pooled, place.residual)
    strides = tuple(None if view is None else view.stride(2) for view in views)
    extra: tuple[object, ...] = ()
    if isinstance(layer, Conv):
        extra = (layer.silu, layer.temb is not None, layer.resample, layer.padding)
    elif isinstance(layer, Norm):
        extra = (layer.groups, layer.silu, layer.modulation is not None)
    elif isinstance(layer, RMSNorm):
        extra = (layer.silu, layer.modulation is not None, layer.residual is not None)
    elif isinstance(layer, (Attention, LinearAttention)):
        extra = (layer.source.channels, layer.heads)
    shapes = tuple(tuple(tensor.shape) for tensor in tensors_of(layer)[:1])
    return (type(layer).__name__.lower(), shapes, *extra, place.n, place.h, place.w, *strides)
