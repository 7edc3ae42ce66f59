"""Data to train on: what training asks of it, and where it comes from."""

from .base import Data, TensorData, as_data
from .open import SOURCES, open_data
from .prefetch import prefetch

__all__ = ["SOURCES", "Data", "TensorData", "as_data", "open_data", "prefetch"]
