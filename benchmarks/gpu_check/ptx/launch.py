"""Launches of Triton kernels, compiled for a GPU and executed on CPU tensors."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .build import Region, library
from .parse import Program, parse

LIMIT = 200_000_000
"""Instructions of warps in a launch, after which it counts as one that does not end."""


class Fault(Exception):
    """A kernel did what it must not: the message names kernel, instruction, block and thread."""


@dataclass(frozen=True)
class Launched:
    """One launch that was executed. instructions: run by warps of 32 lanes. hazards: races in global memory that change
    nothing, for the opposite order of all blocks and warps leaves the same bytes."""

    kernel: str
    program: Program
    specialisation: Any
    grid: tuple[int, ...]
    instructions: int
    hazards: list[str]

    @property
    def approximate(self) -> list[str]:
        """Instructions whose result a GPU may round otherwise."""
        return self.program.approximate


program_of = functools.lru_cache(maxsize=256)(parse)


class Arrays:
    """The arrays of a launch, each as large as its elements reach, in an address space of its own."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.storages: dict[int, int] = {}
        self.sizes: list[int] = []
        self.kept: list[Any] = []

    @classmethod
    def at_their_places(cls, tensors: list[Tensor]) -> Arrays:
        """The storages of these tensors where they lie in this process."""
        arrays = cls()
        for x in sorted(tensors, key=lambda x: x.untyped_storage().data_ptr()):
            storage = x.untyped_storage()
            if storage.nbytes():
                arrays.storages[storage.data_ptr()] = len(arrays.sizes)
                label = f"a {str(x.dtype).removeprefix('torch.')} array of {storage.nbytes()} bytes".encode()
                arrays.kept += [x, label]
                place = storage.data_ptr()
                arrays.regions.append(Region(place, storage.nbytes(), place, None, len(arrays.sizes), 0, label))
                arrays.sizes.append(storage.nbytes())
        return arrays

    def bytes(self) -> list[Tensor]:
        """The memory behind all arrays."""
        found = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in self.kept if isinstance(x, Tensor)}
        return [torch.empty(0, dtype=torch.uint8).set_(found[place]) for place in self.storages if place in found]

    def add(self, name: str, x: Tensor) -> int:
        """The address of the first element as the kernel sees it, aligned as it is here."""
        reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
        reach = reach * x.element_size() if x.numel() else 0
        allowed = None
        if x.numel() * x.element_size() < reach:
            elements = torch.zeros(reach // x.element_size(), x.element_size(), dtype=torch.uint8)
            torch.as_strided(
                elements, (*x.shape, x.element_size()), (*(x.element_size() * s for s in x.stride()), 1)
            ).fill_(1)
            self.kept.append(elements)
            allowed = elements.data_ptr()
        storage = x.untyped_storage()
        number = self.storages.setdefault(storage.data_ptr(), len(self.storages))
        if number == len(self.sizes):
            self.sizes.append(storage.nbytes())
        base = (len(self.regions) + 1 << 40) + (1 << 39) + x.data_ptr() % 4096
        label = f"{name} {tuple(x.shape)}".encode()
        self.kept += [x, label]
        offset = x.data_ptr() - storage.data_ptr()
        self.regions.append(Region(base, reach, x.data_ptr(), allowed, number, offset, label))
        return base


def execute(
    program: Program, grid: tuple[int, ...], values: list[tuple[str, Any]], shared: int, overlaps: bool = False
) -> tuple[int, list[str]]:
    """Run a program over a grid. values: (name, tensor or int) of every parameter but those at the end that Triton
    adds, which are null. overlaps: with the kernel before it, as programmatic dependent launch lets it. Returns the
    count of instructions and the hazards; Fault where something is wrong."""
    arrays = Arrays()
    block = bytearray(8 * len(program.parameters))
    for (at, size), (name, value) in zip(program.parameters, values, strict=False):
        number = arrays.add(name, value) if isinstance(value, Tensor) else value
        struct.pack_into({4: "<I", 8: "<Q"}[size], block, at, number & (1 << 8 * size) - 1)
    return _both_ways(program, arrays, bytes(block), grid, program.threads, shared, 2 * overlaps)


def execute_at(
    program: Program, arrays: Arrays, block: bytes, grid: tuple[int, ...], threads: int, shared: int
) -> tuple[int, list[str]]:
    """Run a program with arrays at their places in this process and parameters as bytes; results as of `execute`."""
    return _both_ways(program, arrays, block, grid, threads, shared, 4)


def _both_ways(
    program: Program, arrays: Arrays, block: bytes, grid: tuple[int, ...], threads: int, shared: int, flags: int
) -> tuple[int, list[str]]:
    """Run; where there are hazards, run again in the opposite order and compare all memory."""
    memory = arrays.bytes()
    before = [x.clone() for x in memory]
    count, hazards = _run(program, arrays, block, grid, threads, shared, flags)
    if hazards:
        after = [x.clone() for x in memory]
        for x, old in zip(memory, before, strict=True):
            x.copy_(old)
        _run(program, arrays, block, grid, threads, shared, flags + 1)
        if not all(torch.equal(x, other) for x, other in zip(memory, after, strict=True)):
            raise Fault(f"{program.name}: its results depend on the order of blocks and warps; {hazards[0]}")
    return count, hazards


def _run(
    program: Program, arrays: Arrays, block: bytes, grid: tuple[int, ...], threads: int, shared: int, flags: int
) -> tuple[int, list[str]]:
    if threads % 32:
        raise Fault(f"{program.name}: blocks of {threads} threads; the machine takes whole warps of 32")
    message = ctypes.create_string_buffer(2000)
    result = library().ptx_run(
        program.handle,
        (Region * len(arrays.regions))(*arrays.regions),
        len(arrays.regions),
        (ctypes.c_uint64 * len(arrays.sizes))(*arrays.sizes),
        len(arrays.sizes),
        block,
        len(block),
        (ctypes.c_uint32 * 3)(*grid, *([1] * (3 - len(grid)))),
        threads,
        shared,
        LIMIT,
        flags,
        message,
        len(message),
    )
    text = message.value.decode()
    if result < 0:
        raise Fault(f"{program.name}: {text}, at instruction {-1 - result}: {program.lines[-1 - result]}")
    return int(result), text.splitlines()


def as_launched(specialisation: Any, args: tuple[Any, ...]) -> Any:
    """The specialisation without the alignment that these arguments do not have, as Triton's JIT finds it."""
    attributes = {
        index: value
        for index, value in specialisation.attributes.items()
        if not isinstance(args[index[0]], Tensor) or args[index[0]].data_ptr() % 16 == 0
    }
    return dataclasses.replace(specialisation, attributes=attributes)


@contextmanager
def launches(capability: int, edit: Callable[[str], str] = lambda ptx: ptx) -> Iterator[list[Launched]]:
    """Within it the Triton kernels are compiled for an NVIDIA GPU of ``capability`` (80, 90) and executed on CPU
    tensors; the list fills with what ran. edit: of the PTX, before it is read. Needs a process in which Triton's
    interpreter is off (no TRITON_INTERPRET)."""
    from ddpm_fast.backends.triton import aot, launch

    if launch.INTERPRETED:
        raise RuntimeError("Triton's interpreter is on, which compiles nothing; start Python without TRITON_INTERPRET")
    done: list[Launched] = []

    def run(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        found = as_launched(aot.specialisation(kernel, args, options), args)
        compiled = found.compile(capability)
        program = program_of(edit(compiled.asm["ptx"]))
        values = [(name, value) for name, value in zip(found.signature, args, strict=False)]
        values = [(name, value) for name, value in values if found.signature[name] != "constexpr"]
        overlaps = options.get("launch_pdl", False)
        count, hazards = execute(program, grid, values, compiled.metadata.shared, overlaps)
        done.append(Launched(kernel.fn.__name__, program, found, grid, count, hazards))

    before = launch._call
    launch._call = run
    try:
        yield done
    finally:
        launch._call = before
