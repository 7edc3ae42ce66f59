"""Compiles kernels that are wrong on purpose and prints as JSON what rules.py says of each, and which launches the
stage knows of. For test_gpu_check_static.py; a process of its own, for under TRITON_INTERPRET=1 nothing can be compiled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from gpu_check import rules, triton_jobs, triton_layers, triton_ops, triton_plans
from gpu_check.triton_jobs import Job
from gpu_check.triton_ops import meta

from ddpm_fast.backends.triton import aot
from ddpm_fast.backends.triton import conv_call as conv


def layer(name: str, tile: conv.Tile, dtype: torch.dtype, stride: int = 64) -> Job:
    """A convolution of 64 channels of a buffer of `stride`."""
    source, target = meta(64, 16, 16, stride, dtype=dtype)[..., :64], meta(64, 16, 16, 128, dtype=dtype)
    weight = meta(9 * 64, 128, dtype=dtype)
    with aot.recorded() as found:
        conv.Conv("conv", source, weight, meta(128), target, tile)(None)
    return Job("plans", name, "f32" if dtype == torch.float32 else "bf16", 90, found[0])


@triton.jit
def _conv_kernel(
    source_ptr, weight_ptr, target_ptr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    m, n, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    a = tl.load(source_ptr + m[:, None] * BLOCK_K + k[None, :]).to(tl.float32)
    b = tl.load(weight_ptr + n[:, None] * BLOCK_K + k[None, :]).to(tl.float32)
    acc = tl.sum(a[:, None, :] * b[None, :, :], axis=2)
    tl.store(target_ptr + m[:, None] * BLOCK_N + n[None, :], acc.to(tl.bfloat16))


@triton.jit
def _exp_kernel(x_ptr, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr):
    i = tl.arange(0, 4 * BLOCK_N * BLOCK_Q)
    tl.store(x_ptr + i, tl.exp(tl.load(x_ptr + i)))


def of(kernel: Any, part: str, name: str, *args: Any, **constants: Any) -> Job:
    """A launch of one of those above."""
    options = {"num_warps": 4, "enable_fp_fusion": False, **constants}
    return Job(part, name, "f32", 90, aot.specialisation(kernel, args, options))


def faults() -> dict[str, Job]:
    """By what is wrong with them."""
    half = [meta(4096, dtype=torch.bfloat16) for _ in range(3)]
    fine, *_ = cases = triton_ops.jobs()
    odd = next(job for job in cases if job.name == "normal_odd_size")
    odd.wide_stores = [4]
    fused = Job(fine.part, fine.name, fine.dtype, fine.capability, fine.launch, options={"enable_fp_fusion": True})
    return {
        "nothing": layer("fine", conv.Tile(64, 64, 64), torch.bfloat16),
        "spills": layer("spills", conv.Tile(128, 128, 32), torch.float32),
        "fused": fused,
        "narrow operands": layer("narrow", conv.Tile(64, 64, 64), torch.bfloat16, stride=72),
        "narrow stores": odd,
        "no tensor cores": of(
            _conv_kernel, "plans", "by hand", *half, BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, num_stages=3
        ),
        "approximate": of(_exp_kernel, "ops", "exp", meta(4096), BLOCK_N=8, BLOCK_Q=128),
        "too much shared memory": layer("deep", conv.Tile(128, 128, 64, stages=9), torch.bfloat16),
    }


def recorded(jobs: Callable[[], list[Job]]) -> list[tuple[str, int]]:
    """(kernel, capability) of every launch."""
    return sorted({(job.launch.kernel.fn.__name__, job.capability) for job in jobs()})


if __name__ == "__main__":
    planted = faults()
    kernels, failures = triton_jobs.inspected(list(planted.values()))
    assert not failures, failures
    launches = [*recorded(triton_ops.jobs), *recorded(triton_layers.jobs)]
    plans = triton_plans.jobs(triton_plans.plans())
    launches += recorded(lambda: plans)
    found = {name: rules.problems(kernel) for name, kernel in zip(planted, kernels, strict=True)}
    print(json.dumps({"problems": found, "launches": launches, "plans": [[job.name, job.used] for job in plans]}))
