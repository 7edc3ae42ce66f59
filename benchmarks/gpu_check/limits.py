"""What this GPU does at the most, measured: copies, matrix products, a convolution, launches. Under a minute.

    python -m gpu_check.limits --out FILE.json [--rehearse] [--minutes M]

Everything runs on random data. nvidia-smi is asked and never told: the card is measured as it is found.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .clock import MOST_CALLS, Clock, interleaved, setting
from .findings import Findings, parser, run
from .launch_costs import launches

MIB = 2**20
ASKED = (
    *("driver_version", "clocks.current.sm", "clocks.current.memory", "clocks.max.sm", "clocks.max.memory"),
    *("power.draw", "power.limit", "temperature.gpu", "utilization.gpu"),
)
REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # its name since driver 535, and before
FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32, "float32": torch.float32}
ERRORS = {"bfloat16": 1e-2, "float16": 2e-3, "tf32": 2e-3, "float32": 1e-5}
"""Relative to a float64 product: above, the rate would be that of a wrong result."""
CHECKED_ROWS = 4


def card(device: torch.device) -> dict[str, Any]:
    """What the device says of itself."""
    found = torch.cuda.get_device_properties(device)
    names = (
        *("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size"),
        *("shared_memory_per_multiprocessor", "shared_memory_per_block_optin", "regs_per_multiprocessor"),
    )
    free, _ = torch.cuda.mem_get_info(device)
    return {name: getattr(found, name, None) for name in names} | {"free_memory": free}


def clocks(device: torch.device) -> dict[str, str]:
    """Clocks, power and what holds them back, now, in nvidia-smi's own words; empty where it cannot be asked."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {}
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    which = ("-i", uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}") if uuid else ()

    def ask(fields: tuple[str, ...]) -> dict[str, str]:
        command = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", *which]
        try:
            told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        except (OSError, subprocess.SubprocessError):
            return {}
        values = [value.strip() for value in told.strip().splitlines()[0].split(",")] if told.strip() else []
        return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}

    found = ask(ASKED)
    for name in REASONS:
        told = ask((name,))
        if told:
            return found | told
    return found


def copies(clock: Clock, sizes: list[int]) -> list[dict[str, Any]]:
    """Per size of a buffer in bytes: bytes a second of copying it (read and written), filling it, reading it."""
    rows = []
    for size in sizes:
        source = torch.empty(size // 4, device=clock.device).uniform_()
        target = torch.empty_like(source)
        matrix, vector = source.view(-1, 4096), torch.ones(4096, device=clock.device)
        total, product = torch.empty((), device=clock.device), torch.empty(len(matrix), device=clock.device)
        runs = {
            "copy": functools.partial(target.copy_, source),
            "copy by a kernel": functools.partial(torch.mul, source, 1.5, out=target),
            "fill": functools.partial(target.fill_, 1.0),
            "read, sum": functools.partial(torch.sum, source, dim=0, out=total),
            "read, matrix x vector": functools.partial(torch.mv, matrix, vector, out=product),
        }
        moved = {name: 2 * size if name.startswith("copy") else size for name in runs}
        times = interleaved(clock, runs)
        rates = {name: moved[name] / timing.median for name, timing in times.items()}
        rows.append({"bytes": size, "bytes_per_second": rates, "seconds": {n: vars(t) for n, t in times.items()}})
    return rows


def products(clock: Clock, edge: int) -> list[dict[str, Any]]:
    """Of matrix products edge^3 per type: FLOP/s (a multiply-add is two) and the error against float64."""
    runs: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    for name, dtype in FLOATS.items():
        a, b = (torch.randn(edge, edge, device=clock.device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def multiply(a: Tensor = a, b: Tensor = b, out: Tensor = out, tf32: bool = name == "tf32") -> None:
            with setting(torch.backends.cuda.matmul, "allow_tf32", tf32):
                torch.mm(a, b, out=out)

        multiply()
        expected = a[:CHECKED_ROWS].double() @ b.double()
        errors[name] = float((out[:CHECKED_ROWS].double() - expected).norm() / expected.norm())
        del expected
        runs[name] = multiply
    times = interleaved(clock, runs, turn=2e-2)
    return [
        {
            "type": name,
            "edge": edge,
            "flop_per_second": 2.0 * edge**3 / timing.median,
            "seconds": vars(timing),
            "error": errors[name],
        }
        for name, timing in times.items()
    ]


def convolution(clock: Clock, n: int, channels: int, side: int) -> dict[str, Any]:
    """FLOP/s of a large 3x3 convolution in bfloat16, channels_last, by the library's fastest algorithm."""
    x = torch.randn(n, channels, side, side, device=clock.device).to(torch.bfloat16, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=clock.device) / (3 * channels**0.5)
    weight = weight.to(torch.bfloat16, memory_format=torch.channels_last)
    with setting(torch.backends.cudnn, "benchmark", True):
        timing = interleaved(clock, {"conv": lambda: torch.nn.functional.conv2d(x, weight, padding=1)}, turn=2e-2)[
            "conv"
        ]
    flop = 2.0 * n * side * side * 9 * channels * channels
    return {"shape": [n, channels, side, side], "flop_per_second": flop / timing.median, "seconds": vars(timing)}


def under_load(clock: Clock, edge: int) -> dict[str, str]:
    """`clocks` while the device multiplies matrices."""
    a = torch.randn(edge, edge, device=clock.device).to(torch.bfloat16)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)
    begun = clock.seconds(functools.partial(torch.mm, a, a, out=out), 10)
    for _ in range(min(MOST_CALLS, round(1.5 / max(begun, 1e-4)))):
        torch.mm(a, a, out=out)
    time.sleep(0.3)
    told = clocks(clock.device)
    clock.wait()
    return told


def measure(findings: Findings) -> list[str]:
    """Everything, the ceilings first."""
    device, small = findings.device, findings.rehearsal
    clock = Clock(device)
    if clock.on_gpu:
        found = findings.attempt("the card", card, device)
        findings.add(card=found, clocks_at_rest=findings.attempt("clocks", clocks, device) or {})
        if found:
            findings.say(
                f"{found['name']}: {found['multi_processor_count']} multiprocessors, "
                f"L2 {(found['L2_cache_size'] or 0) / MIB:.0f} MiB, {found['total_memory'] / 2**30:.0f} GiB"
            )
    else:
        findings.leave_out("the card, its clocks, CUDA graphs: only a GPU has them")

    sizes = [MIB // 4, MIB] if small else [64 * MIB, 256 * MIB, 1024 * MIB, 4096 * MIB]
    rows: list[dict[str, Any]] = []
    for size in sizes:
        rows += findings.attempt(f"copies of {size / MIB:g} MiB", copies, clock, [size]) or []
        findings.add(copies=rows)
    large = [row["bytes_per_second"] for row in rows if row["bytes"] >= sizes[len(sizes) // 2]]
    if large:
        findings.add(copy_bytes_per_second=max(max(r["copy"], r["copy by a kernel"]) for r in large))
        findings.add(read_bytes_per_second=max(max(r["read, sum"], r["read, matrix x vector"]) for r in large))
    findings.say(f"{'buffer':<12}{'what':<26}{'GB/s':>9}")
    for row in rows:
        findings.say(
            *[f"{row['bytes'] / MIB:>6g} MiB  {n:<26}{r / 1e9:>9.1f}" for n, r in row["bytes_per_second"].items()]
        )

    if (made := findings.attempt("matrix products", products, clock, 128 if small else 8192)) is not None:
        findings.add(products=made, product_flop_per_second={row["type"]: row["flop_per_second"] for row in made})
        for row in made:
            findings.say(f"product {row['edge']}^3, {row['type']:<10}{row['flop_per_second'] / 1e12:>9.2f} TFLOP/s")
            if not row["error"] <= ERRORS[row["type"]]:
                findings.fail(f"a {row['type']} product has a relative error of {row['error']:.2g} against float64")
    shape = (2, 16, 8) if small else (512, 256, 32)
    if (conv := findings.attempt("a convolution", convolution, clock, *shape)) is not None:
        findings.add(convolution=conv)
        findings.say(f"3x3 convolution, bfloat16  {conv['flop_per_second'] / 1e12:>9.2f} TFLOP/s of {conv['shape']}")
    with torch.inference_mode():  # as sampling does; a view less to keep account of
        launches(findings, clock)
    if clock.on_gpu:
        told_then = findings.attempt("clocks under load", under_load, clock, 128 if small else 8192)
        findings.add(clocks_under_load=told_then or {})
        for name in ("clocks_at_rest", "clocks_under_load"):
            told = ", ".join(f"{field} {value}" for field, value in findings.figures[name].items())
            findings.say(f"{name.replace('_', ' ')}: {told or 'nvidia-smi could not be asked'}")
    return []


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    return run("limits", parser("limits", __doc__).parse_args(argv), measure)


if __name__ == "__main__":
    sys.exit(main())
