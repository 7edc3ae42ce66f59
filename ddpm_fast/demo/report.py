"""What the demo says: facts about the machine, and the table of seconds."""

from __future__ import annotations

import os
import platform
import statistics
import textwrap
from typing import Any

import torch


def cpu_name() -> str:
    """The processor, as the kernel or the platform names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform's own name has to do
    return platform.processor() or platform.machine()


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Names and versions that a measured second depends on."""
    facts: dict[str, Any] = {
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(device),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = torch.version.cuda
    return facts


def speed_table(speed: dict[str, Any]) -> str:
    """The comparison as text; `speed` is what `compare_speed` returns."""
    images, rows = speed["images"], speed["rows"]
    table = [("", "seconds", "per image", "speed-up", "max |difference|")]
    for i, row in enumerate(rows):
        seconds = statistics.median(row["seconds"])
        difference = f"{row['max_abs_difference']:.1e}" if i else "-"
        table.append((row["name"], f"{seconds:.2f}", f"{seconds / images:.3f}", f"{row['speed_up']:.2f}x", difference))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for first, *rest in table:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    runs = len(rows[0]["seconds"])
    times = "one run" if runs == 1 else f"median of {runs} runs"
    note = (
        f"(The same {images} images, {speed['steps']} steps, from the same noise; {times} each, in "
        "turns; the eager loop finds its noise ready, Sampler draws its own within the time. Most "
        "of the time is the network's: Sampler alone runs it layer by layer as the eager loop does, "
        "fused=True runs the fused plan. The difference is that of the images, in [-1, 1], after "
        "all steps.)"
    )
    return "\n".join([*lines, *textwrap.wrap(note, 110)])
