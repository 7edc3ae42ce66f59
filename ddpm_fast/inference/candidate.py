"""What an implementation of a layer looks like to the plan: listed, prepared for a place, checked, timed, kept or not.

    for candidate in candidates(layer, n, h, w, dtype, device):
        run = candidate.prepare(layer, place)      # weights packed, arguments bound; once per plan
        run(frame)                                 # every step; launches only, no host sync, no host-side wait

A library implementation is `ddpm_fast.inference.library`, our own C++ `native`, our Triton kernels `gpu`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from .network import Layer


@dataclasses.dataclass(eq=False)
class Frame:
    """What one run of a plan is given, besides its own static buffers. Every field may change from run to run.

    x: the images, float32 (n, C, h, w) contiguous; of a self-conditioned network [x0 of the step before | images].
    out: where m goes, likewise, with its own channels.
    time_table: float32 [rows, columns], contiguous, a row per timestep, the embeddings of all blocks side by side.
    time_rows: int64 [n], the row of image i, on the device. label_table, label_rows: the same for what the class of
    image i adds, or both None.
    """

    x: Tensor
    out: Tensor
    time_table: Tensor
    time_rows: Tensor
    label_table: Tensor | None = None
    label_rows: Tensor | None = None

    def temb(self, first: int, count: int) -> Tensor:
        """Columns first .. first + count of every image's time (and class) embedding: float32 [n, count]."""
        temb = self.time_table.narrow(1, first, count).index_select(0, self.time_rows)
        if self.label_table is not None and self.label_rows is not None:
            temb += self.label_table.narrow(1, first, count).index_select(0, self.label_rows)
        return temb


PackName = tuple[str, Hashable]


class Packs:
    """Everything derived from weights, kept once per (layer, key) however many plans use it.

    Tensors stay where they are for good: `refresh` recomputes them in place, so bound calls and captured graphs see
    new weights. Hence whatever an implementation derives from `layer.weight` it must get here; `layer.weight` and
    `layer.bias` themselves are also rewritten in place and may be used as they are. The one exception: opaque oneDNN
    tensors cannot be rewritten; who packs into one asks for it at every run.
    """

    def __init__(self) -> None:
        self._kept: dict[PackName, tuple[Callable[[], Tensor], Tensor]] = {}
        self._used: set[PackName] = set()

    def get(self, layer: Layer, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """make(), or what it returned for this layer and key before. make: reads the layer's tensors anew each time."""
        name = (layer.name, key)
        self._used.add(name)
        if name not in self._kept:
            self._kept[name] = (make, make())
        return self._kept[name][1]

    @contextlib.contextmanager
    def recording(self) -> Iterator[set[PackName]]:
        """The names asked for inside, collected in the set that it gives."""
        before, self._used = self._used, set()
        try:
            yield self._used
        finally:
            self._used = before

    def refresh(self) -> None:
        """Computes every tensor again from the layers' present weights, in place."""
        for name, (make, packed) in self._kept.items():
            if packed.is_mkldnn:
                self._kept[name] = (make, make())
            else:
                packed.copy_(make())

    def keep(self, names: set[PackName]) -> None:
        """Forgets all others; their memory goes once nobody uses it."""
        self._kept = {name: kept for name, kept in self._kept.items() if name in names}

    def __len__(self) -> int:
        return len(self._kept)


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """Where a layer works in one plan: n images of h x w pixels, and the static buffers that it reads and writes.

    h, w: of the layer's source; an Up writes 2h x 2w, a Down h/2 x w/2, a Conv that resamples other sizes, too.
    source, target: views [n, height, width, channels] of channels-last buffers, stride 1 over channels and the BUFFER's
    channels over pixels, dtype `dtype`. source None: the layer reads frame.x. target None (Output): it writes
    frame.out. pooled: [n, h/2, w/2, channels], also to be written, or None. columns: of the time table. residual: in
    the target's shape, to be added, or None.
    """

    n: int
    h: int
    w: int
    dtype: torch.dtype
    device: torch.device
    source: Tensor | None
    target: Tensor | None
    pooled: Tensor | None
    columns: int
    packs: Packs
    residual: Tensor | None = None


Bound = Callable[[Frame], None]


class Candidate(Protocol):
    """One implementation of a layer."""

    @property
    def name(self) -> str:
        """Short and unique among the layer's candidates, e.g. "winograd avx512_bf16"; shown by `describe`."""
        ...

    def prepare(self, layer: Layer, place: Place) -> Bound:
        """Packs weights and binds arguments. It or the first run may raise RuntimeError, ValueError or
        NotImplementedError to say that it cannot serve this place (resources, a missing op): it is then left out.
        """
        ...


def pixel_stride(view: Tensor) -> int:
    """Elements between neighbouring pixels of a [n, h, w, c] view of a Place: the channels of its buffer."""
    return view.stride(2)
