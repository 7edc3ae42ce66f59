"""The main job: train on real digits, sample, look, measure. `ddpm-fast demo` and `make demo`."""

from .measure import compare_speed
from .report import speed_table
from .run import run
from .settings import DemoError, Settings
from .train import Recipe, bf16_pays

__all__ = ["DemoError", "Recipe", "Settings", "bf16_pays", "compare_speed", "run", "speed_table"]
