"""What is known of a compiled kernel without a GPU, whoever compiled it, and how many of its warps fit on one."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that one block can have at the most, by capability."""

PROCESSOR = {80: 164 * 1024, 90: 228 * 1024}
"""Bytes of a multiprocessor; the system takes RESERVED of them for every block."""

REGISTERS, MOST_REGISTERS, WARPS, BLOCKS, RESERVED = 65536, 255, 64, 32, 1024
"""Of a multiprocessor, of either architecture: registers, those of a thread at the most, warps, blocks."""


def resident_warps(capability: int, threads: int, registers: int, shared: int) -> int:
    """Warps of a kernel on one multiprocessor at a time; 0 if not even one block fits.

    Registers are given to warps in units of 256, hence to threads in units of 8, and shared memory in units of 128.
    """
    warps = -(-threads // 32)
    by_registers = REGISTERS // (32 * 8 * -(-max(registers, 1) // 8)) // warps
    by_shared = PROCESSOR[capability] // (128 * -(-shared // 128) + RESERVED)
    fits = registers <= MOST_REGISTERS and shared <= SHARED[capability]
    return min(by_registers, by_shared, BLOCKS, WARPS // warps) * warps if fits else 0


@dataclasses.dataclass
class Kernel:
    """One compiled kernel and what is promised of it.

    part: "ops", "layers", "plans" (Triton) or "cuda". name: of the case; of a CUDA kernel with its template arguments.
    dtype: "f32", "bf16", "f16", of an op "mixed" where several meet. threads: of a block. shared, stack: bytes.
    spills: instructions that read or write local memory; spills_in_loops: those of them that can run again.
    memory: accesses to global memory by full opcode. instructions: of the whole kernel, loop bodies once and rare
    branches included; main_path: of the shortest way through what makes a kernel out, where that was looked for.
    elements: of a thread. inexact: words of PTX that an exact kernel cannot have, how often. fused: multiply-adds of
    float32 in one; contracted: those that are left when roots and divisions, which are made of them, are approximated;
    None: not looked at.

    exact: no approximate arithmetic allowed. wide_loads, wide_stores: bytes per element of every array promised to go
    128 bits at a time; narrow: of the others. layouts: different ways in which threads share the elements of float32
    images. used: where a plan has it, "network N=64 bf16"; of "layers", which candidate it is.

    Of a plan's layer: kind; tile, rows and columns of a program; stored, bytes of an element for each array that gets
    all of the tile, the last one its target unless that is another kernel's; pooled, whether another gets a quarter;
    residual; joined, whether it counts the programs that are through; copies, of 128 bits that a thread of it starts at
    least to bring operands to shared memory, before and in the loop.
    """

    part: str
    name: str
    function: str
    dtype: str
    capability: int
    threads: int
    registers: int
    shared: int
    stack: int = 0
    spills: int = 0
    spills_in_loops: int = 0
    hgmma: int = 0
    hmma: int = 0
    memory: dict[str, int] = dataclasses.field(default_factory=dict)
    instructions: int = 0
    main_path: int | None = None
    elements: int | None = None
    inexact: dict[str, int] = dataclasses.field(default_factory=dict)
    fused: int = 0
    contracted: int | None = None
    exact: bool = True
    wide_loads: list[int] = dataclasses.field(default_factory=list)
    wide_stores: list[int] = dataclasses.field(default_factory=list)
    narrow: list[int] = dataclasses.field(default_factory=list)
    layouts: int = 0
    blocks: list[int | None] = dataclasses.field(default_factory=list)
    kind: str | None = None
    tile: list[int] = dataclasses.field(default_factory=list)
    stored: list[int] = dataclasses.field(default_factory=list)
    pooled: bool = False
    residual: bool = False
    joined: bool = False
    copies: int = 0
    used: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def load(cls, record: dict[str, Any]) -> Kernel:
        """From a record of static.json, which has more fields."""
        return cls(**{field.name: record[field.name] for field in dataclasses.fields(cls)})

    def __str__(self) -> str:
        return f"{self.part}: {self.name} {self.dtype} sm_{self.capability}"

    @property
    def resident_warps(self) -> int:
        """On a multiprocessor, of 64."""
        return resident_warps(self.capability, self.threads, self.registers, self.shared)

    @property
    def per_element(self) -> float | None:
        """Instructions, of the main path where it is known."""
        return None if self.elements is None else (self.main_path or self.instructions) / self.elements

    @property
    def bytes_per_element(self) -> int | None:
        """Read and written, where it is promised how."""
        return sum(self.wide_loads + self.wide_stores + self.narrow) or None

    def accesses(self, kind: str, width: int | None = None) -> int:
        """Instructions LDG, STG or LDGSTS, of so many bits, whatever hints to the caches they carry."""
        wanted = re.compile(kind + (r"\b" if width is None else rf"\.E\.([A-Z]\w*\.)*{width}\b"))
        return sum(count for opcode, count in self.memory.items() if wanted.match(opcode))

    def widths(self, kind: str) -> set[int]:
        """Bits of its accesses LDG, STG or LDGSTS."""
        found = set()
        for opcode in self.memory:
            name, *words = opcode.split(".")
            if name == kind:
                narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
                found.add(next((narrow[word] for word in words if word in narrow), 32))
        return found
