"""Our own C++ layers as candidates, and neighbours of them joined into one `_C.Program`, so that a call runs many."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..backends import native as extension
from .candidate import Candidate, Frame, Place, pixel_stride
from .network import Attention, Conv, Down, Layer, Linear, LinearAttention, Norm, Output, RMSNorm, Up

ISA_VARIABLE = "DDPM_FAST_CPU_ISA"
STORED = {torch.bfloat16: "bf16", torch.float32: "f32"}
TRIED_ISAS = {"bf16": 2, "f32": 1}  # best first; a matrix unit does not win everywhere, wider vectors do
MULTIPLE = 16  # of channels, the image's own apart
KINDS = ("point", "window", "winograd", "direct")
CHUNK_BYTES = 1 << 20  # of a thread, that a layer should read and write before the next one comes
Product = Conv | Up | Down | Linear | Output  # layers that multiply by packed weights
Address = tuple[int, int]  # of a view's first pixel, and elements from pixel to pixel
ONLY_AT = {"point": (1, 1), "window": (2, 2)}  # pixels of an image


def available() -> bool:
    """Whether the extension is there and has inference layers. (One built from an older version has none.)"""
    return extension._C is not None and hasattr(extension._C, "Program")


def isas(dtype: torch.dtype | None = None) -> list[str]:
    """The instruction sets with which this CPU runs layers that store `dtype` (None: any), best first.

    The environment variable DDPM_FAST_CPU_ISA leaves out what is better than the one that it names.
    """
    if not available():
        return []
    found: list[tuple[str, str]] = extension._C.inference_isas()
    return [name for name, stored in found if dtype is None or stored == STORED.get(dtype)]


def isa_mask() -> str:
    """What DDPM_FAST_CPU_ISA says now; part of what a measurement depends on."""
    return os.environ.get(ISA_VARIABLE, "")


@dataclasses.dataclass(frozen=True)
class Native:
    """One kind of layer, compiled for one instruction set."""

    kind: str
    isa: str

    @property
    def name(self) -> str:
        return f"{self.kind} {self.isa}"

    def prepare(self, layer: Layer, place: Place) -> NativeLayer:
        return NativeLayer(self.kind, self.isa, layer, place)


def candidates(layer: Layer, n: int, h: int, w: int, dtype: torch.dtype, device: torch.device) -> list[Candidate]:
    """What can serve this layer here, in the order in which `deterministic` takes them. h, w: of its source."""
    if device.type != "cpu" or any(count % MULTIPLE for count in _own_channels(layer)):
        return []
    kinds = _kinds(layer, h, w)
    return [Native(kind, isa) for isa in isas(dtype)[: TRIED_ISAS.get(STORED.get(dtype, ""), 0)] for kind in kinds]


def _own_channels(layer: Layer) -> tuple[int, ...]:
    """All channel counts of a layer but the image's."""
    ends = (layer.source, None if isinstance(layer, Output) else layer.target)
    return tuple(end.channels for end in ends if end is not None)


def _kinds(layer: Layer, h: int, w: int) -> list[str]:
    match layer:
        case Conv(resample="up"):
            return ["doubled"]
        case Conv(resample="down"):
            return ["strided"] if layer.padding or min(h, w) > 1 else []
        case Conv(source=None) if layer.weight.shape[-1] == 7:
            return ["first7x7"]
        case Conv():
            if layer.pooled is not None and (h % 2 or w % 2):
                return []
            kinds = ["first"] if layer.source is None else list(KINDS)
            return [kind for kind in kinds if ONLY_AT.get(kind, (h, w)) == (h, w)]
        case Down():
            return [] if h % 2 or w % 2 else ["down"]
        case LinearAttention() if layer.target.channels % (MULTIPLE * layer.heads):
            return []
        case Output():
            return ["output" if layer.weight.shape[-1] == 1 else "output3x3"]
        case _:
            return [type(layer).__name__.lower()]


class NativeLayer:
    """A layer bound to its buffers: a call of its own, or part of a longer `Program` through `add`."""

    def __init__(self, kind: str, isa: str, layer: Layer, place: Place) -> None:
        self.kind, self.isa, self.layer, self.place = kind, isa, layer, place
        self.packed: Tensor | None = None
        if not isinstance(layer, (Norm, RMSNorm, Attention, LinearAttention)):
            self.packed = place.packs.get(layer, (kind, isa), functools.partial(_pack, kind, isa, layer))
        self._own: Run | None = None

    def bytes_of_image(self) -> int:
        """What it reads and writes for one image, weights and the image itself apart."""
        views = (self.place.source, self.place.target, self.place.residual)
        return sum(view[0].numel() * view.element_size() for view in views if view is not None)

    def add(self, program: Any, images: slice = slice(None)) -> None:
        """Appends this layer to a `_C.Program`, for some of the images only if asked to."""
        layer, place = self.layer, _of_images(self.place, images)
        size = (place.n, place.h, place.w)
        source, target, residual = _where(place.source), _where(place.target), _where(place.residual)
        channels = 0 if isinstance(layer, Output) else layer.target.channels
        match layer:
            case Attention():
                what = (channels, layer.heads, layer.scale, *_memory(layer))
                program.attention(self.isa, place.n, place.h * place.w, *what, *source, *target)
            case LinearAttention():
                what = (channels, layer.heads, layer.scale, *_memory(layer))
                program.linear_attention(self.isa, place.n, place.h * place.w, *what, *source, *target)
            case RMSNorm():
                affine = (layer.weight.data_ptr(), layer.silu, *_columns(layer))
                program.rms_norm(self.isa, *size, channels, layer.eps, *source, *affine, *residual, *target)
            case Norm():
                weights = (layer.weight.data_ptr(), layer.bias.data_ptr(), layer.silu, *_columns(layer))
                program.norm(self.isa, *size, channels, layer.groups, layer.eps, *source, *weights, *target)
            case _:
                self._add_product(layer, program, place)

    def _add_product(self, layer: Product, program: Any, place: Place) -> None:
        assert self.packed is not None
        source, target, residual = _where(place.source), _where(place.target), _where(place.residual)
        out, c = _channels(layer)
        size = (place.n, place.h, place.w, c, out)
        what = (self.kind, self.isa, *size, *source, self.packed.data_ptr(), layer.bias.data_ptr())
        match layer:
            case Conv():
                temb = -1 if layer.temb is None else layer.temb
                program.conv(*what, layer.silu, temb, layer.padding, *target, *_where(place.pooled), *residual)
            case Output():
                program.output(*what)
            case _:
                program.pixelwise(*what, *target, *residual)

    def __call__(self, frame: Frame) -> None:
        if self._own is None:
            self._own = Run([self])
        self._own(frame)


def _of_images(place: Place, images: slice) -> Place:
    """The place of these images alone."""
    if images == slice(None):
        return place

    def part(view: Tensor | None) -> Tensor | None:
        return None if view is None else view[images]

    ends = (part(place.source), part(place.target), part(place.pooled))
    n, residual = images.stop - images.start, part(place.residual)
    return Place(n, place.h, place.w, place.dtype, place.device, *ends, place.columns, place.packs, residual)


def _columns(layer: Norm | RMSNorm) -> tuple[int, int]:
    """The first columns of scale and shift in the time table; -1, -1 for none."""
    first = layer.modulation
    return (-1, -1) if first is None else (first, first + layer.target.channels)


def _memory(layer: Attention | LinearAttention) -> tuple[int, int, int]:
    """Where the memory's keys and values are, and how many tokens it has; zeros for none."""
    if layer.memory is None:
        return (0, 0, 0)
    keys, values = layer.memory
    return keys.data_ptr(), values.data_ptr(), keys.shape[-1 if isinstance(layer, LinearAttention) else -2]


def _channels(layer: Product) -> tuple[int, int]:
    """(out, in); a transposed convolution keeps its weight the other way round."""
    first, second = layer.weight.shape[:2]
    return (second, first) if isinstance(layer, Up) else (first, second)


def _pack(kind: str, isa: str, layer: Product) -> Tensor:
    """The layer's weights as that kind of layer reads them. Holds on to nothing but the layer: it outlives plans."""
    out, c = _channels(layer)
    packed = torch.zeros(extension._C.packed_bytes(kind, isa, out, c), dtype=torch.uint8)
    assert packed.data_ptr() % 64 == 0, "torch aligns its allocations on a CPU to 64 bytes"
    extension._C.pack(kind, isa, out, c, layer.weight.data_ptr(), packed.data_ptr(), torch.get_num_threads())
    return packed


def _where(view: Tensor | None) -> Address:
    """Address and pixel stride; 0, 0 for none."""
    return (0, 0) if view is None else (view.data_ptr(), pixel_stride(view))


def chunked(layers: list[NativeLayer], threads: int) -> Iterator[tuple[NativeLayer, slice]]:
    """The order of work: each layer, and for which images.

    Layers whose activations do not stay in the caches until the next layer reads them are not run one after the other
    for all images, but all of them for the first few images, then for the next. Bits do not depend on it.
    """
    for _, group in itertools.groupby(layers, lambda layer: (layer.place.h, layer.place.w)):
        alike = list(group)
        n = alike[0].place.n
        parts = -(-n * max(layer.bytes_of_image() for layer in alike) // (CHUNK_BYTES * max(threads, 2)))
        parts = min(parts, n // threads) if len(alike) > 1 else 1  # every thread finds an image to work on
        if parts <= 1:
            yield from ((layer, slice(None)) for layer in alike)
            continue
        for i in range(parts):
            yield from ((layer, slice(n * i // parts, n * (i + 1) // parts)) for layer in alike)


class Run:
    """Neighbouring native layers as one program. Keeps alive what the program has only the addresses of."""

    def __init__(self, layers: list[NativeLayer]) -> None:
        self.layers = layers
        self._program = extension._C.Program(layers[0].place.columns)
        for layer, images in chunked(layers, torch.get_num_threads()):
            self._program.from_image(images.start or 0)
            layer.add(self._program, images)

    def __call__(self, frame: Frame) -> None:
        label_table, label_rows = frame.label_table, frame.label_rows
        self._program.run(
            frame.x.data_ptr(),
            frame.out.data_ptr(),
            frame.time_table.data_ptr(),
            frame.time_rows.data_ptr(),
            0 if label_table is None else label_table.data_ptr(),
            0 if label_rows is None else label_rows.data_ptr(),
            torch.get_num_threads(),
        )

    def step(
        self,
        x: Tensor,
        m: Tensor,
        time_table: Tensor,
        label_table: Tensor | None,
        label_rows: Tensor | None,
        steps: tuple[Tensor, Tensor],
        row: Tensor,
        rng: Tensor,
        bad_row: Tensor,
        x0_out: Tensor | None,
    ) -> Callable[[], None]:
        """A whole sampling step on static tensors, as one call: m = network(x); x = ddpm_step(x, m, row); row += 1.

        With one image, between two steps 64 MB of weights have gone through the caches, and Python's part of a step
        is read from memory again: the less of it the better. The tensors are the caller's to keep alive.
        """
        table, t_of_row = steps
        return functools.partial(
            self._program.step,
            x.data_ptr(),
            m.data_ptr(),
            time_table.data_ptr(),
            0 if label_table is None else label_table.data_ptr(),
            0 if label_rows is None else label_rows.data_ptr(),
            x.shape[0],
            x.shape[1],
            x.shape[2] * x.shape[3],
            table.data_ptr(),
            t_of_row.data_ptr(),
            table.shape[0],
            row.data_ptr(),
            rng.data_ptr(),
            0 if x0_out is None else x0_out.data_ptr(),
            bad_row.data_ptr(),
            torch.get_num_threads(),
        )
