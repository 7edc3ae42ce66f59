"""Every op, forward and backward, on both backends of the GPU against the reference on the CPU; and our plan layers.

    python -m gpu_check.exactness --out FILE.json [--minutes M] [--rehearse] [--seed S] [--only OP,...]

Results that are promised bit for bit must be the reference's bits; others no further from float64 than their tolerance
or than the reference. Inputs are random, outputs are poisoned and guarded. --rehearse: the C++ half and Triton's
interpreter on the CPU, a handful of cases each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import secrets
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from gpu_check import op_checks
from gpu_check.files import save
from gpu_check.op_cases import DTYPES, RULES
from gpu_check.workers import Task, deadline, serve, spread, with_path

ROOT = Path(__file__).resolve().parents[2]
BACKENDS = ("native", "triton")
NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}
GOLDEN = ROOT / "tests" / "data" / "golden_normal.json"

LARGE_SAMPLES, LARGE_BYTES = 2**20 + 5, 48 * 2**30
"""Samples of 2048 elements, so that more than 2^31 are numbered, and the memory that has to be free for it."""

MOST_WORKERS = 15

CUT_OFF = "all that is not listed: the run did not come to its end"


def tasks(rehearse: bool, only: Iterable[str] = ()) -> list[Task]:
    """What there is to do, what matters most first; of a few ops only, if named."""
    chosen = tuple(only) or tuple(RULES)
    result: list[Task] = [{"kind": "golden", "name": "golden noise", "backend": backend} for backend in BACKENDS]
    for dtypes in (("float32",), ("bfloat16", "float16")):
        for backend in reversed(BACKENDS):  # Triton compiles, which takes longest
            result += [
                {"kind": "op", "name": op, "backend": backend, "dtype": dtype} for dtype in dtypes for op in chosen
            ]
        if not only and (dtypes[0] == "bfloat16" or not rehearse):
            result += [{**of_network("network", name, dtypes[0]), "needs": 45} for name in NETWORKS]
    if only:
        return result
    many = "as with 2^31 elements" if rehearse else "over 2^31 elements"
    result += [{"kind": "large", "name": many, "backend": backend} for backend in BACKENDS]
    if not rehearse:
        result += [{**of_network("plan", name, dtype), "needs": 75} for dtype in PLANNED for name in NETWORKS]
    return result


NETWORKS = ("UNet", "UNet down to 1x1", "DDPMUNet", "RMSNormUNet")
PLANNED = ("bfloat16", "float32")


def of_network(kind: str, name: str, dtype: str) -> Task:
    """A task of network_checks.py."""
    return {"kind": kind, "name": f"{name}, {kind}", "network": name, "backend": "triton", "dtype": dtype}


def do(task: Task) -> Task:
    """One task, in a child process or in this one."""
    device = torch.device(task["device"])
    backend, seed, seconds, small = task["backend"], task["seed"], task["seconds"], task["rehearse"]
    try:
        if task["kind"] == "golden":
            result = op_checks.check_golden(backend, device, json.loads(GOLDEN.read_text()))
        elif task["kind"] == "op":
            dtype = NAMES[task["dtype"]]
            result = op_checks.check_op(task["name"], backend, dtype, device, seed=seed, seconds=seconds, small=small)
        elif task["kind"] == "large":
            result = large(backend, device, seed, seconds, small)
        else:
            from gpu_check.network_checks import check_layers, check_plan

            check = check_plan if task["kind"] == "plan" else check_layers
            result = check(task["network"], NAMES[task["dtype"]], device, small)
    except Exception as error:  # a child has to answer
        text = (str(error).strip().splitlines() or [""])[0]
        result = op_checks.Result(failures=[f"{task['name']} {backend}: {type(error).__name__}: {text}"])
        result.dead = device.type == "cuda"  # what is left of it is not to be trusted
    return dataclasses.asdict(result)


def large(backend: str, device: torch.device, seed: int, seconds: float, small: bool) -> op_checks.Result:
    """The ops over many samples; in a rehearsal few."""
    if small:
        ops = ("normal", "add_bias_temb")
        return op_checks.check_all_large(backend, device, seed=seed, seconds=seconds, n=77, ops=ops)
    free = torch.cuda.mem_get_info(device)[0]
    if free < LARGE_BYTES:
        why = f"{free / 2**30:.0f} GiB of GPU memory are free, {LARGE_BYTES / 2**30:.0f} are needed"
        return op_checks.Result(not_done=[f"over 2^31 elements, {backend}: {why}"])
    return op_checks.check_all_large(backend, device, seed=seed, seconds=seconds, n=LARGE_SAMPLES)


def gather(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per thing and backend, its dtypes together."""
    table: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        one = table.setdefault(
            (row["name"], row["backend"]),
            {"name": row["name"], "backend": row["backend"], "promise": row["promise"], "cases": 0, "outputs": 0}
            | {"equal": 0, "ulp": 0.0, "error": 0.0, "seconds": 0.0, "failures": 0},
        )
        for name in ("cases", "outputs", "equal", "seconds"):
            one[name] += row[name]
        for name in ("ulp", "error"):
            one[name] = max(one[name], row[name])
        one["failures"] += len(row["failures"])
    return list(table.values())


def promise(task: Task) -> str:
    """In a word, what is asked of a task's results."""
    if task["kind"] == "op":
        kinds = set(RULES[task["name"]])
        return "bits" if kinds == {"same"} else "bits, and close sums" if "same" in kinds else "close"
    return {"golden": "bits", "large": "as above"}.get(task["kind"], "close")


def show(rows: list[dict[str, Any]]) -> None:
    """The table, on standard output."""
    print(f"{'op':<26}{'backend':<9}{'promise':<22}{'cases':>6}{'equal bits':>13}{'largest error':>15}{'seconds':>9}")
    for row in gather(rows):
        found = f"{row['error']:.1e} rel" if row["error"] else f"{row['ulp']:.1f} ulp" if row["ulp"] else ""
        equal = f"{row['equal']}/{row['outputs']}" if row["outputs"] else ""
        verdict = f"  FAILED ({row['failures']})" if row["failures"] else ""
        print(
            f"{row['name']:<26}{row['backend']:<9}{row['promise']:<22}{row['cases']:>6}{equal:>13}{found:>15}"
            f"{row['seconds']:>9.1f}{verdict}"
        )
    print("ulp: in units of the last place of the largest exact value of the output; rel: of the norms")


def main(argv: list[str] | None = None) -> int:
    """Spread the tasks, write the results as they come, print the table."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options.add_argument("--minutes", type=float, default=float("inf"), metavar="M")
    options.add_argument("--rehearse", action="store_true", help="tiny, on the CPU")
    options.add_argument("--seed", type=int, help="of the random inputs; drawn if not given, and written down")
    options.add_argument("--only", default="", metavar="OP,...", help="these ops alone")
    options.add_argument("--workers", type=int, help="child processes")
    given = options.parse_args(argv)
    only = [name for name in given.only.split(",") if name]
    unknown = [name for name in only if name not in RULES]
    if unknown:
        options.error(f"--only takes ops of ddpm_fast/ops/_schema.py, got {', '.join(unknown)}")
    if not given.rehearse and not torch.cuda.is_available():
        print("exactness: no NVIDIA GPU here; run it on a machine with one, or with --rehearse", file=sys.stderr)
        return 2
    from machine import facts

    device = torch.device("cpu" if given.rehearse else "cuda:0")
    seed = secrets.randbits(40) if given.seed is None else given.seed
    rows: list[dict[str, Any]] = []
    figures: dict[str, Any] = {
        "stage": "exactness",
        "machine": facts(device),
        "rehearsal": given.rehearse,
        "ok": False,
        "failures": [],
        "not_done": [CUT_OFF],
        "seed": seed,
        "results": rows,
    }
    if given.rehearse:
        figures["not_done"].append("whatever a compiled kernel does on a GPU: this was a rehearsal on the CPU")

    def done(task: Task, answer: Task | str) -> None:
        what = " ".join(task[key] for key in ("name", "backend", "dtype") if key in task)
        if isinstance(answer, str):
            # The tasks of networks have no clock of their own: one that was not done in time has failed in nothing.
            late = "needs" in task and answer.startswith("no answer")
            answer = dataclasses.asdict(op_checks.Result(**{"not_done" if late else "failures": [f"{what}: {answer}"]}))
        rows.append({key: task.get(key, "") for key in ("kind", "name", "backend", "dtype")} | answer)
        rows[-1]["promise"] = promise(task)
        figures["failures"] += answer["failures"]
        figures["not_done"] += answer["not_done"]
        for failure in answer["failures"]:
            print(f"exactness: {failure}", file=sys.stderr, flush=True)
        save(given.out, figures)

    environment = with_path({name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"})
    environment |= {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if given.rehearse else {})
    workers = given.workers or (2 if given.rehearse else max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 1)))
    common = {"device": str(device), "seed": seed, "rehearse": given.rehearse}
    began = time.monotonic()
    left = spread(
        [{**task, **common} for task in tasks(given.rehearse, only)],
        workers,
        [sys.executable, "-m", "gpu_check.exactness", "--worker"],
        environment,
        until=deadline(given.minutes),
        done=done,
    )
    figures["not_done"].remove(CUT_OFF)
    figures["not_done"] += [f"{task['name']} {task['backend']} {task.get('dtype', '')}: out of time" for task in left]
    ran = {(row["name"], row["backend"]) for row in rows if row["cases"]}
    for name in only or RULES:
        figures["failures"] += [
            f"{name} {backend}: no case was run" for backend in BACKENDS if (name, backend) not in ran
        ]
    figures["seconds"] = round(time.monotonic() - began, 1)
    figures["ok"] = not figures["failures"]
    save(given.out, figures)
    show(rows)
    for failure in figures["failures"]:
        print(f"FAILED: {failure}")
    for line in figures["not_done"]:
        print(f"not done: {line}")
    print(f"exactness: {'ok' if figures['ok'] else 'FAILED'}, {figures['seconds']:.0f} s, seed {seed}")
    return 0 if figures["ok"] else 1


def worker() -> int:
    """A child: one thread, no TF32, and Triton's interpreter where it is asked for."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return serve(do)


if __name__ == "__main__":
    sys.exit(worker() if "--worker" in sys.argv else main())
