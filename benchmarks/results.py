"""A result file: its fields, reading, writing, checking, and the figures that follow from what was measured.

    {"schema": 1, "machine": {...}, "settings": {...}, "peaks": {...}, "ops": [...], "cases": [...], "drift": ...,
     "host": [...], "training": [...]}

A case has the candidates' seconds per step of every round (`rounds_s`); medians and ratios are computed from them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timing import Timing, ratios

SCHEMA = 1
STATUSES = ("ok", "inaccurate", "wrong", "missing")
TRAINER = "T16"
OURS = ("F16", "S16", "F32", "S32")

TUTORIAL, PAPER, LUCIDRAINS = "tutorial 3x32x32", "ddpm-cifar10-32", "lucidrains 3x32x32"
_TOP: dict[str, type] = {"schema": int, "machine": dict, "settings": dict, "peaks": dict, "ops": list, "cases": list}
_CASE = {"name": str, "n": int, "shape": list, "macs": int, "parameters": int, "candidates": list, "layers": str}
_HOST = {"scheduler": str, "what": str, "status": str, "reason": str, "rounds_s": dict}
_TRAINING = {"id": str, "what": str, "status": str, "reason": str, "rounds_s": list}
_CANDIDATE = {"id": str, "what": str, "flags": str, "dtype": str, "notes": str, "status": str, "rounds_s": list}


def _require(where: str, value: Any, fields: Mapping[str, type]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {type(value).__name__}")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f"{where}.{name} must be a {kind.__name__}, got {value.get(name)!r:.60}")


def validate(result: Any) -> dict[str, Any]:
    """The result itself; ValueError naming the field that is not as it should be."""
    _require("result", result, _TOP)
    if result["schema"] != SCHEMA:
        raise ValueError(f"result.schema must be {SCHEMA}, got {result['schema']}; measure again with this version")
    for i, case in enumerate(result["cases"]):
        _require(f"cases[{i}]", case, _CASE)
        for j, candidate in enumerate(case["candidates"]):
            where = f"cases[{i}].candidates[{j}]"
            _require(where, candidate, _CANDIDATE)
            if candidate["status"] not in STATUSES:
                raise ValueError(f"{where}.status must be one of {', '.join(STATUSES)}, got {candidate['status']!r}")
            timed = candidate["status"] in ("ok", "inaccurate")
            if timed != bool(candidate["rounds_s"]):
                raise ValueError(f"{where}: {candidate['status']!r} with {len(candidate['rounds_s'])} rounds")
    for i, figures in enumerate(result.get("training") or []):
        _require(f"training[{i}]", figures, {"case": str, "n": int, "candidates": list})
        for j, record in enumerate(figures["candidates"]):
            _require(f"training[{i}].candidates[{j}]", record, _TRAINING)
    for i, row in enumerate(result.get("host") or []):
        _require(f"host[{i}]", row, _HOST)
        if (row["status"] == "ok") != (set(row["rounds_s"]) == {"ours", "diffusers"}):
            raise ValueError(f"host[{i}]: {row['status']!r} with rounds of {sorted(row['rounds_s'])}")
    return dict(result)


def load(path: Path) -> dict[str, Any]:
    """Read and check a result file."""
    try:
        return validate(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save(result: dict[str, Any], path: Path) -> None:
    """Check and write a result file, atomically."""
    text = json.dumps(validate(result), indent=1, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(path.suffix + ".part")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


SAME = ("device", "gpu", "cpu", "cuda", "cudnn", "driver", "threads", "python", "ddpm_fast", "commit", "versions")
"""Facts of the machine in which runs must agree to be one result."""


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Several runs of one machine and commit as one result. What a later one has measured again replaces the earlier.

    A ratio stays within a run: a case moves with all its candidates, an op with its baselines and its run's copy rate.
    Raises ValueError where the runs differ in machine, versions or commit.
    """
    first, *others = parts
    for part in others:
        for name in SAME:
            one, two = first["machine"].get(name), part["machine"].get(name)
            if one != two:
                raise ValueError(f"runs of different machines, versions or commits: {name} is {one!r} and {two!r}")
    merged = {**first, "cases": [], "ops": [], "training": [], "host": [], "drift": None, "peaks": {}}
    for part in parts:
        here = {_about(case) for case in part["cases"]}
        merged["cases"] = [case for case in merged["cases"] if _about(case) not in here] + part["cases"]
        merged["ops"] = _merged_ops(merged["ops"], part["ops"])
        again = {(figures["case"], figures["n"]) for figures in part.get("training") or []}
        kept = [figures for figures in merged["training"] if (figures["case"], figures["n"]) not in again]
        merged["training"] = kept + (part.get("training") or [])
        merged["host"] = part.get("host") or merged["host"]
        merged["drift"] = part.get("drift") or merged["drift"]
        rates = merged["peaks"]
        merged["peaks"] = {n: max(part["peaks"].get(n, 0.0), rates.get(n, 0.0)) for n in {**rates, **part["peaks"]}}
    runs = [run for part in parts for run in part["settings"].get("runs", [part["settings"]])]
    words = " | ".join(" ".join(run["argv"]) or "default" for run in runs)
    dates = sorted({part["machine"].get("date", "") for part in parts} - {""})
    if dates:
        merged["machine"] = {**first["machine"], "date": ", ".join(dates)}
    merged["settings"] = {"argv": [words], "took_s": sum(run["took_s"] for run in runs), "runs": runs}
    return validate(merged)


def _about(case: dict[str, Any]) -> str:
    told = [case["name"], case["n"], case["shape"], case.get("network"), case.get("options")]
    return json.dumps(told, sort_keys=True)


def _op(name: str) -> str:
    """The op of a check that failed, whose name may end with the backend's."""
    op, _, backend = name.rpartition(", ")
    return op if backend in ("native", "triton") else name


def _merged_ops(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ops of several runs; those of the same dtype and size that `after` has, too, are left out of `before`."""
    kept = []
    for figures in before:
        again: set[str] = set()
        for later in after:
            if (later["dtype"], later["elements"]) == (figures["dtype"], figures["elements"]):
                again |= {row["op"] for row in later["cases"]} | {_op(name) for name in later["failed"]}
        rest = [row for row in figures["cases"] if row["op"] not in again]
        wrong = {name: why for name, why in figures["failed"].items() if _op(name) not in again}
        if rest or wrong:
            kept.append({**figures, "cases": rest, "failed": wrong})
    return kept + after


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def timed(case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The candidates that have a speed, by id."""
    return {c["id"]: c for c in case["candidates"] if c["rounds_s"]}


def ours(case: dict[str, Any]) -> str | None:
    """The candidate that stands for ddpm_fast: the fused bfloat16 plan where it was measured."""
    found = timed(case)
    return next((name for name in OURS if name in found), None)


def speed(candidate: dict[str, Any]) -> Timing:
    """Seconds per step."""
    return Timing.of(candidate["rounds_s"])


def speed_up(case: dict[str, Any], baseline: str, fast: str | None = None) -> Timing | None:
    """How many times as long as ours a step of the baseline takes, paired by rounds; None where one has no speed."""
    found = timed(case)
    fast = ours(case) if fast is None else fast
    if fast not in found or baseline not in found:
        return None
    return ratios(found[baseline]["rounds_s"], found[fast]["rounds_s"])


def floor(case: dict[str, Any], peaks: dict[str, float], dtype: str = "bfloat16") -> float | None:
    """Seconds that a step cannot go below by library means: its multiply-adds at the matrix product's measured rate,
    or its weights at the measured rate of reading, whichever is longer. None where a peak was not measured.

    Counted for convolutions done directly: algorithms that multiply less (Winograd, dense products at 2x2) may pass it.
    """
    if dtype not in peaks or "read" not in peaks:
        return None
    size = 2 if dtype == "bfloat16" else 4
    compute: float = 2 * case["macs"] * case["n"] / peaks[dtype]
    stream: float = size * case["parameters"] / peaks["read"]
    return max(compute, stream)


def best_baseline(case: dict[str, Any]) -> str | None:
    """The fastest correct candidate that is not ours."""
    others = {n: speed(c).median for n, c in timed(case).items() if n not in OURS and c["status"] == "ok"}
    return min(others, key=others.__getitem__) if others else None


def host_ratio(row: dict[str, Any]) -> Timing | None:
    """How many times as long as ours diffusers' `scheduler.step` takes; None where it was not measured."""
    rounds = row["rounds_s"]
    return ratios(rounds["diffusers"], rounds["ours"]) if rounds else None


def training_ratio(figures: dict[str, Any], baseline: str) -> Timing | None:
    """How many times as long as ours a training step of the baseline takes; None of ours and where one has no speed."""
    found = timed(figures)
    if baseline == TRAINER or baseline not in found or TRAINER not in found:
        return None
    return ratios(found[baseline]["rounds_s"], found[TRAINER]["rounds_s"])


def best_in_training(figures: dict[str, Any]) -> str | None:
    """The fastest correct way of training that is not ours."""
    others = {i: speed(c).median for i, c in timed(figures).items() if i != TRAINER and c["status"] == "ok"}
    return min(others, key=others.__getitem__) if others else None
