"""Whose sampling is measured: networks, samplers and sizes, the real ones and those of a rehearsal."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from networks import NETWORKS
from plain import cast

from ddpm_fast import Sampler, Schedule
from ddpm_fast.sampling import graphs

Shape = tuple[int, int, int]
T, SEED = 1000, 7
TUTORIAL, PAPER, LUCIDRAINS = "tutorial", "ddpm-cifar10-32", "lucidrains"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is done. profiled: (n, steps) of a profile; eager: steps of one without graphs; runs: seeds and restarts
    with so many steps; timed: (network, n); options: of a network."""

    shape: Shape
    profiled: tuple[int, int]
    eager: int
    steps: int
    among: int
    distance: int
    timed: tuple[tuple[str, int], ...]
    timed_steps: int
    options: dict[str, dict[str, Any]]


REAL = Sizes(
    shape=(3, 32, 32),
    profiled=(64, 20 * graphs.STRIDE + 5),
    eager=20,
    steps=200,
    among=64,
    distance=50,
    timed=((TUTORIAL, 64), (TUTORIAL, 1), (TUTORIAL, 512), (PAPER, 64), (PAPER, 1), (TUTORIAL, 16)),
    timed_steps=T,
    options={},
)
TINY = Sizes(
    shape=(3, 8, 8),
    profiled=(2, 12),
    eager=3,
    steps=4,
    among=18,
    distance=4,
    timed=((TUTORIAL, 2), (PAPER, 1)),
    timed_steps=4,
    options={
        TUTORIAL: {"width": 16, "depth": 2},
        PAPER: {
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        LUCIDRAINS: {"dim": 16, "dim_mults": (1, 2), "attn_dim_head": 16},
    },
)


class Loops:
    """The samplers of one run of this module, on its device; made when they are asked for."""

    def __init__(self, device: torch.device, sizes: Sizes) -> None:
        self.device, self.sizes = device, sizes
        self._made: dict[Any, Any] = {}
        self._samplers: dict[bool, Sampler] = {}

    def network(self, name: str = TUTORIAL, **options: Any) -> Any:
        """In float32 and eval mode."""
        key = (name, *sorted(options.items()))
        if key not in self._made:
            made = NETWORKS[name].make(self.sizes.shape, **self.sizes.options.get(name, {}), **options)
            self._made[key] = made.to(self.device).eval()
        return self._made[key]

    def sampler(
        self, network: Any, *, fused: bool = True, dtype: torch.dtype = torch.bfloat16, **choices: Any
    ) -> Sampler:
        """Without a plan the network itself is cast."""
        model = network if fused or dtype == torch.float32 else cast(copy.deepcopy(network), dtype)
        sampler = Sampler(model, Schedule.linear(T), fused=fused, dtype=dtype, **choices)
        if fused and not sampler.fused:
            raise RuntimeError(f"no fused plan for the network: {sampler.not_fused_because}")
        return sampler

    def usual(self, *, fused: bool, graphed: bool) -> Sampler:
        """That of the tutorial's network in bfloat16, made once with a plan and once without."""
        if fused not in self._samplers:
            self._samplers[fused] = self.sampler(self.network(), fused=fused)
        return self._samplers[fused] if graphed else without_graphs(self._samplers[fused])

    def start(self, n: int, steps: int) -> dict[str, Any]:
        """What makes `Sampler.sample` do the last so many of the T steps."""
        x = torch.randn(n, *self.sizes.shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        return {"n": n, "x": x, "start": T - steps, "seed": SEED, "progress": False}


def without_graphs(sampler: Sampler) -> Sampler:
    """A sampler with the same plans that launches every kernel of every step by itself."""
    twin = copy.copy(sampler)
    twin._loops = graphs.Loops(False)
    return twin
