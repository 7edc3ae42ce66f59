"""Kernels compiled and read by benchmarks/gpu_check/static.py in a process of its own, because kernels decorated under
TRITON_INTERPRET=1 cannot be compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(BENCHMARKS))

from gpu_check.kernels import Kernel  # noqa: E402


def run(out: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What the stage printed, and what it wrote into `out`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
    command = [sys.executable, "-m", "gpu_check.static", "--out", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert out.exists(), done.stderr
    return done, json.loads(out.read_text())


def kernels(out: Path, part: str) -> list[Kernel]:
    """All kernels of a part."""
    _, found = run(out, "--only", part)
    assert not found["not_done"]
    result = [Kernel.load(record) for record in found["kernels"]]
    assert result, found["failures"]
    return result
