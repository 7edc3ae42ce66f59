"""Launches Triton kernels through Triton's own machinery for an H100 that is not there: everything runs but the driver,
which a stand-in replaces that notes what it is asked to launch. Prints what happened as JSON, for test_triton_jit.py.

A process of its own, because kernels decorated under TRITON_INTERPRET=1 cannot be compiled.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import max_shared_mem
from triton.runtime import driver

from ddpm_fast.backends import triton as ops
from ddpm_fast.backends.triton import aot
from ddpm_fast.backends.triton.conv_call import Tile
from ddpm_fast.backends.triton.epilogue import Epilogue
from ddpm_fast.inference import gpu
from ddpm_fast.inference.candidate import Frame, Packs, Place
from ddpm_fast.inference.gpu_layers import TritonConv
from ddpm_fast.inference.network import Buffer, Linear, Slice

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from gpu_check import cubin

CPU = torch.device("cpu")


class Launcher:
    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = metadata.name
        launchers.append(self.name)

    def __call__(self, *arguments: Any) -> None:
        x, y, z, stream = arguments[:4]
        launched.append({"kernel": self.name, "grid": [x, y, z], "stream": stream})


class Utilities:
    shared = 232448

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.shared}


class Driver:
    launcher_cls = Launcher
    utils = Utilities()
    stream = 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream


launched: list[dict[str, Any]] = []
launchers: list[str] = []
compiled: list[str] = []
driver.set_active(Driver())
triton.knobs.runtime.jit_post_compile_hook = lambda **found: compiled.append(found["fn"].name)


def happened() -> dict[str, Any]:
    result = {"compiled": list(compiled), "launched": list(launched), "launchers": list(launchers)}
    for noted in (compiled, launched, launchers):
        noted.clear()
    return result


def place() -> tuple[Linear, Place, Frame]:
    parts = Slice(Buffer("a", 64, 0), 0, 64), Slice(Buffer("b", 32, 0), 0, 32)
    layer = Linear("linear", torch.zeros(32, 64), torch.zeros(32), *parts)
    source, target = torch.zeros(2, 8, 8, 64).bfloat16(), torch.zeros(2, 8, 8, 32).bfloat16()
    images = torch.zeros(2, 3, 8, 8)
    frame = Frame(images, images, torch.zeros(1, 1), torch.zeros(2, dtype=torch.int64))
    return layer, Place(2, 8, 8, torch.bfloat16, CPU, source, target, None, 1, Packs()), frame


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def epilogue(pooled: bool) -> dict[str, Any]:
    """What follows a convolution of 64 images of 32 x 32, compiled: registers, spills, and its accesses to memory."""
    target = meta(64, 32, 32, 128, dtype=torch.bfloat16)[..., 64:]
    top = meta(64, 16, 16, 64, dtype=torch.bfloat16) if pooled else None
    finish = Epilogue(meta(64), target, pooled=top, silu=True, first_column=64)
    with aot.recorded() as found:
        y = meta(64, 32, 32, 64, dtype=torch.bfloat16)
        finish(y, meta(1000, 2944), meta(64, dtype=torch.int64))
    made = found[0].compile(90).asm["cubin"]
    registers, stack = cubin.resources(made)
    counts = cubin.read([(90, made)])[0].opcodes
    spills = stack + sum(count for word, count in counts.items() if word.startswith(("LDL", "STL")))
    memory = {word: count for word, count in counts.items() if word.startswith(("LDG", "STG"))}
    return {"registers": registers, "spills": spills, "memory": memory}


def main() -> dict[str, Any]:
    result: dict[str, Any] = {"epilogue": epilogue(pooled=False), "pooled epilogue": epilogue(pooled=True)}
    layer, where, frame = place()
    candidates = [TritonConv("linear", Tile(m, 32, 64)) for m in (16, 32)]
    candidates.append(TritonConv("linear", Tile(16, 32, 48)))  # refuses
    alike = [layer, layer], [where, where]
    gpu.compile_ahead(*alike, frame, lambda layer, place: candidates, ["alike", "alike"])
    result["ahead"] = happened()
    for candidate in candidates[:2]:
        candidate.prepare(layer, where)(frame)
    result["after"] = happened()

    rng, out = torch.zeros(2, dtype=torch.int64), torch.zeros(8 * 64 + 1)
    for stream, first in ((7, 0), (8, 0), (8, 1)):  # the last one is not aligned to 16 bytes
        Driver.stream = stream
        ops.normal(out[first : first + 8 * 64].view(8, 64), rng, 2**31)
        result[f"stream {stream} from {first}"] = happened()

    Utilities.shared = 1024
    max_shared_mem.cache_clear()
    try:
        TritonConv("linear", Tile(32, 32, 32)).prepare(layer, where)(frame)
    except RuntimeError as error:
        result["error"] = str(error)
    return result


if __name__ == "__main__":
    print(json.dumps(main()))
