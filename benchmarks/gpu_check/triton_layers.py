"""The launches of the plan's Triton layers that are compiled and read one by one: the first choices of a plan for some
layers of the U-Nets, launched as the plan would. Whole plans are in triton_plans.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_fast.backends.triton import aot
from ddpm_fast.backends.triton.conv_output import Output as OutputLaunch
from ddpm_fast.inference.candidate import Frame, Packs, Place
from ddpm_fast.inference.gpu_layers import listed
from ddpm_fast.inference.network import Buffer, Conv, Linear, Norm, RMSNorm, Slice, Up

from .triton_jobs import Job
from .triton_ops import meta

GPUS = {90: (132, 90), 80: (108, 80)}
"""Multiprocessors and capability of an H100 and of an A100."""

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16

# (name, images, side of the source, channels, columns, kind, dtype, capability); names are those of the U-Nets' layers.
LAYERS = [
    ("down1.conv1", 64, 32, 3, 64, "temb", BF16, 90),
    ("down2.conv1", 64, 16, 64, 128, "temb", BF16, 90),
    ("down2.conv2", 64, 16, 128, 128, "pooled", BF16, 90),
    ("conv_up3.conv1", 512, 8, 512, 256, "temb", BF16, 90),
    ("conv_up1.conv1", 64, 32, 128, 64, "temb", F16, 90),
    ("bottleneck.conv1", 64, 2, 512, 1024, "temb", BF16, 90),
    ("up1", 64, 16, 128, 64, "up", BF16, 90),
    ("down4.conv1 of one image", 1, 4, 256, 512, "temb", BF16, 90),
    ("down2.conv1 in float32", 64, 16, 64, 128, "temb", F32, 90),
    ("down2.conv1", 64, 16, 64, 128, "temb", BF16, 80),
    ("down2.conv2", 64, 16, 128, 128, "pooled", BF16, 80),
    ("down_blocks.0.resnets.0.conv2", 64, 32, 128, 128, "residual", BF16, 90),
    ("down_blocks.3.resnets.0.conv2 of one image", 1, 4, 256, 256, "residual", BF16, 90),
    ("up_blocks.2.upsamplers.0.conv", 64, 16, 256, 256, "doubled", BF16, 90),
    ("mid_block.attentions.0.to_qkv", 64, 4, 256, 768, "linear", BF16, 90),
    ("down_blocks.1.attentions.0.to_out", 64, 16, 256, 256, "linear residual", F16, 90),
    ("down_blocks.0.resnets.0.conv2 in float32", 64, 32, 128, 128, "residual", F32, 90),
    ("down_blocks.0.resnets.0.conv2", 64, 32, 128, 128, "residual", BF16, 80),
    ("up_blocks.2.upsamplers.0.conv", 64, 16, 256, 256, "doubled", BF16, 80),
]


def launches(
    n: int, side: int, channels: int, columns: int, kind: str, dtype: torch.dtype, capability: int
) -> list[tuple[str, list[aot.Specialisation]]]:
    """The first choice for a layer, by name, and what it launches; where that joins the parts of its sum, the next one,
    too, which leaves them to a second kernel."""
    scale = 2 if kind in ("up", "doubled") else 1
    buffer = Buffer("b", 2 * columns, 0)
    image = channels < 16
    source = None if image else meta(n, side, side, channels, dtype=dtype)
    target = meta(n, scale * side, scale * side, 2 * columns, dtype=dtype)[..., columns:]
    residual = meta(n, side, side, 3 * columns, dtype=dtype)[..., :columns] if "residual" in kind else None
    added = None if residual is None else Slice(buffer, 0, columns)
    layer: Conv | Up | Linear
    if kind == "up":
        layer = Up("up", meta(channels, columns, 2, 2), meta(columns), Slice(buffer, 0, channels), Slice(buffer, 0, 1))
    elif kind.startswith("linear"):
        places = Slice(buffer, 0, channels), Slice(buffer, columns, columns)
        layer = Linear("linear", meta(columns, channels), meta(columns), *places, residual=added)
    else:
        layer = Conv(
            "conv",
            meta(columns, channels, 3, 3),
            meta(columns),
            None if image else Slice(buffer, 0, channels),
            Slice(buffer, columns, columns),
            temb=64 if kind == "temb" else None,
            pooled=Slice(buffer, 0, columns) if kind == "pooled" else None,
            silu=kind in ("temb", "pooled"),
            residual=added,
            resample="up" if kind == "doubled" else "none",
        )
    pooled = meta(n, side // 2, side // 2, columns, dtype=dtype) if kind == "pooled" else None
    place = Place(n, side, side, dtype, torch.device("meta"), source, target, pooled, 2944, Packs(), residual)
    images = meta(n, channels, side, side)
    rows = meta(n, dtype=torch.int64)
    first, *others = listed(layer, n, side, side, dtype, *GPUS[capability])
    result = []
    for candidate in [first, *(others[:1] if first.name.endswith("joined") else [])]:
        with aot.recorded() as found:
            candidate.prepare(layer, place)(Frame(images, images, meta(1000, 2944), rows))
        result.append((candidate.name, found))
    return result


def norm(side: int, channels: int, modulated: bool, dtype: torch.dtype) -> aot.Specialisation:
    """The first choice for a norm of the paper's U-Net, of part of a buffer."""
    part = Slice(Buffer("b", 2 * channels, 0), 0, channels)
    layer = Norm(*("norm", meta(channels), meta(channels), part, part, 32, 1e-6), modulation=64 if modulated else None)
    source, target = (
        meta(64, side, side, 2 * channels, dtype=dtype)[..., :channels],
        meta(64, side, side, channels, dtype=dtype),
    )
    place = Place(64, side, side, dtype, torch.device("meta"), source, target, None, 2944, Packs())
    images = meta(64, 3, 32, 32)
    with aot.recorded() as found:
        candidate = listed(layer, 64, side, side, dtype, *GPUS[90])[0]
        candidate.prepare(layer, place)(Frame(images, images, meta(1000, 2944), meta(64, dtype=torch.int64)))
    return found[0]


def rms_norm(n: int, side: int, channels: int, added: bool, dtype: torch.dtype, choice: int = 0) -> aot.Specialisation:
    """A choice for a norm of lucidrains' U-Net, of part of a buffer: with a residual, or modulated."""
    part = Slice(Buffer("b", 2 * channels, 0), 0, channels)
    options = {"residual": part} if added else {"modulation": 64}
    layer = RMSNorm("norm", meta(channels), part, part, 1e-12, **options)
    source, residual, target = (meta(n, side, side, k * channels, dtype=dtype)[..., :channels] for k in (2, 2, 1))
    place = Place(
        *(n, side, side, dtype, torch.device("meta"), source, target, None, 2944, Packs()), residual if added else None
    )
    images = meta(n, 3, 32, 32)
    with aot.recorded() as found:
        candidate = listed(layer, n, side, side, dtype, *GPUS[90])[choice]
        candidate.prepare(layer, place)(Frame(images, images, meta(1000, 2944), meta(n, dtype=torch.int64)))
    return found[0]


def output(step: bool, side: int = 1) -> list[aot.Specialisation]:
    """The last layer of the U-Nets in bfloat16, side x side, alone or with the reverse step."""

    def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return meta(*shape, dtype=dtype)

    channels = 64 if side == 1 else 128
    weight = meta(3, channels, side, side).to(memory_format=torch.channels_last)
    last = OutputLaunch(meta(64, 32, 32, channels, dtype=BF16), weight, meta(3))
    x = meta(64, 3, 32, 32)
    with aot.recorded() as found:
        if step:
            table = (meta(1000, 8), integers(1000, dtype=torch.int32), integers(1))
            last.step(x, *table, integers(2), integers(1, dtype=torch.int32), None)
        else:
            last(x)
    return found


def cases() -> Iterator[tuple[str, str, int, aot.Specialisation]]:
    for name, *layer in LAYERS:
        for chosen, found in launches(*layer):
            for launch in found:
                reduces = launch.kernel.fn.__name__ == "_reduce_kernel"
                how = ", joined" if chosen.endswith("joined") else ", the parts added" if reduces else ""
                yield name + how, chosen, layer[-1], launch
    for name, step in (("output", False), ("output with the step", True)):
        yield name, "triton", 90, output(step)[0]
    yield "norm", "triton", 90, norm(32, 128, False, BF16)
    yield "norm of groups of twelve, modulated", "triton", 90, norm(16, 384, True, F16)
    yield "norm in float32", "triton", 90, norm(32, 128, False, F32)
    yield "rms norm", "triton", 90, rms_norm(64, 32, 64, False, BF16)
    yield "rms norm in programs of 8 warps", "triton", 90, rms_norm(64, 32, 64, False, BF16, 1)
    yield "rms norm and residual", "triton", 90, rms_norm(64, 16, 128, True, F16)
    yield "rms norm of many channels and residual", "triton", 90, rms_norm(64, 4, 2048, True, BF16)
    yield "rms norm in float32", "triton", 90, rms_norm(1, 8, 384, False, F32)
    yield "conv_out", "triton", 90, output(False, side=3)[0]


def jobs() -> list[Job]:
    """All of them."""
    result = []
    for name, chosen, capability, launch in cases():
        target = launch.signature.get("target_ptr")
        dtype = {"*bf16": "bf16", "*fp16": "f16"}.get(str(target), "f32")
        result.append(Job("layers", name, dtype, capability, launch, used=[chosen]))
    return result
