"""Which timesteps a reverse process visits: one strictly descending list per spacing.

Every function returns int64 timesteps, highest first. Row r of a step table leaves `timesteps[r]` and arrives at
`timesteps[r + 1]`; the last row arrives at the data, "before timestep 0".
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Timesteps = npt.NDArray[np.int64]


def leading(T: int, steps: int, offset: int = 0) -> Timesteps:
    """Multiples of T // steps, shifted up by `offset`: for T=1000, steps=50: 980, 960, ..., 20, 0."""
    return np.arange(steps - 1, -1, -1, dtype=np.int64) * (T // steps) + offset


def trailing(T: int, steps: int) -> Timesteps:
    """Equal strides counted down from T, rounded: for T=1000, steps=50: 999, 979, ..., 39, 19."""
    # arange sums its stride up in float64, and ties near .5 then fall as in diffusers; it may go one stride too far.
    result: Timesteps = np.round(np.arange(T, 0, -T / steps)[:steps]).astype(np.int64) - 1
    return result


def trailing_floor(T: int, steps: int) -> Timesteps:
    """As trailing, but rounded down: (T k) // steps - 1 for k = steps..1. They agree where steps divides T.

    What lucidrains' DDIM does, except where its float32 grid falls just below a whole number and so loses one.
    """
    counted: Timesteps = (T * np.arange(steps, 0, -1, dtype=np.int64)) // steps - 1
    return counted


def linspace(T: int, steps: int) -> Timesteps:
    """Both ends included, rounded: for T=1000, steps=50: 999, 979, 958, ..., 20, 0. One step starts at T - 1."""
    upwards: Timesteps = np.round(np.linspace(0, T - 1, max(steps, 2))).astype(np.int64)
    downwards: Timesteps = upwards[::-1][:steps].copy()
    return downwards


def linspace_open(T: int, steps: int) -> Timesteps:
    """linspace of steps + 1 points without the last, 0: for T=1000, steps=50: 999, 979, ..., 40, 20.

    The "linspace" of diffusers' DPM-Solver, whose steps are as even down to the data as they are before.
    """
    _room_for_one_more(T, steps, "linspace_open")
    return linspace(T, steps + 1)[:-1]


def leading_open(T: int, steps: int, offset: int = 0) -> Timesteps:
    """Multiples of T // (steps + 1) from the first on, plus `offset`: for T=1000, steps=50: 950, 931, ..., 38, 19.

    The "leading" of diffusers' DPM-Solver.
    """
    _room_for_one_more(T, steps, "leading_open")
    return leading(T, steps + 1, offset)[:-1]


def _room_for_one_more(T: int, steps: int, spacing: str) -> None:
    if steps >= T:
        raise ValueError(
            f"steps must be in 1..{T - 1} for spacing={spacing!r}, which leaves timestep 0 out, got {steps}; "
            'use spacing="trailing"'
        )


def sections(T: int, counts: Sequence[int]) -> Timesteps:
    """Cut 0..T-1 into len(counts) nearly equal parts and take counts[i] evenly spread timesteps of part i.

    Part 0 is the one nearest the data; earlier parts get the remainder of T / len(counts); the first and the last
    timestep of a part are both taken.
    """
    base, extra = divmod(T, len(counts))
    chosen: list[int] = []
    first = 0
    for i, count in enumerate(counts):
        size = base + (i < extra)
        if not 1 <= count <= size:
            raise ValueError(
                f"steps: section {i} of {len(counts)} holds {size} of the {T} timesteps, so it can give 1 to {size} "
                f"of them, got {count}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            # Summed rather than multiplied out, because ties near .5 then fall as in OpenAI's respacing.
            chosen.append(first + round(position))
            position += stride
        first += size
    return np.array(chosen[::-1], dtype=np.int64)


def ddim_stride(T: int, steps: int) -> Timesteps:
    """Every s-th timestep from 0, for the smallest whole s that gives exactly `steps` of them ("ddim50")."""
    for stride in range(1, T + 1):
        if len(range(0, T, stride)) == steps:
            return np.array(range(0, T, stride)[::-1], dtype=np.int64)
    raise ValueError(
        f'steps: no whole stride takes exactly {steps} of {T} timesteps, as "ddim{steps}" asks; '
        f'use steps={steps} with spacing="trailing" instead'
    )


def explicit(T: int, timesteps: Sequence[int]) -> Timesteps:
    """The caller's own list, which must be strictly descending and inside 0..T-1."""
    values = [_as_int("steps", t) for t in timesteps]
    if not values:
        raise ValueError("steps must name at least one timestep, got an empty list")
    for earlier, later in itertools.pairwise(values):
        if later >= earlier:
            raise ValueError(f"steps, given as a list, must be strictly descending, got {later} after {earlier}")
    if values[0] >= T or values[-1] < 0:
        worst = values[0] if values[0] >= T else values[-1]
        raise ValueError(f"steps, given as a list, must lie in 0..{T - 1}, got {worst}")
    return np.array(values, dtype=np.int64)


EVEN: dict[str, Callable[[int, int], Timesteps]] = {
    "trailing": trailing,
    "trailing_floor": trailing_floor,
    "linspace": linspace,
    "linspace_open": linspace_open,
}
OFFSET: dict[str, Callable[[int, int, int], Timesteps]] = {"leading": leading, "leading_open": leading_open}
SPACINGS = (*OFFSET, *EVEN, "sections", "explicit")

Steps = int | str | Sequence[int] | None


def timesteps_for(T: int, steps: Steps = None, spacing: str | None = None, steps_offset: int = 0) -> Timesteps:
    """Resolve `steps` and `spacing` into the list of timesteps, highest first.

    steps: None (all T); an int (that many, spread by `spacing`, default "trailing"); a list (the timesteps
        themselves, or with spacing="sections" the count of each section); a string "10,10,20" (section counts) or
        "ddim50" (a whole stride).
    spacing: one of SPACINGS or None.
    steps_offset: added to every timestep of spacing "leading" or "leading_open".
    Raises ValueError or TypeError, naming `steps` or `spacing`, for what cannot be resolved.
    """
    if spacing is not None and spacing not in SPACINGS:
        raise ValueError(
            f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}; pass a list of timesteps as steps="
        )
    if steps_offset and spacing not in OFFSET:
        raise ValueError(f'steps_offset={steps_offset} belongs to spacing="leading", got spacing={spacing!r}')
    if isinstance(steps, str):
        return _from_text(T, steps, spacing)
    if steps is not None and not isinstance(steps, (int, np.integer)):
        counts = _as_list(steps)
        if spacing == "sections":
            if not counts:
                raise ValueError("steps must give at least one section count, got an empty list")
            return sections(T, [_as_int("steps", c) for c in counts])
        if spacing not in (None, "explicit"):
            raise ValueError(f"steps given as a list is the timesteps themselves and takes no spacing, got {spacing!r}")
        return explicit(T, counts)
    count = T if steps is None else _as_int("steps", steps)
    if spacing == "explicit":
        raise ValueError(f'spacing="explicit" needs steps as a descending list of timesteps, got {steps!r}')
    if not 1 <= count <= T:
        raise ValueError(f"steps must be in 1..{T} (the schedule's number of timesteps), got {count}")
    if spacing == "sections":
        return sections(T, [count])
    if spacing in OFFSET:
        return _inside(T, OFFSET[spacing](T, count, _as_int("steps_offset", steps_offset)), steps_offset)
    return EVEN[spacing or "trailing"](T, count)


def _inside(T: int, result: Timesteps, offset: int) -> Timesteps:
    if result[0] >= T or result[-1] < 0:
        outside = result[0] if result[0] >= T else result[-1]
        raise ValueError(
            f"steps_offset={offset} with {len(result)} leading steps reaches timestep {outside}, outside 0..{T - 1}; "
            "lower steps_offset or steps"
        )
    return result


def _from_text(T: int, text: str, spacing: str | None) -> Timesteps:
    if spacing not in (None, "sections"):
        raise ValueError(f'steps={text!r} is a section count and takes only spacing="sections", got {spacing!r}')
    stride = text.startswith("ddim")
    try:
        counts = [int(part) for part in text.removeprefix("ddim").split(",")]
    except ValueError:
        counts = []
    if not counts or (stride and len(counts) != 1):
        raise ValueError(f'steps as text must look like "10,10,20" or "ddim50", got {text!r}')
    return ddim_stride(T, counts[0]) if stride else sections(T, counts)


def _as_list(steps: object) -> list[int]:
    try:
        return list(steps.tolist() if hasattr(steps, "tolist") else steps)  # type: ignore[call-overload,arg-type]
    except TypeError:
        raise TypeError(f"steps must be an int, a list of ints or text, got {type(steps).__name__}") from None


def _as_int(name: str, value: object) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be made of ints, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be made of ints, got {value!r}") from None
