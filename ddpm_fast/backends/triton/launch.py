"""The one place where Triton kernels are launched, and the choice of grid and block sizes."""

import contextlib
import math
import os
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from ddpm_fast.backends.layout import Layout

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernels run in Triton's interpreter (on CPU tensors): decided when they are decorated, for the whole
process."""

NUM_WARPS = 4
"""Of 32 threads, in every program: the sizes below say what a thread gets."""

QUADS_FEW, QUADS_MANY, MANY = 128, 512, 1 << 17
"""Quads of four elements per program on a GPU, for fewer and for at least MANY quads in all. Each access of a
thread is one quad of float32 (128 bits) or two of a half-width type.

With 512 a thread has 16 elements: what it does once (coefficients, key, addresses) is a tenth of its instructions
instead of a third, and four independent accesses to each array hide the memory's latency. With 128 it has 4, so that
a small tensor is spread over as many processors as possible; 2^17 quads are then 1024 programs, several for each
processor of a large GPU."""

INTERPRETED_QUADS = 1 << 15
"""The interpreter takes about 0.4 ms per program whatever its size, so programs are large there. Tests lower it."""

OVERLAP = os.environ.get("DDPM_FAST_OVERLAP") == "1"
"""Whether kernels of a fused plan start while the one before them ends (programmatic dependent launch, Hopper and
later). Off, for nobody has measured it: benchmarks/NOTES.md."""

MAX_GRID_Y = 65535
MAX_ELEMENTS = 2**31 - 2**20
"""Elements of a sample that int32 indices can number, the rounding up to a whole block included."""


def float_bits(value: float) -> int:
    """The float32 of ``value`` as an int32, for ``_math.float_of_bits``.

    Not a float argument, which Inductor would pass as float64, and not a constexpr, which would compile the kernel
    again for each new value; an integer is neither.
    """
    bits: int = struct.unpack("i", struct.pack("f", value))[0]
    return bits


def int32(value: int) -> int:
    """A uint32 (a stream) as the int32 with the same bits, so that all streams share one compiled kernel."""
    return value - 2**32 if value >= 2**31 else value


_ahead: ContextVar[bool] = ContextVar("ddpm_fast_compiling_ahead", default=False)


def call_kernel(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Run a kernel; ``aot.recorded`` puts itself here to see what would run."""
    if _ahead.get():
        kernel.warmup(*args, grid=grid, **options)
    else:
        kernel[grid](*args, **options)


_call: Callable[..., None] = call_kernel


@contextlib.contextmanager
def compiling_ahead() -> Iterator[bool]:
    """Inside, launches by this thread run nothing; what they would run is compiled, on all processors, until the end.

    Yields False, and launches are launches, where Triton cannot do that. Kernels that cannot be compiled raise when
    they are launched.
    """
    mode = None if INTERPRETED else getattr(triton, "AsyncCompileMode", None)
    if mode is None:
        yield False
        return
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(processors) as threads:
        with mode(threads, ignore_errors=True) as compiling:
            before = _ahead.set(True)
            try:
                yield True
            finally:
                _ahead.reset(before)
        _build_launchers(threads, [future.kernel for future in compiling.future_kernels.values()])


def _build_launchers(threads: ThreadPoolExecutor, kernels: Sequence[Any]) -> None:
    """Has the C compiler make what launches the kernels, half a second for each sort of arguments, now and at once.

    Triton does it when a kernel is first launched, and finds these on disk then. What fails, fails again there.
    """
    with contextlib.suppress(AttributeError):  # of a Triton that does it otherwise
        make = triton.runtime.driver.active.launcher_cls
        sorts = {tuple(kernel.src.signature.items()): kernel for kernel in kernels if kernel is not None}
        for building in [threads.submit(make, kernel.src, kernel.metadata) for kernel in sorts.values()]:
            building.exception()


def launch(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **constants: Any) -> None:
    """Launch ``kernel`` on the device of ``on``. Fusing a * b + c is always off: the bits are part of the contract.

    RuntimeError where the kernel cannot be compiled or needs more than the device has: Triton's own errors are of no
    class that a caller would catch.
    """
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False, **constants}
    try:
        if on.is_cuda and on.device.index != torch.cuda.current_device():
            with torch.cuda.device(on.device):
                _call(kernel, grid, args, options)
        else:
            _call(kernel, grid, args, options)
    except (TritonError, AssertionError, subprocess.SubprocessError, OSError) as error:  # also of its compilers
        raise RuntimeError(f"Triton cannot run {kernel.__name__}: {error}") from error


def launch_overlapping(kernel: Any, grid: tuple[int, ...], on: Tensor, *args: Any, **constants: Any) -> None:
    """Launch a kernel that begins with `_tile.await_previous(OVERLAP)`, beside the end of the one before if OVERLAP."""
    overlap = OVERLAP and not INTERPRETED
    if overlap and on.is_cuda:
        overlap = torch.cuda.get_device_capability(on.device) >= (9, 0)
    options = {"launch_pdl": True} if overlap else {}
    launch(kernel, grid, on, *args, OVERLAP=overlap, **options, **constants)


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(value - 1, 0).bit_length()


def check_size(layout: Layout) -> None:
    """Samples are numbered in 32 bits (and batches in 64)."""
    if layout.elements > MAX_ELEMENTS:
        raise ValueError(
            f"the triton backend takes samples of at most {MAX_ELEMENTS} elements, got {layout.elements}; "
            "use the native backend"
        )


def long_axis(blocks: int) -> tuple[int, int]:
    """Grid axes 1 and 2 for any number of blocks: axis 1 ends at 65535."""
    return min(blocks, MAX_GRID_Y), -(-blocks // MAX_GRID_Y)


def _block_of_quads(quads: int, largest: int) -> int:
    """The largest block that leaves at most a ninth of the threads idle (768 quads are 3 x 256), else the tightest."""
    block, best, least = largest, largest, -(-quads // largest) * largest
    while least * 8 > quads * 9 and block > 32:
        block //= 2
        covered = -(-quads // block) * block
        if covered < least:
            best, least = block, covered
    return best


class Tiles:
    """How a noise kernel divides n samples of channels x inner elements among programs.

    ``args`` are the kernel's arguments (n, channels, inner / UNIT) and ``constants`` its constexprs. UNIT is a power
    of two that divides inner: multiplying by it inside the kernel is how the compiler learns that 128-bit accesses
    are aligned, for Triton itself only asks whether a size is divisible by 16.
    """

    __slots__ = ("args", "constants", "grid", "layout", "quad_blocks")

    def __init__(
        self, layout: Layout, *, channels_last: bool = False, need_channel: bool = False, program_quads: int = 0
    ) -> None:
        """``channels_last``: some array is, besides those of ``layout``; ``need_channel``: the kernel uses the channel;
        ``program_quads``: quads of a program, where its shape must not depend on n."""
        check_size(layout)
        any_channels_last = channels_last or layout.channels_last
        channels, inner = layout.channels, layout.inner
        if not any_channels_last and not need_channel:
            channels, inner = 1, channels * inner
        unit = math.gcd(inner, 16)
        quads = -(-layout.elements // 4)
        if INTERPRETED:
            budget = INTERPRETED_QUADS
            block_q = min(budget, power_of_two(quads))
        else:
            budget = program_quads or (QUADS_MANY if layout.n * quads >= MANY else QUADS_FEW)
            block_q = _block_of_quads(quads, min(budget, power_of_two(quads)))
        block_n = budget // block_q
        if INTERPRETED or not program_quads:
            block_n = min(block_n, power_of_two(layout.n))
        self.layout = layout
        self.quad_blocks = -(-quads // block_q)
        self.grid = (self.quad_blocks, *long_axis(-(-layout.n // block_n)))
        self.args = (layout.n, channels, inner // unit)
        self.constants = {
            "UNIT": unit,
            "BLOCK_N": block_n,
            "BLOCK_Q": block_q,
            # A quad has to lie within one channel for pixel order.
            "PIXELS": any_channels_last and unit >= 4,
            "CHANNELS_LAST": layout.channels_last,
        }
