"""The main job: train on real digits, sample, look, measure. `ddpm-fast demo` and `make demo`."""

from .run import run
from .settings import DemoError, Settings
from .train import Recipe

__all__ = ["DemoError", "Recipe", "Settings", "run"]
