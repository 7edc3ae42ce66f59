"""Implementations on NVIDIA GPUs: the kernels in backends/triton/conv.py, epilogue.py, norm.py, rms_norm.py and
conv_output.py.

    triton 128x64x64 split 2   convolution (3x3, 1x1, transposed) as implicit GEMM, by the tile of a program
    triton 16x64x64 split 8 joined   the same, the parts of the sum added by the last program of a tile
    triton doubled 128x64x64   3x3 of the image with doubled pixels: 16 products for four pixels in place of 36
    triton window 64x64x64     2x2 images, 4 in -> 4 out as one dense matrix: no products with padding
    triton point 16x64x64      1x1 images: the centre tap alone
    conv2d, then triton        PyTorch's convolution, then bias, SiLU, embedding, residual and maximum in one pass
    triton 32 x 16 warps       GroupNorm, SiLU and modulation in one pass, by the channels of a program
    triton 32 pixels x 4 warps RMSNorm, modulation, SiLU and residual in one pass, by the pixels of a program
    triton                     the last layer in float32

Channels (but an image's) have to be multiples of 16. Nothing here was measured; per layer a few configurations are
listed, and the trial checks each one and takes the fastest of all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from ..backends import triton as backend
from .candidate import Candidate, Frame, Place
from .network import Layer, Output

Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], None]


def candidates(layer: Layer, n: int, h: int, w: int, dtype: torch.dtype, device: torch.device) -> list[Candidate]:
    """What can serve this layer on this device, most promising first; nothing where Triton has no GPU to run on."""
    if device.type != "cuda" or backend.unavailable_reason(device) is not None:
        return []
    from . import gpu_layers, gpu_library

    found = gpu_layers.listed(layer, n, h, w, dtype, *processors(device))
    return [*found, *gpu_library.listed(layer, n, h, w)]


def compile_ahead(
    layers: Sequence[Layer],
    places: Sequence[Place],
    frame: Frame,
    listed: Callable[[Layer, Place], list[Candidate]],
    marks: Sequence[Hashable],
) -> None:
    """Compiles what a trial of these arguments would, all at once: one by one, when each is first run, takes minutes.

    listed: of ours only, for others would be run. What cannot serve is passed over: the trial will say so.
    """
    from ..backends.triton.launch import compiling_ahead

    different = {mark: (layer, place) for layer, place, mark in zip(layers, places, marks, strict=True)}
    with compiling_ahead() as can:
        for layer, place in different.values() if can else ():
            for candidate in listed(layer, place):
                with contextlib.suppress(RuntimeError, ValueError, NotImplementedError):
                    candidate.prepare(layer, place)(frame)


@functools.cache
def processors(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, and its capability as 80, 90, ..."""
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def output_step(layer: Output, place: Place) -> Step | None:
    """The last layer and the reverse step in one pass: step(x, table, t_of_row, row, rng, bad_row, x0_out).

    In place of `TritonOutput` followed by ``ops.ddpm_step`` and with the same result, see backends/triton/
    conv_output.py. For runs without guidance, given noise and thresholding, whose batch is one chunk. None where it
    cannot serve: another device, a 3x3 layer, channels that are no multiple of 16, sides whose product is no multiple
    of 4.
    """
    if place.device.type != "cuda" or backend.unavailable_reason(place.device) is not None or place.h * place.w % 4:
        return None
    if layer.weight.shape[-1] != 1:
        return None
    from ..backends.triton.conv_output import Output as Launch
    from .gpu_layers import listed

    if not listed(layer, place.n, place.h, place.w, place.dtype, *processors(place.device)):
        return None
    assert place.source is not None
    return Launch(place.source, layer.weight, layer.bias).step
