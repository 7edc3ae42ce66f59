"""Everything that can be chosen about training, checked."""

from __future__ import annotations

import dataclasses
import math
import numbers
from typing import Any

from ..noise import make_rng
from .learning_rate import SCHEDULES
from .objective import LOSSES, PREDICTIONS
from .weights import WEIGHTINGS

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "prediction": PREDICTIONS,
    "loss": LOSSES,
    "weighting": (None, *WEIGHTINGS),
    "lr_schedule": SCHEDULES,
    "precision": (None, "bf16", "fp16"),
}
_COUNTS = {"images": 1, "batch_size": 1, "accumulate": 1, "keep": 1, "warmup": 0, "save_every": 1, "workers": 0}
_POSITIVE = ("huber_delta", "min_snr_gamma", "p2_k", "lr", "max_grad_norm", "ema_power")
_NOT_NEGATIVE = ("p2_gamma", "offset_noise", "weight_decay")
_OPTIONAL = ("save_every", "workers", "max_grad_norm", "ema", "ema_power", "self_condition")
_FLAGS = ("flip", "channels_last", "compile", "sync_batchnorm", "resume", "self_condition")

# They say how long, how often and where, not what comes out.
FREE = ("images", "save_every", "keep", "resume", "workers", "compile", "channels_last", "accumulate")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `Trainer` that are numbers, names and flags; see there for what they mean.

    Raises ValueError or TypeError naming the argument, what it must be and what it is.
    """

    images: int = 100_000
    batch_size: int = 128
    prediction: str = "eps"
    loss: str = "mse"
    huber_delta: float = 1.0
    weighting: str | None = None
    min_snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    offset_noise: float = 0.0
    label_dropout: float = 0.0
    self_condition: bool | None = None
    flip: bool = False
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    warmup: int = 0
    lr_schedule: str = "constant"
    accumulate: int = 1
    max_grad_norm: float | None = 1.0
    precision: str | None = None
    ema: float | None = 0.9999
    ema_power: float | None = 0.75
    channels_last: bool = True
    compile: bool = False
    sync_batchnorm: bool = False
    seed: int = 0
    workers: int | None = None
    save_every: int | None = None
    keep: int = 3
    resume: bool = True

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                words = ", ".join("None" if word is None else repr(word) for word in known)
                raise ValueError(f"{name} must be one of {words}, got {value!r}")
        for name, least in _COUNTS.items():
            self._check_count(name, least)
        for name in (*_POSITIVE, *_NOT_NEGATIVE):
            self._check_number(name, positive=name in _POSITIVE)
        for name in ("label_dropout", "ema"):
            self._check_share(name)
        for name in _FLAGS:
            value = getattr(self, name)
            if not isinstance(value, bool) and not (value is None and name in _OPTIONAL):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        self._check_betas()
        if isinstance(self.seed, numbers.Integral) and not isinstance(self.seed, bool):
            object.__setattr__(self, "seed", int(self.seed))
        make_rng(self.seed)  # its check is the check

    def deciding(self) -> dict[str, Any]:
        """What the result depends on, ready for JSON: what a checkpoint keeps, and a run that goes on has to share.

        The number of images is part of it where the learning rate falls towards it.
        """
        free = FREE if self.lr_schedule == "constant" else FREE[1:]
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in free
        }

    def check_shares(self, processes: int) -> None:
        """ValueError unless the batch can be shared evenly among so many processes and their micro-batches."""
        if self.batch_size % (processes * self.accumulate):
            parts = f"accumulate={self.accumulate}" + (f" times {processes} processes" if processes > 1 else "")
            step = processes * self.accumulate
            near = max(step, self.batch_size // step * step)
            raise ValueError(
                f"batch_size must be a multiple of {parts}, got {self.batch_size}; take {near} or {near + step}"
            )

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
        object.__setattr__(self, name, int(value))  # not NumPy's: a checkpoint has to be able to say it

    def _check_number(self, name: str, *, positive: bool) -> None:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise ValueError(f"{name} must be a finite number {'> 0' if positive else '>= 0'}, got {value}")
        object.__setattr__(self, name, float(value))

    def _check_share(self, name: str) -> None:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 <= float(value) <= 1:
            raise ValueError(f"{name} must be in 0..1, got {value}")
        object.__setattr__(self, name, float(value))

    def _check_betas(self) -> None:
        try:
            first, second = self.betas
            inside = 0 <= first < 1 and 0 <= second < 1
        except (TypeError, ValueError):
            inside = False
        if not inside:
            raise ValueError(f"betas must be two numbers in [0, 1), as (0.9, 0.999), got {self.betas!r}")
        object.__setattr__(self, "betas", (float(first), float(second)))
