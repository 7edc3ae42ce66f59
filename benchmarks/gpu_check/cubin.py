"""Reading cubins that Triton made, with the tools of its wheel: machine instructions (SASS) and resources.

nvdisasm takes a quarter of a second to start, more than the work on one kernel, so the code of many kernels of an
architecture goes through it as one binary.
"""

from __future__ import annotations

import bisect
import importlib.util
import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .sass import Code, lines

ARCHITECTURES = {80: "SM80", 90: "SM90a"}


def _run(tool: str, *options: str, content: bytes) -> str:
    triton = importlib.util.find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        command = [str(Path(triton.origin).parent / "backends/nvidia/bin" / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _text(cubin: bytes) -> bytes:
    """The section .text of a cubin's one kernel, by the table of sections of the ELF64 format."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    # of each: name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    (found,) = (s for s in sections if cubin.startswith(b".text.", sections[names][4] + s[0]))
    return cubin[found[4] : found[4] + found[5]]


def read(cubins: Sequence[tuple[int, bytes]]) -> list[Code]:
    """For each (capability, cubin) its code; addresses are those of the whole binary. Resources: see `resources`."""
    found = [Code("") for _ in cubins]
    for capability in {capability for capability, _ in cubins}:
        members = [i for i, (of, _) in enumerate(cubins) if of == capability]
        texts = [_text(cubins[i][1]) for i in members]
        ends = list(itertools.accumulate(map(len, texts)))
        listing = _run("nvdisasm", "--no-dataflow", "--binary", ARCHITECTURES[capability], content=b"".join(texts))
        for address, body in lines(listing):
            found[members[bisect.bisect_right(ends, address)]].instructions[address] = body
    for code in found:
        assert code.opcodes["EXIT"], "every kernel ends somewhere"
    return found


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, bytes of stack per thread."""
    usage = _run("cuobjdump", "-res-usage", content=cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])
