"""The reverse steps of a diffusers scheduler as rows of one table. Needs no diffusers.

A `Timeline` says which row a timestep means, `Rows` what the coefficients of the rows are.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..backends import native
from ..schedule import Schedule
from ..tables.levels import Levels
from ..tables.steps import COLUMNS, check_choice, clip_range, step_rows
from ..tables.timesteps import Timesteps
from ._choices import PREDICTIONS, VARIANCES

LEARNED = ("learned", "learned_range")
# "learned" is the variance itself here, not its logarithm; its row only has to add noise, whatever its scale.
VARIANCE_TYPES = {**VARIANCES, "learned": "learned"}
SMALLEST_VARIANCE = 1e-20  # what learned_range interpolates from where the posterior variance is 0


class Placed:
    """Rows on one device, with the addresses that a direct call of the compiled op takes."""

    __slots__ = ("addresses", "index", "log_range", "t_of_row", "table")

    def __init__(self, rows: Rows, device: torch.device) -> None:
        with torch.inference_mode(False):  # kept for later steps, which may be trained through
            self.table = torch.tensor(rows.coefficients, dtype=torch.float32, device=device)
            self.t_of_row = torch.tensor(rows.timesteps, dtype=torch.int32, device=device)
            self.index = torch.arange(len(rows.timesteps), device=device)
            self.log_range = (
                None
                if rows.log_range is None
                else torch.tensor(rows.log_range, dtype=torch.float32, device=device)  # [rows, 2]
            )
        self.addresses = native.RowAddresses.of(self.table, self.t_of_row, self.index)

    def row(self, row: int) -> Tensor:
        """int64 (1,): the row as the op reads it."""
        return self.index[row : row + 1]


class Rows:
    """The coefficients of the steps here[i] -> there[i] (-1: the data), for one set of choices.

    timesteps: what the rows leave. learned: "", "learned" or "learned_range". threshold: (ratio, max_value) of dynamic
    thresholding, or None. x0_is_output: the network gives x0 itself. special: more than the plain update is needed.
    bad: rows that cannot be taken, with the error that says why.
    """

    def __init__(
        self,
        schedule: Schedule,
        config: Mapping[str, Any],
        here: Timesteps,
        there: Timesteps,
        *,
        method: str,
        variance_type: str = "fixed_small",
        eta: float = 0.0,
        rederive_eps: bool = True,
    ) -> None:
        check_choice("prediction_type", config["prediction_type"], tuple(PREDICTIONS))
        check_choice("variance_type", variance_type, tuple(VARIANCE_TYPES))
        T = len(schedule)
        inside = (here >= 0) & (here < T)
        ends = np.where(inside, here, 0), np.where(inside, there, -1)
        thresholding = bool(config["thresholding"])
        bound = clip_range(config["clip_sample_range"] if config["clip_sample"] and not thresholding else None)
        self.learned = variance_type if variance_type in LEARNED else ""
        self.log_range = None
        # Zero signal (eps with zero terminal SNR) divides by it; such a row is refused when it is asked for.
        with np.errstate(divide="ignore", invalid="ignore"):
            self.coefficients = step_rows(
                schedule,
                *ends,
                method=method,
                prediction=PREDICTIONS[config["prediction_type"]],
                variance=VARIANCE_TYPES[variance_type],
                eta=eta,
                bound=bound,
                clipped=thresholding or bound < np.inf,
                rederive_eps=rederive_eps,
            )
            if self.learned == "learned_range":
                level = Levels(schedule, *ends)
                self.log_range = np.log(np.stack([np.maximum(level.small, SMALLEST_VARIANCE), level.beta], axis=1))
        self.timesteps: list[int] = here.tolist()
        self.threshold = (config["dynamic_thresholding_ratio"], config["sample_max_value"]) if thresholding else None
        self.x0_is_output = config["prediction_type"] == "sample"
        self.special = bool(self.learned) or thresholding
        self.bad: dict[int, tuple[type[Exception], str]] = {}
        finite = np.isfinite(self.coefficients[:, : COLUMNS.index("clip")].astype(np.float32)).all(axis=1)
        for row in np.flatnonzero(~inside).tolist():
            self.bad[row] = (
                IndexError,
                f"timestep {self.timesteps[row]} is outside the schedule, which has timesteps 0..{T - 1}",
            )
        for row in np.flatnonzero(inside & ~finite).tolist():
            why = (
                f"the step that leaves timestep {self.timesteps[row]} has no finite coefficients: too little signal is "
                f"left there for prediction_type={config['prediction_type']!r}, or the timesteps do not descend; use a "
                'model with prediction_type="v_prediction" or "sample", or another timestep_spacing'
            )
            self.bad[row] = (ValueError, why)
        self._placed: dict[torch.device, Placed] = {}

    def on(self, device: torch.device) -> Placed:
        """The rows on `device`, put there once."""
        placed = self._placed.get(device)
        if placed is None:
            placed = self._placed[device] = Placed(self, device)
        return placed


NOWHERE = -(1 << 70)  # an address that no tensor is near


class Timeline:
    """A scheduler's list of timesteps at one moment, and what it was made for, so that a change shows itself.

    Finding the row of a timestep costs no search and, on a GPU, no wait: the pipelines' `for t in scheduler.timesteps`
    gives views into the list, and where a view starts is its row.
    """

    __slots__ = (
        "address",
        "alphas_cumprod",
        "config",
        "here",
        "listed",
        "row_of",
        "rows",
        "steps",
        "there",
        "timesteps",
        "version",
    )

    def __init__(self, state: Mapping[str, Any], here: Timesteps, there: Timesteps) -> None:
        """state: the scheduler's attributes; here -> there: the steps that they mean (there = -1: the data)."""
        timesteps: Tensor = state["timesteps"]
        self.timesteps, self.config = timesteps, state["_internal_dict"]
        self.alphas_cumprod, self.steps = state["alphas_cumprod"], state["num_inference_steps"]
        self.version = None if timesteps.is_inference() else timesteps._version
        self.here, self.there = here, there
        self.listed: list[int] = here.tolist()
        # Without set_timesteps the steps may be others than the tensor's; its views then say nothing.
        viewed = timesteps.dtype == torch.int64 and timesteps.is_contiguous() and timesteps.tolist() == self.listed
        self.address = timesteps.data_ptr() if viewed else NOWHERE
        # Reversed, so that the first of equal timesteps counts.
        self.row_of: dict[int, int] = {t: row for row, t in reversed(list(enumerate(self.listed)))}
        self.rows: dict[Any, Rows] = {}

    def serves(self, state: Mapping[str, Any]) -> bool:
        """Whether the scheduler still has the attributes that this was made for, not replaced nor written to."""
        timesteps = self.timesteps
        return (
            state["timesteps"] is timesteps
            and state["_internal_dict"] is self.config
            and state["alphas_cumprod"] is self.alphas_cumprod
            and state["num_inference_steps"] is self.steps
            and (self.version is None or self.version == timesteps._version)
        )

    def same_steps(self, other: Timeline) -> bool:
        """Whether rows made for the other serve this one."""
        return (
            self.config is other.config
            and self.alphas_cumprod is other.alphas_cumprod
            and np.array_equal(self.here, other.here)
            and np.array_equal(self.there, other.there)
        )

    def find(self, timestep: Any) -> int:
        """The row that leaves `timestep`, an int or a tensor of one; -1 where it is not in the list.

        Raises TypeError for what is no number, IndexError for a fraction, as indexing with it would.
        """
        if isinstance(timestep, Tensor):
            row: int = (timestep.data_ptr() - self.address) >> 3
            if 0 <= row < len(self.listed) and timestep.dtype == torch.int64 and timestep.numel() == 1:
                return row
        return self.row_of.get(as_index(timestep), -1)


def as_index(timestep: Any) -> int:
    """`timestep` as an int; waits for the device where it is a tensor there."""
    value: Any = timestep.item() if isinstance(timestep, Tensor) else timestep
    try:
        return int(operator.index(value))
    except TypeError:
        error = IndexError if isinstance(value, float) else TypeError
        raise error(f"timestep must be an integer or a tensor of one, got {value!r}") from None
