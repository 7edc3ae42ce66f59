"""Reading what nvcc made: PTX, machine code (SASS) and resources of the kernels in csrc/cuda, without a GPU."""

from __future__ import annotations

import heapq
import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O3", "--fmad=false"]


def find_nvcc() -> str | None:
    """nvcc from $CUDACXX or PATH."""
    candidates = [os.environ.get("CUDACXX", ""), shutil.which("nvcc") or ""]
    return next((c for c in candidates if c and Path(c).exists()), None)


def find_cuobjdump() -> str | None:
    """cuobjdump from the CUDA toolkit or from Triton's wheel, which ships one."""
    nvcc = find_nvcc()
    candidates = [shutil.which("cuobjdump") or ""]
    if nvcc is not None:
        candidates.append(str(Path(nvcc).resolve().with_name("cuobjdump")))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return next((c for c in candidates if c and Path(c).exists()), None)


def output_of(*command: str) -> str:
    """Standard output of a command that has to succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@dataclass
class Kernel:
    """One kernel: its C++ name without namespaces, its instructions by address, its resources."""

    name: str
    code: dict[int, str] = field(default_factory=dict)  # padding left out
    resources: dict[str, int] = field(default_factory=dict)

    def count(self, pattern: str) -> int:
        """How many instructions match at their opcode."""
        return sum(re.match(rf"(@!?U?P\w+ )?{pattern}", text) is not None for text in self.code.values())

    @cached_property
    def addresses(self) -> list[int]:
        return sorted(self.code)

    def _next(self, address: int) -> list[int]:
        """Where control can go from an instruction. Calls (the rare inputs of sqrt and division) are not followed."""
        text = self.code[address]
        opcode = re.sub(r"^@!?U?P\w+ ", "", text).split()[0]
        after = self.addresses.index(address) + 1
        following = [self.addresses[after]] if after < len(self.addresses) else []
        if opcode.startswith("EXIT"):
            return following if text.startswith("@") or " P" in text else []
        if opcode.startswith(("CALL", "RET", "BRX")):
            return []
        if opcode.startswith("BRA"):
            target = [int(text.split()[-1], 16)]
            return target + following if text.startswith("@") or re.search(r"BRA !?U?P", text) else target
        return following

    def shortest_path(self, *required: str) -> int:
        """Fewest instructions from the entry to an EXIT on a way that executes every instruction matching ``required``.

        Optional parts are branched over, so this is the main path of the kernel when what makes it out is required.
        """
        must = [a for a in self.addresses if any(re.match(rf"{p}\b", self.code[a]) for p in required)]
        assert must, f"{self.name} has no {required}"
        bit = {address: 1 << k for k, address in enumerate(must)}
        queue = [(1, self.addresses[0], bit.get(self.addresses[0], 0))]
        seen = set()
        while queue:
            length, address, done = heapq.heappop(queue)
            if (address, done) in seen:
                continue
            seen.add((address, done))
            if "EXIT" in self.code[address] and done == (1 << len(must)) - 1:
                return length
            for target in self._next(address):
                heapq.heappush(queue, (length + 1, target, done | bit.get(target, 0)))
        raise AssertionError(f"{self.name}: no path through {required}")


def short_name(function: str) -> str:
    """`normal_kernel<float, Run>` from a demangled function."""
    name = function.replace("(anonymous namespace)::", "").replace("ddpm_fast::", "")
    return name.removeprefix("void ").split("(")[0]


def listing(binary: Path, *options: str) -> str:
    """What cuobjdump prints, with C++ names."""
    tool = find_cuobjdump()
    assert tool is not None
    text = output_of(tool, *options, str(binary))
    return subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout


@cache
def read_kernels(binary: Path, arch: str | None = None) -> dict[str, Kernel]:
    """All kernels in a cubin, or those of one architecture in a library."""
    only = [] if arch is None else ["-arch", arch]
    kernels: dict[str, Kernel] = {}
    current = None
    for line in listing(binary, "-sass", *only).splitlines():
        if found := re.search(r"Function : (.+)", line):
            current = Kernel(short_name(found[1]))
            kernels[current.name] = current
        elif current is not None and (found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line)):
            text = re.sub(r"\s+", " ", found[2])
            if text != "NOP":
                current.code[int(found[1], 16)] = text
    usage = listing(binary, "--dump-resource-usage", *only)
    for function, resources in re.findall(r"Function (.+):\s*\n\s*(REG.*)", usage):
        pairs = re.findall(r"(\w+):(\d+)", resources)
        kernels[short_name(function)].resources = {name: int(value) for name, value in pairs}
    return kernels
