"""Launches of Triton kernels that were recorded, compiled for GPUs that are not there, several at a time, and read."""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

from ddpm_fast.backends.triton.aot import Specialisation

from . import cubin
from .kernels import Kernel
from .sass import Code

INEXACT = (r"\.f64", r"\bfma\.", r"div\.full", r"\.approx", r"\.ftz")
"""What PTX must not have where every operation is rounded by itself."""

ACCESS = re.compile(r"tt\.(?:load|store) .*tensor<\d+x\d+x!tt\.ptr<f32>, (#\w+)>")
"""Which thread has which element in an access of float32 images, in Triton's own language."""

BATCH = 12
"""Kernels that a process compiles between two reports: they go through the disassembler together."""


@dataclass
class Job:
    """A launch to compile, and what is promised of the kernel: see `Kernel`."""

    part: str
    name: str
    dtype: str
    capability: int
    launch: Specialisation
    wide_loads: list[int] = field(default_factory=list)
    wide_stores: list[int] = field(default_factory=list)
    narrow: list[int] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.part}: {self.name} {self.dtype} sm_{self.capability}"


def elements(launch: Specialisation) -> int | None:
    """Elements that a thread computes, of the ops; None for kernels that multiply matrices."""
    constants = launch.constants
    if "BLOCK_Q" in constants:
        count = 4 * constants["BLOCK_N"] * constants["BLOCK_Q"]
    elif "BLOCK_W" in constants:
        count = constants["BLOCK_R"] * constants["BLOCK_W"]
    elif "BLOCK_P" in constants and "BLOCK_C" in constants:
        count = constants.get("BLOCK_G", 1) * constants["BLOCK_C"] * constants["BLOCK_P"]
    else:
        return None
    return max(1, count // (32 * launch.options["num_warps"]))


def given(launch: Specialisation, pointer: str) -> bool:
    """Whether a launch has this array, which it may do without."""
    return launch.signature.get(pointer, "constexpr") != "constexpr"


def stores(launch: Specialisation) -> dict[str, Any]:
    """What a program of a plan's layer stores, as fields of `Kernel`."""
    rows, columns = launch.constants.get("BLOCK_M"), launch.constants.get("BLOCK_N")
    if rows is None or columns is None:
        return {}
    parts = launch.kernel.fn.__name__ == "_conv_kernel" and given(launch, "partial_ptr")
    joined = parts and given(launch, "count_ptr")
    own = not parts or joined
    size = 4 if launch.signature["target_ptr"] == "*fp32" else 2
    return {
        "tile": [rows, columns],
        "stored": [*([4] if parts else []), *([size] if own else [])],
        "pooled": own and given(launch, "pooled_ptr"),
        "residual": own and given(launch, "residual_ptr"),
        "joined": joined,
        "copies": copies(launch),
    }


def copies(launch: Specialisation) -> int:
    """`Kernel.copies`: both operands of a pass, for each pass in flight and for those in the loop."""
    constants = launch.constants
    if launch.kernel.fn.__name__ != "_conv_kernel" or constants.get("KIND") == "first":
        return 0
    size = 4 if launch.signature["source_ptr"] == "*fp32" else 2
    operands = (constants["BLOCK_M"] + constants["BLOCK_N"]) * constants["BLOCK_K"] * size
    return int(operands // (16 * 32 * launch.options["num_warps"]) * launch.options["num_stages"])


def kernel_of(job: Job, made: Any, code: Code) -> Kernel:
    """Everything that is judged, of one compiled kernel."""
    launch, ptx = job.launch, made.asm["ptx"]
    registers, stack = cubin.resources(made.asm["cubin"])

    def total(prefix: str) -> int:
        return sum(count for word, count in code.opcodes.items() if word.startswith(prefix))

    function = launch.kernel.fn.__name__
    half = launch.signature.get("target_ptr") in ("*bf16", "*fp16")
    return Kernel(
        part=job.part,
        name=job.name,
        function=function,
        dtype=job.dtype,
        capability=job.capability,
        threads=32 * launch.options["num_warps"],
        registers=registers,
        shared=made.metadata.shared,
        stack=stack,
        spills=code.count("(LDL|STL)"),
        spills_in_loops=code.repeated("(LDL|STL)"),
        hgmma=total("HGMMA"),
        hmma=total("HMMA"),
        memory={word: n for word, n in code.opcodes.items() if word.startswith(("LDG", "STG"))},
        instructions=sum(code.opcodes.values()),
        fused=code.count("FFMA"),
        elements=elements(launch),
        inexact={word: n for word in INEXACT if (n := len(re.findall(word, ptx)))},
        # Approximate functions are for what is then rounded to half precision; the last layer's is float32.
        exact=job.part == "ops" or not half,
        wide_loads=job.wide_loads,
        wide_stores=job.wide_stores,
        narrow=job.narrow,
        layouts=len(set(ACCESS.findall(made.asm["ttgir"]))),
        blocks=[launch.constants.get("BLOCK_N"), launch.constants.get("BLOCK_Q")],
        kind=launch.constants.get("KIND"),
        used=job.used,
        **stores(launch),
    )


def inspected(jobs: Sequence[Job]) -> tuple[list[Kernel], list[str]]:
    """The jobs' kernels, and a line for each that does not compile."""
    done, failures = [], []
    for job in jobs:
        try:
            done.append((job, job.launch.compile(job.capability, **job.options)))
        except Exception as error:  # of many kinds, from several compilers
            failures.append(f"{job}: does not compile: {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
    codes = cubin.read([(job.capability, made.asm["cubin"]) for job, made in done])
    return [kernel_of(job, made, code) for (job, made), code in zip(done, codes, strict=True)], failures


_jobs: Sequence[Job] = ()
"""What the processes work on: they are forked, for a kernel cannot be sent to another process."""


def _batch(first: int) -> tuple[list[Kernel], list[str]]:
    return inspected(_jobs[first : first + BATCH])


def compile_all(
    jobs: Sequence[Job], processes: int, until: float, found: Callable[[list[Kernel], list[str]], None]
) -> int:
    """Compiles in order, in so many processes, and hands over what comes; starts nothing after `until`
    (time.monotonic()). How many were started."""
    global _jobs
    _jobs, begun = jobs, 0
    running: set[Future[tuple[list[Kernel], list[str]]]] = set()
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        while running or begun < len(jobs):
            while begun < len(jobs) and len(running) < 2 * processes and time.monotonic() < until:
                running.add(pool.submit(_batch, begun))
                begun += BATCH
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                try:
                    found(*future.result())
                except BrokenProcessPool:
                    found([], [f"a compiler crashed at one of the jobs before number {min(begun, len(jobs))}"])
                    return min(begun, len(jobs))
            if time.monotonic() >= until and not running:
                break
    return min(begun, len(jobs))
