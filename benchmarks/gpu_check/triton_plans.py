"""The launches of whole plans: every Triton candidate of every layer of a network, as a trial on a GPU would launch it.

The network and its activations are on the meta device, so a batch of 512 costs nothing. Launches that Triton would
compile to the same kernel are one job, which keeps where it is used.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast.backends.triton import aot
from ddpm_fast.backends.triton.conv_output import Output as OutputLaunch
from ddpm_fast.inference import gpu_layers, gpu_library
from ddpm_fast.inference.candidate import Frame, Packs
from ddpm_fast.inference.known import read
from ddpm_fast.inference.network import Output
from ddpm_fast.inference.plan import places, signature

from .triton_jobs import Job
from .triton_layers import GPUS

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tutorial": ddpm_fast.UNet,
    "paper": ddpm_fast.nn.DDPMUNet,
    "lucidrains": lambda: ddpm_fast.nn.RMSNormUNet(64),
}
SIDE = 32


@dataclass(frozen=True)
class Plan:
    """One of the plans whose kernels are compiled."""

    network: str
    n: int
    dtype: str
    capability: int

    def __str__(self) -> str:
        return f"{self.network} N={self.n} {self.dtype}"


USUAL = [("bf16", 64), ("bf16", 1), ("bf16", 512), ("bf16", 16), ("f32", 64)]
FURTHER = [("bf16", 4), ("bf16", 128), ("bf16", 256), ("f32", 1), ("f32", 16), ("f32", 512), ("f16", 1), ("f16", 64)]
"""Of every network, most important first: what is always compiled, and what --all adds."""

SMALLEST = [Plan("tutorial", 1, "bf16", 90), Plan("tutorial", 64, "bf16", 80)]
"""For a rehearsal."""


def plans(everything: bool = False) -> list[Plan]:
    """In the order in which they are compiled: Hopper first, then the networks by size."""
    sizes = USUAL + (FURTHER if everything else [])
    order = itertools.product(GPUS, sizes, NETWORKS)
    return [Plan(network, n, dtype, capability) for capability, (dtype, n), network in order]


def kernel_key(launch: aot.Specialisation) -> tuple[Any, ...]:
    """Equal for launches that Triton compiles to the same kernel."""
    parts = (launch.signature, launch.constants, launch.options)
    sorted_parts = tuple(tuple(sorted((name, str(value)) for name, value in part.items())) for part in parts)
    return (launch.kernel.fn.__name__, *sorted_parts, str(sorted(launch.attributes.items())))


def recorded(network: Any, plan: Plan) -> Iterator[tuple[str, aot.Specialisation]]:
    """(layer and candidate, launch) of all that the trial of this plan would run, layers of one shape once."""
    dtype, device = DTYPES[plan.dtype], torch.device("meta")
    spots = places(network, plan.n, SIDE, SIDE, dtype, device, Packs())
    x = torch.empty(plan.n, network.in_channels, SIDE, SIDE, device=device)
    out = torch.empty(plan.n, network.out_channels, SIDE, SIDE, device=device)
    table = torch.empty(1000, len(network.time.weight), device=device)
    frame = Frame(x, out, table, torch.empty(plan.n, dtype=torch.int64, device=device))
    seen = set()
    for layer, place in zip(network.layers, spots, strict=True):
        mark = signature(layer, place)
        if mark in seen:
            continue
        seen.add(mark)
        own = gpu_layers.listed(layer, plan.n, place.h, place.w, dtype, *GPUS[plan.capability])
        for candidate in [*own, *gpu_library.listed(layer, plan.n, place.h, place.w)]:
            with aot.recorded() as launches:
                candidate.prepare(layer, place)(frame)
            for launch in launches:
                yield f"{layer.name} ({candidate.name})", launch
        if isinstance(layer, Output) and layer.weight.shape[-1] == 1:
            assert place.source is not None
            with aot.recorded() as launches:
                last_with_step(OutputLaunch(place.source, layer.weight, layer.bias), plan.n, network.image_channels)
            yield f"{layer.name} (with the step)", launches[0]


def last_with_step(last: OutputLaunch, n: int, channels: int) -> None:
    """Runs the last layer and the reverse step in one."""

    def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, table = (torch.empty(shape, device="meta") for shape in ((n, channels, SIDE, SIDE), (1000, 8)))
    row, bad_row = integers(1), integers(1, dtype=torch.int32)
    last.step(x, table, integers(1000, dtype=torch.int32), row, integers(2), bad_row, None)


def jobs(wanted: Sequence[Plan]) -> list[Job]:
    """The kernels of these plans, each once, in their order."""
    networks: dict[str, Any] = {}
    for name in {plan.network for plan in wanted}:
        with torch.device("meta"):
            networks[name] = read(NETWORKS[name]().eval())
    result: dict[tuple[Any, ...], Job] = {}
    for plan in wanted:
        for name, launch in recorded(networks[plan.network], plan):
            key = (plan.capability, kernel_key(launch))
            if key not in result:
                result[key] = Job("plans", f"{plan.network} {name}", plan.dtype, plan.capability, launch)
            if str(plan) not in result[key].used:
                result[key].used.append(str(plan))
    return list(result.values())
