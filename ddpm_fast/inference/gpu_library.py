"""PyTorch's convolutions on a GPU, cuDNN's, with all that follows in one pass of ours. Importing this needs Triton.

What a library offers costs two passes more: bias, activation and embedding into a new tensor, then that to its place.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from ..backends.triton.conv_call import MAX_PIXELS
from ..backends.triton.epilogue import Epilogue
from .candidate import Bound, Candidate, Frame, Place
from .library import resampled, stride_of
from .library_parts import source_of, weight_of
from .network import Conv, Layer


def listed(layer: Layer, n: int, h: int, w: int) -> list[Candidate]:
    """A Conv of any kind, where its epilogue can serve it. h, w: of its source."""
    if not isinstance(layer, Conv) or layer.weight.shape[0] % 16:
        return []
    return [CudnnConv()] if n * h * w * (4 if layer.resample == "up" else 1) <= MAX_PIXELS else []


@dataclasses.dataclass(frozen=True)
class CudnnConv:
    """A convolution by PyTorch, its sums rounded once to the plan's dtype in between."""

    name: str = "conv2d, then triton"

    def prepare(self, layer: Layer, place: Place) -> Bound:
        assert isinstance(layer, Conv)
        assert place.target is not None
        conv, source, weight = layer, source_of(layer, place), weight_of(layer, place)
        finish = Epilogue(
            layer.bias,
            place.target,
            pooled=place.pooled,
            residual=place.residual,
            silu=layer.silu,
            first_column=layer.temb,
        )

        def run(frame: Frame) -> None:
            y = F.conv2d(resampled(source(frame), conv), weight, stride=stride_of(conv), padding=conv.padding)
            sums = y.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1)  # a copy only if need be
            finish(sums, frame.time_table, frame.time_rows, frame.label_table, frame.label_rows)

        return run
