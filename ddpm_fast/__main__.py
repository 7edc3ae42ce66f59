"""python -m ddpm_fast: what was built, which backend serves which op on which device here, and why not otherwise."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

import ddpm_fast
from ddpm_fast import backends
from ddpm_fast.backends import native
from ddpm_fast.inference import native as layers
from ddpm_fast.ops._schema import SCHEMAS


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def build_lines() -> list[str]:
    """What the compiled extension is, one fact a line."""
    if native._C is None:
        return [f"extension: missing - {native.unavailable_reason(torch.device('cpu'))}"]
    info = native._C.build_info()
    lines = [f"extension: {native._C.__file__}", f"  compiler: {info['compiler']}", f"  {inference_line()}"]
    if not info["cuda"]:
        return [*lines, "  CUDA half: not built (no nvcc at build time, or DDPM_FAST_CUDA=OFF)"]
    driver = info["cuda_driver"] or "none found"
    return [
        *lines,
        f"  CUDA half: runtime {info['cuda_runtime']}, architectures {info['cuda_architectures']}",
        f"  NVIDIA driver: supports CUDA {driver}; devices: {info['cuda_devices']}",
        *([f"  CUDA is not usable: {info['cuda_error']}"] if info["cuda_error"] else []),
    ]


def inference_line() -> str:
    """By which instruction sets fused networks run on this CPU."""
    if not layers.available():
        return "fused networks on this CPU: by PyTorch's own operators; the extension has no layers for them here"
    mask = f"; {layers.ISA_VARIABLE}={layers.isa_mask()} leaves out better ones" if layers.isa_mask() else ""
    try:
        return f"fused networks on this CPU: {', '.join(layers.isas())} (the first is the best){mask}"
    except ValueError as error:
        return f"fused networks on this CPU: {error}"


def devices() -> list[torch.device]:
    """The devices to report on: the CPU, and CUDA whether it works or not."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.device("cuda", index) for index in range(count)]
    return [torch.device("cpu"), *(gpus or [torch.device("cuda")])]


def serving(device: torch.device) -> tuple[str, dict[str, str]]:
    """The backend that serves float32 ops on ``device``, and for each other one why it cannot (if it cannot)."""
    reasons = {name: backends.unavailable_reason(name, device) for name in backends.BACKENDS}
    if device.type == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        why = (
            f"torch {torch.__version__} is a CPU build; install a CUDA build of torch"
            if built is None
            else f"torch was built for CUDA {built}, but finds no usable NVIDIA GPU; check the driver with nvidia-smi"
        )
        return "none", dict.fromkeys(backends.BACKENDS, why)
    first = next(name for name in backends.ORDER if reasons[name] is None)
    return first, {name: reason for name, reason in reasons.items() if reason is not None}


def report() -> str:
    """The whole report as text."""
    lines = [
        f"ddpm_fast {ddpm_fast.__version__}",
        f"Python {platform.python_version()} on {platform.platform()}",
        f"torch {torch.__version__} (CUDA {torch.version.cuda or 'not included'}, {torch.get_num_threads()} threads)",
        f"triton {_version('triton')}",
        *build_lines(),
        "",
    ]
    requested = backends._requested
    for device in devices():
        first, reasons = serving(device)
        lines.append(f"{device}:")
        if first != "none":
            chosen = requested if requested is not None and requested not in reasons else first
            able = [name for name in backends.BACKENDS if name not in reasons]
            lines.append(f"  served by {chosen}: {', '.join(SCHEMAS)}")
            lines.append(f"  available: {', '.join(able)} (choose with ddpm_fast.use_backend or DDPM_FAST_BACKEND)")
        by_reason: dict[str, list[str]] = {}
        for name, reason in reasons.items():
            by_reason.setdefault(reason, []).append(name)
        lines += [f"  not {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    if requested is not None:
        lines.append(f"asked for by {backends.ENVIRONMENT_VARIABLE} or use_backend: {requested}")
    lines.append("float64 tensors are always served by reference.")
    return "\n".join(lines)


def main() -> int:
    """Print the report; the exit code is 0 when the extension is there."""
    print(report())
    return 0 if native._C is not None else 1


if __name__ == "__main__":
    sys.exit(main())
