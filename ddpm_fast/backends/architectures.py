"""Which GPUs the extension serves, and why not others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def unserved_reason(built: str, capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability cannot run what was compiled for `built`, as CMake names architectures
    ("80-real 90"); None where it can.
    """
    major, minor = capability
    for architecture in built.split():
        number, _, kind = architecture.partition("-")
        if not number.isdecimal():  # "native" or "all"
            return None
        lowest = int(number)
        # Machine code serves later GPUs of its generation; PTX, which "-real" leaves out, all later ones.
        if 10 * major + minor >= lowest and (kind != "real" or lowest // 10 == major):
            return None
    return (
        f"the extension was compiled for {built}, and this GPU has compute capability {major}.{minor}; reinstall with "
        f"CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES={10 * major + minor} in the environment"
    )


def unusable_reason(info: Mapping[str, Any]) -> str | None:
    """Why the CUDA half of an extension with this `build_info` runs on no GPU here; None where it does."""
    if not info["cuda"]:
        return "the extension was built without CUDA; put nvcc on PATH and reinstall with DDPM_FAST_CUDA=ON"
    if info["cuda_error"]:
        return (
            f"the CUDA half (runtime {info['cuda_runtime']}) cannot use this machine's GPU "
            f"(driver for CUDA {info['cuda_driver'] or 'missing'}): {info['cuda_error']}; "
            "update the NVIDIA driver, or rebuild with an older CUDA toolkit"
        )
    return None
