"""The memory that training steps need at the most: python peak_memory.py CANDIDATE N DEVICE '{"width": 64}'

Prints bytes: on a CPU how far the process grew beyond what it was with everything imported (the kernel's own count of
its resident memory), on a GPU what the allocator gave out.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from training import Problem, make


def resident(peak: bool) -> int:
    """Bytes of this process that are in memory now, or were at the most since `forget_peak`."""
    name = "VmHWM" if peak else "VmRSS"
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """The kernel begins anew to look for the peak."""
    Path("/proc/self/clear_refs").write_text("5")


def main(name: str, n: int, device: torch.device, options: dict[str, int]) -> int:
    """Bytes. Two steps are done before: they compile, and make the optimiser's state."""
    gpu = device.type == "cuda"
    before = 0 if gpu else resident(peak=False)
    candidate = make(name, Problem(n, device, **options))
    for _ in range(2):
        candidate.step()
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        forget_peak()
    for _ in range(2):
        candidate.step()
    return (int(torch.cuda.max_memory_allocated(device)) if gpu else resident(peak=True)) - before


if __name__ == "__main__":
    print(main(sys.argv[1], int(sys.argv[2]), torch.device(sys.argv[3]), json.loads(sys.argv[4])))
