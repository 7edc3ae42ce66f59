"""What the compilers make of the kernels, executed on the CPU and compared with the reference; needs no GPU.

    python -m gpu_check.compiled_code --out FILE.json [--all] [--rehearse] [--minutes M]

Every op and the layers of the fused plans are compiled by Triton for sm_90 and sm_80, as they would be launched, and
the PTX runs in gpu_check/ptx, which watches every access; with nvcc so do the ops' CUDA kernels, for sm_90. What
NVIDIA's assembler makes of the PTX, and how fast it is, stays to be seen on a GPU. --all: every candidate of every
layer, overlapping launches, more layers. --rehearse: a few of each.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from . import compiled_layers, compiled_ops
from .findings import Findings, parser

CAPABILITIES = (90, 80)
REHEARSED_OPS = ("normal bfloat16", "ddpm_step with every option", "group_norm_silu float32 channels_last")
REHEARSED_LAYERS = ("down2.conv2, pooled", "down4.conv1 of one image, split")


@contextmanager
def overlapping(on: bool) -> Iterator[None]:
    """Kernels of fused plans are launched to overlap (`launch.OVERLAP`), which adds an instruction to wait."""
    from ddpm_fast.backends.triton import launch

    before, launch.OVERLAP = launch.OVERLAP, on
    try:
        yield
    finally:
        launch.OVERLAP = before


def op_row(case: compiled_ops.OpCase, capability: int) -> list[dict[str, Any]]:
    """An op compiled and executed beside the reference's answer."""
    from ddpm_fast.backends import reference, triton

    from .ptx import launches

    with launches(capability) as done:
        got = case.call(triton)
    wrong = case.difference(got, case.call(reference))
    approximate = {name for launch in done for name in launch.approximate}
    if wrong is None and approximate:
        wrong = f"instructions that a GPU rounds in its own way: {', '.join(sorted(approximate))}"
    return [_row(case.name, capability, wrong, done) | {"exact": case.exact}]


def cuda_row(case: compiled_ops.OpCase, capability: int) -> list[dict[str, Any]]:
    """An op by the CUDA kernels, as nvcc compiles them, beside the reference's answer."""
    from ddpm_fast.backends import native, native_batch_norm, native_norm, native_rms_norm, reference

    from .ptx import cuda

    functions: dict[str, Any] = {}
    for module in (native_batch_norm, native_norm, native_rms_norm, native):
        functions |= vars(module)
    with cuda.as_native(capability) as done:
        got = case.call(SimpleNamespace(**functions))
        wrong = None if done else "no kernel was launched"
        row = _row(f"{case.name}, CUDA", capability, wrong, done)
    wrong = wrong or case.difference(got, case.call(reference))
    if wrong is None and row["approximate"]:
        wrong = f"instructions that a GPU rounds in its own way: {', '.join(row['approximate'])}"
    return [row | {"wrong": wrong, "exact": case.exact}]


def layer_rows(
    case: compiled_layers.LayerCase, capability: int, count: int | None, overlap: bool
) -> list[dict[str, Any]]:
    """Candidates of a layer compiled and executed beside float64."""
    from .ptx import launches

    with overlapping(overlap):
        found = compiled_layers.executed(case, capability, launches, count)
    return [
        _row(f"{case.name}: {one['candidate']}{', overlapping' * overlap}", capability, one["wrong"], one["launched"])
        | {"error": one["error"]}
        for one in found
    ]


def cuda_missing() -> str | None:
    """What is missing to compile the CUDA kernels, or None."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH: it comes with the CUDA toolkit"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed: pip install pybind11"
    return None


def _row(name: str, capability: int, wrong: str | None, done: list[Any]) -> dict[str, Any]:
    return {
        "case": name,
        "capability": capability,
        "wrong": wrong,
        "kernels": [launch.kernel for launch in done],
        "instructions": [launch.instructions for launch in done],
        "hazards": [line for launch in done for line in launch.hazards],
        "approximate": sorted({name for launch in done for name in launch.approximate}),
    }


def work(findings: Findings, everything: bool) -> list[str]:
    """All cases; what they found as a short table."""
    tasks: list[tuple[str, Callable[..., list[dict[str, Any]]], tuple[Any, ...]]] = []
    few = findings.rehearsal
    for capability in CAPABILITIES:
        for case in compiled_ops.cases():
            if not few or case.name in REHEARSED_OPS:
                tasks.append((f"{case.name} for sm_{capability}", op_row, (case, capability)))
        layers = compiled_layers.FEW + (compiled_layers.MORE if everything else [])
        for layer in layers:
            if not few or layer.name in REHEARSED_LAYERS:
                arguments = (layer, capability, None if everything else 1, everything and capability >= 90)
                tasks.append((f"{layer.name} for sm_{capability}", layer_rows, arguments))
    if not few:
        if missing := cuda_missing():
            findings.leave_out(f"the CUDA kernels: {missing}")
        else:
            cuda_cases = compiled_ops.cases()
            tasks += [(f"{case.name}, CUDA", cuda_row, (case, CAPABILITIES[0])) for case in cuda_cases]
    rows: list[dict[str, Any]] = []
    began = time.monotonic()
    for name, function, given in tasks:
        found = findings.attempt(name, function, *given) or []
        for row in found:
            if row["wrong"] is not None:
                findings.fail(f"{row['case']} for sm_{row['capability']}: {row['wrong']}")
        rows += found
        findings.add(cases=rows)
    findings.leave_out("what the assembler makes of the PTX, and its speed: those need a GPU")
    if few:
        findings.leave_out("all but a few cases: run it without --rehearse, which needs no GPU either")
    elif not everything:
        findings.leave_out("the other candidates of each layer, more layers, overlapping launches: --all")
    table = [f"{'compiled for':14}{'cases':>7}{'wrong':>7}{'warp instructions':>20}"]
    for capability in CAPABILITIES:
        mine = [row for row in rows if row["capability"] == capability]
        wrong, total = sum(row["wrong"] is not None for row in mine), sum(sum(row["instructions"]) for row in mine)
        table.append(f"sm_{capability:<11}{len(mine):>7}{wrong:>7}{total:>20,}")
    return [*table, f"executed on the CPU in {time.monotonic() - began:.0f} s"]


def main() -> int:
    options = parser("compiled_code", __doc__)
    options.add_argument("--all", action="store_true", help="every candidate, overlapping launches, more layers")
    chosen = options.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        print(
            "gpu_check.compiled_code: error: TRITON_INTERPRET=1 is set, with which nothing is compiled; unset it",
            file=sys.stderr,
        )
        return 2
    findings = Findings(
        "compiled_code", chosen.out, torch.device("cpu"), rehearsal=chosen.rehearse, minutes=chosen.minutes
    )
    findings.write()
    table = work(findings, chosen.all)
    findings.write()
    print("\n".join([*table, "", *findings.ending()]), flush=True)
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())
