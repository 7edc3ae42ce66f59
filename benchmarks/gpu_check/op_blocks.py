"""The rates of elementwise ops by backend, and by how much of a tensor a program of the Triton kernels takes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from cases import CASES, Inputs
from timing import Timing, interleaved_rounds

import ddpm_fast
from ddpm_fast.backends import unavailable_reason

from .clock import setting

OPS = ("ddpm_step", "q_sample", "normal")


def op_blocks(
    device: torch.device, elements: int, dtype: torch.dtype, quads: tuple[int, ...], budget: float
) -> dict[str, Any]:
    """Bytes a second of the elementwise ops: C++ or CUDA, and Triton by quads of elements per program. ValueError where
    two of them differ in a bit."""
    variants: dict[str, Callable[[Callable[[], object]], object]] = {}
    if unavailable_reason("native", device) is None:

        def native(work: Callable[[], object]) -> object:
            with ddpm_fast.use_backend("native"):
                return work()

        variants["native"] = native
    if unavailable_reason("triton", device) is None:
        from ddpm_fast.backends.triton import launch

        def triton(work: Callable[[], object], size: int) -> object:
            with (
                ddpm_fast.use_backend("triton"),
                setting(launch, "QUADS_FEW", size),
                setting(launch, "QUADS_MANY", size),
            ):
                return work()

        variants |= {f"triton {size}": functools.partial(triton, size=size) for size in quads}
    per_sample = 16 * 32 * 32  # of an Inputs
    result: dict[str, Any] = {"elements": elements, "dtype": str(dtype).removeprefix("torch."), "ops": {}}
    for case in (case for case in CASES if case.name in OPS):
        first: torch.Tensor | None = None
        for name, variant in variants.items():
            small = Inputs.make(3, dtype, device)
            made = variant(functools.partial(case.fast, small))
            got = made if isinstance(made, torch.Tensor) else made[0] if isinstance(made, tuple) else small.noise
            first = got.clone() if first is None else first
            if not torch.equal(got, first):
                raise ValueError(f"{case.name} by {name} differs from {next(iter(variants))}")
        inputs = Inputs.make(max(1, elements // per_sample), dtype, device)
        moved = case.bytes_per_element(inputs.x.element_size()) * inputs.x.numel()
        runs = {name: functools.partial(v, functools.partial(case.fast, inputs)) for name, v in variants.items()}
        rounds = interleaved_rounds(runs, device, budget=budget)
        result["ops"][case.name] = {name: moved / Timing.of(values).median for name, values in rounds.items()}
    return result
