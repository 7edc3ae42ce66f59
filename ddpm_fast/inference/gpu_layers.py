"""The layers of a network in the hands of the Triton kernels: see gpu.py. Importing this needs Triton."""

from __future__ import annotations

import dataclasses
from typing import TypeGuard

import torch

from ..backends.triton.conv_call import MAX_PIXELS, Tile, first_terms, pack
from ..backends.triton.conv_call import Conv as ConvLaunch
from ..backends.triton.conv_output import MAX_OUTPUTS
from ..backends.triton.conv_output import Output as OutputLaunch
from ..backends.triton.norm import Norm as NormLaunch
from ..backends.triton.rms_norm import RMSNorm as RMSNormLaunch
from .candidate import Bound, Candidate, Frame, Place
from .gpu_tiles import pixel_blocks, spans, tiles, with_joined
from .network import Conv, Layer, Linear, Norm, Output, RMSNorm, Up

TILES = 4
"""Configurations listed per layer. The tutorial U-Net has about 60 different kernels then, half a second of compilation
each the first time on a machine; Triton keeps them on disk."""

WINDOW_IMAGES = 16
"""Fewer, and the dense matrix of the 2x2 level, 1.8 times the weights, takes longer to read than it saves."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def listed(
    layer: Layer, n: int, h: int, w: int, dtype: torch.dtype, multiprocessors: int, capability: int
) -> list[Candidate]:
    """`gpu.candidates` for a GPU described by its numbers."""
    if dtype not in DTYPES or capability < 80:
        return []
    if not serves(layer):
        return []
    if isinstance(layer, Output):
        outputs, channels = layer.weight.shape[:2]
        return [TritonOutput()] if channels % 16 == 0 and outputs <= MAX_OUTPUTS else []
    if isinstance(layer, Norm):
        channels = layer.source.channels
        return [TritonNorm(*found) for found in spans(channels, layer.groups)] if channels % 16 == 0 else []
    if isinstance(layer, RMSNorm):
        channels = layer.source.channels
        return [TritonRMSNorm(*found) for found in pixel_blocks(channels, h * w)] if channels % 16 == 0 else []
    up = isinstance(layer, Up)
    columns, channels = layer.weight.shape[up], layer.weight.shape[not up]
    image, doubled = layer.source is None, isinstance(layer, Conv) and layer.resample == "up"
    rows = n * h * w
    if columns % 16 or (channels % 16 and not image) or rows * (4 if up or doubled else 1) > MAX_PIXELS:
        return []
    if image:
        k = first_terms(channels)
        return [TritonConv("first", Tile(m, 32 if columns % 64 else 64, k, stages=1)) for m in (128, 64, 32)]

    def of(kind: str, rows: int, taps: int, quarters: int) -> list[Candidate]:
        # Where every row is another image, their embeddings take as many registers as the sums.
        largest = 64 * 128 if kind in ("window", "point") else 128 * 128
        found = tiles(rows, columns, quarters, channels, taps, dtype, multiprocessors, capability, TILES, largest)
        return [TritonConv(kind, tile) for tile in with_joined(found)]

    if isinstance(layer, Up):
        return of("up", rows, 1, 4)
    if isinstance(layer, Linear):
        return of("linear", rows, 1, 1)
    if doubled:
        return of("doubled", rows, 4, 4)
    if h == w == 1:
        return of("point", n, 1, 1)
    dense = h == w == 2 and n >= WINDOW_IMAGES and layer.pooled is None
    return [*(of("window", n, 4, 4) if dense else []), *of("conv", rows, 9, 1)]


def serves(layer: Layer) -> TypeGuard[Conv | Up | Linear | Norm | RMSNorm | Output]:
    """What these kernels compute: no stride of 2, no 7x7, no attention."""
    if isinstance(layer, Conv):
        if layer.weight.shape[-1] != 3:
            return False
        return layer.resample == "none" or (layer.resample == "up" and layer.source is not None)
    return isinstance(layer, (Up, Linear, Norm, RMSNorm, Output))


@dataclasses.dataclass(frozen=True)
class TritonConv:
    """A Conv, an Up or a Linear by one configuration. kind: one of backends/triton/conv_call.py's."""

    kind: str
    tile: Tile

    @property
    def name(self) -> str:
        return f"triton {self.kind + ' ' if self.kind in ('doubled', 'window', 'point') else ''}{self.tile}"

    def prepare(self, layer: Layer, place: Place) -> Bound:
        assert place.target is not None
        assert isinstance(layer, (Conv, Up, Linear))
        convolution = layer if isinstance(layer, Conv) else None
        kind, dtype = self.kind, place.dtype  # what is kept must not hold on to the place, which goes
        packed = place.packs.get(layer, ("triton", kind, dtype), lambda: pack(kind, layer.weight, dtype))
        launch = ConvLaunch(
            self.kind,
            place.source,
            packed,
            layer.bias,
            place.target,
            self.tile,
            pooled=place.pooled,
            residual=place.residual,
            silu=convolution is not None and convolution.silu,
            first_column=None if convolution is None else convolution.temb,
            channels=layer.weight.shape[1],
        )

        def run(frame: Frame) -> None:
            launch(frame.x, frame.time_table, frame.time_rows, frame.label_table, frame.label_rows)

        return run


@dataclasses.dataclass(frozen=True)
class TritonNorm:
    """A Norm by programs of `span` channels and at most `warps` warps."""

    span: int
    warps: int

    @property
    def name(self) -> str:
        return f"triton {self.span} x {self.warps} warps"

    def prepare(self, layer: Layer, place: Place) -> Bound:
        assert place.source is not None
        assert place.target is not None
        assert isinstance(layer, Norm)
        launch = NormLaunch(
            place.source,
            layer.weight,
            layer.bias,
            place.target,
            layer.groups,
            layer.eps,
            self.span,
            self.warps,
            silu=layer.silu,
            first_column=layer.modulation,
        )

        def run(frame: Frame) -> None:
            launch(frame.time_table, frame.time_rows, frame.label_table, frame.label_rows)

        return run


@dataclasses.dataclass(frozen=True)
class TritonRMSNorm:
    """An RMSNorm by programs of `pixels` pixels and `warps` warps."""

    pixels: int
    warps: int

    @property
    def name(self) -> str:
        return f"triton {self.pixels} pixels x {self.warps} warps"

    def prepare(self, layer: Layer, place: Place) -> Bound:
        assert place.source is not None
        assert place.target is not None
        assert isinstance(layer, RMSNorm)
        launch = RMSNormLaunch(
            place.source,
            layer.weight,
            place.target,
            layer.eps,
            self.pixels,
            self.warps,
            silu=layer.silu,
            first_column=layer.modulation,
            residual=place.residual,
        )

        def run(frame: Frame) -> None:
            launch(frame.time_table, frame.time_rows, frame.label_table, frame.label_rows)

        return run


@dataclasses.dataclass(frozen=True)
class TritonOutput:
    """The last layer, its products in float32 whatever the activations are stored in."""

    name: str = "triton"

    def prepare(self, layer: Layer, place: Place) -> Bound:
        assert place.source is not None
        assert isinstance(layer, Output)
        # channels_last; of a 1x1 layer that is the weight itself.
        weight = place.packs.get(layer, "triton", lambda: layer.weight.contiguous(memory_format=torch.channels_last))
        launch = OutputLaunch(place.source, weight, layer.bias)

        def run(frame: Frame) -> None:
            launch(frame.out)

        return run
