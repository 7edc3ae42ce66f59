"""What this machine has of what a run needs, asked before anything is started."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

NEEDED = {"torch": "torch", "triton": "triton", "numpy": "numpy", "pytest": "pytest", "xdist": "pytest-xdist"}
"""Modules that every run imports, and the names they are installed by."""

ASK = """
import json, torch
found = {"cuda": torch.version.cuda, "gpu": None, "why": ""}
if torch.version.cuda is None:
    found["why"] = f"torch {torch.__version__} is built without CUDA"
elif not torch.cuda.is_available():
    found["why"] = f"torch {torch.__version__} finds no NVIDIA GPU and driver that it can use"
else:
    found["gpu"] = torch.cuda.get_device_name()
print(json.dumps(found))
"""


class Unfit(Exception):
    """This machine lacks something; the message says what, and what to do."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Versions, and the GPU's name, None where there is none that torch can use."""

    gpu: str | None
    torch: str
    cuda: str | None
    triton: str
    nvcc: str | None
    python: str = platform.python_version()

    def line(self) -> str:
        """For the head of a report."""
        gpu = self.gpu or "no GPU"
        nvcc = "no nvcc" if self.nvcc is None else f"nvcc {self.nvcc}"
        cuda = "without CUDA" if self.cuda is None else f"CUDA {self.cuda}"
        return f"{gpu}; Python {self.python}, torch {self.torch} ({cuda}), Triton {self.triton}, {nvcc}"


def nvcc_version() -> str | None:
    """The release of nvcc, or None where there is none."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    return next((word.strip(",") for line in text.splitlines() if "release" in line for word in line.split()[4:5]), "?")


def look(*, need_gpu: bool, need_nvcc: bool = True) -> Machine:
    """The machine; Unfit where it lacks what a run needs. torch is asked in a process of its own, which ends again."""
    missing = [package for name, package in NEEDED.items() if importlib.util.find_spec(name) is None]
    if missing:
        raise Unfit(
            f"{sys.executable} has no {', '.join(missing)}; run `make test` once, which makes .venv, "
            "or name another Python: PYTHON=... benchmarks/gpu_check.sh"
        )
    asked = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=False)
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unfit(f"{sys.executable} cannot import torch: {last}")
    found = json.loads(asked.stdout.strip().splitlines()[-1])
    if need_gpu and found["gpu"] is None:
        raise Unfit(f"{found['why']}; --dry-run shows what can be shown without a GPU")
    nvcc = nvcc_version()
    if nvcc is None and need_nvcc:
        raise Unfit("no nvcc on the PATH or in $CUDACXX: install the CUDA toolkit, whose kernels are checked here")
    return Machine(
        found["gpu"],
        importlib.metadata.version("torch"),
        found["cuda"],
        importlib.metadata.version("triton"),
        nvcc,
    )
