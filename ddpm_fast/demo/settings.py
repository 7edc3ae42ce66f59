"""What the demo can be asked to do, and everything that can be wrong with it before work begins."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import tempfile
from pathlib import Path

import torch

from .train import Recipe

EXTRAS = {"sklearn": "scikit-learn", "PIL": "Pillow", "safetensors": "safetensors", "tqdm": "tqdm"}


class DemoError(Exception):
    """The demo cannot start; the message is one line that says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the demo does; the defaults are `make demo`.

    out: folder for the files. seed: of everything drawn. device: "auto", "cpu", "cuda" or "cuda:N".
    steps: reverse steps of the pictures and of the quality. rows: images of each digit in the grid.
    guided, unguided: images measured for recognition and for the energy distance.
    compare_seconds: the speed comparison repeats while so many seconds are not spent, fewer where
        the demo would go past aim_seconds.
    """

    out: Path
    seed: int = 0
    device: str = "auto"
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    timesteps: int = 1000
    steps: int = 100
    rows: int = 8
    guided: int = 200
    unguided: int = 200
    guidance: float = 2.0
    width: int = 32
    depth: int = 3
    time_dim: int = 128
    compare_seconds: float = 40.0
    aim_seconds: float = 200.0
    progress: bool = True

    def resolve_device(self) -> torch.device:
        """The device to run on; DemoError when it is unknown or absent."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise DemoError(f"--device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise DemoError(
                f"--device {self.device}: PyTorch {torch.__version__} sees "
                f"{torch.cuda.device_count()} CUDA devices; use --device cpu, or install a CUDA "
                "build of PyTorch and a driver (`ddpm-fast info` says what is missing)"
            )
        return device

    def check(self) -> torch.device:
        """Everything that can be wrong before work begins; returns the device."""
        missing = [name for module, name in EXTRAS.items() if not importlib.util.find_spec(module)]
        if missing:
            raise DemoError(f"the demo needs {', '.join(missing)}; install with `pip install ddpm_fast[demo]`")
        if not 0 <= self.seed < 2**63:
            raise DemoError(f"--seed must be in 0..2^63-1, got {self.seed}")
        seconds = self.recipe.seconds
        if not (math.isfinite(seconds) and seconds > 0):
            raise DemoError(f"--seconds must be a positive number of seconds, got {seconds}")
        if self.recipe.steps is not None and self.recipe.steps < 1:
            raise DemoError(f"--train-steps must be at least 1, got {self.recipe.steps}")
        device = self.resolve_device()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.out):
                pass
        except OSError as error:
            raise DemoError(f"--out {self.out} cannot be written to: {error.strerror}") from error
        return device
