"""Which options make torch.compile fastest on a GPU: the list to try, and a file of what came of each.

A set takes minutes to compile, so gpu_check.search tries them one by one and keeps the outcomes here. The benchmark
then compiles the best set anew and times it beside ours: a time from this file never stands in a ratio.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from candidate import Case

Options = dict[str, Any]
Outcome = dict[str, Any]
"""key: what it is about. options: for torch._inductor.config. status: "ok", "inaccurate", "wrong", "failed" or "out of
time". ms: of a step, None without one. error: relative, of m. took_s: to build, check and time it. reason: of a
failure. when: the date."""

SOURCES = ("plain.py", "networks.py", "baselines.py")  # what a baseline computes


def for_gpu() -> list[Options]:
    """Sets of options, the most promising first."""
    common = {
        "max_autotune": True,
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
    }
    order = [
        (False, True, "ATEN"),
        (False, True, "ATEN,TRITON"),
        (False, False, "ATEN"),
        (True, True, "ATEN"),
        (True, True, "ATEN,TRITON"),
        (False, False, "ATEN,TRITON"),
        (True, False, "ATEN"),
        (True, False, "ATEN,TRITON"),
    ]
    return [
        {**common, "epilogue_fusion": fused, "max_autotune_conv_backends": backends, "freezing": freezing}
        for freezing, fused, backends in order
    ]


@functools.cache
def _source() -> str:
    parts = [(Path(__file__).parent / name).read_bytes() for name in SOURCES]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def key(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What an outcome holds for: the machine's software, the network, the batch. JSON-ready."""
    on_gpu = device.type == "cuda"
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    found = {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else "none",
        "torch": torch.__version__,
        "triton": triton,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "network": case.network,
        "n": case.n,
        "shape": list(case.shape),
        "network_options": dict(case.options),
        "dtype": str(dtype).removeprefix("torch."),
        "source": _source(),
    }
    result: dict[str, Any] = json.loads(json.dumps(found))  # tuples become lists, as in a file
    return result


class Unreadable(ValueError):
    """A file that should hold outcomes and does not."""


class Store:
    """Outcomes, read from several files and written to the last of them after every addition.

    Raises Unreadable naming a file that is none of ours.
    """

    def __init__(self, places: Iterable[Path]) -> None:
        self.places = list(places)
        self._own: list[Outcome] = []
        self._others: list[Outcome] = []
        for place in self.places:
            if place.exists():
                try:
                    found = json.loads(place.read_text(encoding="utf-8"))["outcomes"]
                except (ValueError, KeyError, TypeError) as error:
                    raise Unreadable(f"{place} is no file of outcomes ({error!r}); remove it") from error
                (self._own if place == self.places[-1] else self._others).extend(found)

    def outcomes(self, about: dict[str, Any]) -> list[Outcome]:
        """Those of this key, one per set of options: the latest file's, the latest there."""
        found: dict[str, Outcome] = {}
        for outcome in [*self._others, *self._own]:
            if outcome["key"] == about:
                found[json.dumps(outcome["options"], sort_keys=True)] = outcome
        return list(found.values())

    def add(self, outcome: Outcome) -> None:
        """In the place of an earlier one of the same key and options; the file is written whole or not at all."""
        same = (outcome["key"], outcome["options"])
        self._own = [old for old in self._own if (old["key"], old["options"]) != same] + [outcome]
        place = self.places[-1]
        place.parent.mkdir(parents=True, exist_ok=True)
        part = place.with_suffix(place.suffix + ".part")
        part.write_text(json.dumps({"outcomes": self._own}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(place)


def best_first(tried: list[Outcome], every: list[Options]) -> list[Options]:
    """What to build: the sets that were right, the fastest first, then those never tried; none that failed."""
    right = [outcome for outcome in tried if outcome["ms"] is not None]
    right.sort(key=lambda outcome: (outcome["status"] != "ok", outcome["ms"]))
    known = [outcome["options"] for outcome in tried]
    return [outcome["options"] for outcome in right] + [options for options in every if options not in known]


def named(options: Options) -> str:
    """A set in words."""
    return ", ".join(f"{name}={value}" for name, value in options.items())


def told(tried: list[Outcome], every: int) -> str:
    """What came of the sets, for a report."""
    if not tried:
        return f"no search for the best of {every} option sets was made; the first that worked"
    days = sorted({outcome["when"] for outcome in tried})
    parts = []
    for outcome in tried:
        differs = {name: outcome["options"][name] for name in list(outcome["options"])[-3:]}
        ms = "no time" if outcome["ms"] is None else f"{outcome['ms']:.3f} ms"
        why = f": {outcome['reason']}" if outcome["reason"] else ""
        parts.append(f"{named(differs)}: {outcome['status']}{why}, {ms}")
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    head = f"{len(tried)} of {every} option sets, {when}, the best of which was compiled and timed anew"
    return f"{head}: {'; '.join(parts)}"
