"""Machine code (SASS) of one kernel: its instructions by address, and where control can go between them."""

from __future__ import annotations

import collections
import heapq
import itertools
import re
from dataclasses import dataclass, field
from functools import cached_property

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
"""An instruction as NVIDIA's tools print it: address, text."""

PREDICATE = re.compile(r"@!?U?P\w+ ")


def lines(text: str) -> list[tuple[int, str]]:
    """(address, instruction) of a listing, padding left out."""
    found = ((int(address, 16), re.sub(r"\s+", " ", body)) for address, body in LINE.findall(text))
    return [(address, body) for address, body in found if body != "NOP"]


@dataclass
class Code:
    """One kernel: its name, its instructions by address (ascending), its resources as cuobjdump calls them."""

    name: str
    instructions: dict[int, str] = field(default_factory=dict)
    resources: dict[str, int] = field(default_factory=dict)

    def count(self, pattern: str) -> int:
        """How many instructions match at their opcode."""
        return len(self._matching(pattern))

    def _matching(self, pattern: str) -> list[int]:
        wanted = re.compile(pattern)
        return [at for at, text in self.instructions.items() if wanted.match(PREDICATE.sub("", text, count=1))]

    @cached_property
    def opcodes(self) -> collections.Counter[str]:
        """Instructions by full name, such as LDG.E.128."""
        return collections.Counter(PREDICATE.sub("", text, count=1).split()[0] for text in self.instructions.values())

    @cached_property
    def _after(self) -> dict[int, int]:
        return dict(itertools.pairwise(self.instructions))

    def _next(self, address: int) -> list[int]:
        """Where control can go from an instruction. Calls (the rare inputs of sqrt and division) are not followed."""
        text = self.instructions[address]
        opcode, *operands = PREDICATE.sub("", text, count=1).split()
        following = [self._after[address]] if address in self._after else []
        if opcode.startswith("EXIT"):
            return following if text.startswith("@") or operands else []
        if opcode.startswith(("CALL", "RET", "BRX")):
            return []
        if opcode.startswith("BRA"):
            target = [int(operands[-1], 16)]
            return target + following if text.startswith("@") or len(operands) > 1 else target
        return following

    def shortest_path(self, *required: str) -> int:
        """Fewest instructions from the entry to an EXIT on a way that executes every instruction matching ``required``.

        Optional parts are branched over, so this is the main path of the kernel when what makes it out is required.
        ValueError where there is no such way.
        """
        start = next(iter(self.instructions))
        must = [at for at, text in self.instructions.items() if any(re.match(rf"{p}\b", text) for p in required)]
        if not must:
            raise ValueError(f"{self.name} has no {required}")
        bit = {address: 1 << k for k, address in enumerate(must)}
        queue = [(1, start, bit.get(start, 0))]
        seen = set()
        while queue:
            length, address, done = heapq.heappop(queue)
            if (address, done) in seen:
                continue
            seen.add((address, done))
            if "EXIT" in self.instructions[address] and done == (1 << len(must)) - 1:
                return length
            for target in self._next(address):
                heapq.heappush(queue, (length + 1, target, done | bit.get(target, 0)))
        raise ValueError(f"{self.name}: no path through {required}")

    def repeated(self, pattern: str) -> int:
        """How many of the instructions that match are in a loop: control can come back to them."""
        return sum(self._comes_back(address) for address in self._matching(pattern))

    def _comes_back(self, address: int) -> bool:
        stack, seen = self._next(address), set[int]()
        while stack:
            at = stack.pop()
            if at == address:
                return True
            if at not in seen and at in self.instructions:
                seen.add(at)
                stack += self._next(at)
        return False
