"""What a figure was measured on: machine, versions, commit; and what the machine can do at the most."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain import cast
from timing import interleaved_rounds

import ddpm_fast
from ddpm_fast.backends import native
from ddpm_fast.demo.report import cpu_name

PACKAGES = ("torch", "triton", "openvino", "diffusers", "numpy")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Of git, or of the variable DDPM_FAST_COMMIT where the tree was copied without its history."""
    told = os.environ.get("DDPM_FAST_COMMIT", "unknown")
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return told
    return head + (" with changes" if changed.strip() else "")


def _driver() -> str:
    """Version of the NVIDIA driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = ""
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)", text)
    if found:
        return found[1]
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told[0] if told else "unknown"


def _cpu_features() -> list[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    flags = set(re.findall(r"\b(?:avx2|avx512f|avx512_bf16|avx512_fp16|amx_bf16|amx_fp16|asimd|bf16|sve)\b", text))
    return sorted(flags)


def facts(device: torch.device) -> dict[str, Any]:
    """Everything that identifies a run, JSON-ready."""
    isas = getattr(native._C, "inference_isas", None)
    result: dict[str, Any] = {
        "device": device.type,
        "cpu": cpu_name(),
        "cpu_features": _cpu_features(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "inference_isas": [list(isa) for isa in isas()] if isas is not None else [],
        "isa_mask": os.environ.get("DDPM_FAST_CPU_ISA", ""),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "ddpm_fast": ddpm_fast.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "versions": {package: _version(package) for package in PACKAGES},
    }
    if device.type == "cuda":
        result["gpu"] = torch.cuda.get_device_name(device)
        result["cuda"] = torch.version.cuda
        result["cudnn"] = torch.backends.cudnn.version()
        result["driver"] = _driver()
    return result


def slug(machine: dict[str, Any]) -> str:
    """A file name for results of this kind of machine."""
    name = machine["gpu"] if machine["device"] == "cuda" else f"{machine['cpu']} {machine['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def peaks(device: torch.device, weight_bytes: int = 2**26, budget: float = 1.0) -> dict[str, float]:
    """What this machine does at the most, measured now.

    bfloat16, float32: FLOP/s of the best of two matrix products and a convolution (a multiply-add is two). On a GPU
    float32 is TF32.
    read: bytes a second of reading a buffer of `weight_bytes`, as a step at batch 1 reads the weights: on a CPU again
    and again, on a GPU from its memory, none of it in the L2 cache.
    """
    result = {}
    edge, images = (8192, 512) if device.type == "cuda" else (1536, 32)
    for dtype in (torch.bfloat16, torch.float32):
        works: list[tuple[float, Callable[[], object]]] = []
        for m, k, n in [(edge, edge, edge), (2 * edge, edge // 2, edge)]:
            a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(k, n, device=device).to(dtype)
            works.append(
                (2.0 * m * k * n, functools.partial(torch.mm, a, b, out=torch.empty(m, n, dtype=dtype, device=device)))
            )
        conv = cast(torch.nn.Conv2d(256, 256, 3, padding=1, device=device), dtype)
        x = torch.randn(images, 256, 16, 16, device=device).to(dtype, memory_format=torch.channels_last)
        works.append((2.0 * images * 256 * 9 * 256 * 16 * 16, functools.partial(conv, x)))
        with torch.inference_mode():
            rounds = [(flop, interleaved_rounds({"work": work}, device, budget=budget / 6)) for flop, work in works]
        result[str(dtype).removeprefix("torch.")] = max(flop / min(times["work"]) for flop, times in rounds)
    buffer = torch.ones(weight_bytes // 4, device=device)
    matrix, vector = buffer[: len(buffer) // 4096 * 4096].view(-1, 4096), torch.ones(4096, device=device)
    reads = {"sum": lambda: buffer.sum(), "mv": lambda: torch.mv(matrix, vector)}
    times = interleaved_rounds(reads, device, budget=budget / 4)
    result["read"] = 4 * buffer.numel() / min(min(values) for values in times.values())
    return result


def progress(text: str) -> None:
    """What is being done, for whoever waits: standard error, so that tables stay clean."""
    print(text, file=sys.stderr, flush=True)
