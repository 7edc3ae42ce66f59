"""The ops' benchmark: each op of cases.py beside eager PyTorch and torch.compile, and its share of the copy bandwidth.

    python benchmarks/op_speed.py [--device cpu] [--elements 4194304] [--dtype float32] [--only ddpm_step] [--json FILE]

An op is checked against the reference backend first; one that fails its check gets no speed. On a GPU both backends,
native and Triton, run in turns with the baselines; `ddpm_fast` is the one that is taken without a request.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from cases import CASES, CHANNELS, EDGE, Case, Inputs
from machine import facts
from timing import Timing, copy_bandwidth, exceeds_cache, interleaved_rounds, ratios
from torch import Tensor

import ddpm_fast
from ddpm_fast import backends

BASELINES = ("eager", "torch.compile")


def first(value: object) -> Tensor:
    """The first of an op's results, or the only one."""
    return _results(value, 1)[0]


def _results(value: object, count: int) -> list[Tensor]:
    found = list(value)[:count] if isinstance(value, (tuple, list)) else [value]
    return [result for result in found if isinstance(result, Tensor)]


def taken(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that serves an op here: the one asked for, else the first of the resolver's order that can."""
    asked = backends.requested()
    return asked or next(n for n in backends.ORDER if backends.unavailable_reason(n, device, dtype) is None)


def measured(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The backends that are measured here: on a GPU all that can run but the reference, elsewhere the one taken."""
    if device.type != "cuda":
        return [taken(device, dtype)]
    able = [n for n in backends.ORDER if n != "reference" and backends.unavailable_reason(n, device, dtype) is None]
    return list(dict.fromkeys([taken(device, dtype), *able]))


def verify(case: Case, dtype: torch.dtype, device: torch.device, backend: str | None = None) -> str | None:
    """What is wrong with the op on a small input, or None: exact ops bit for bit, reductions within rounding.

    backend: the one that is checked; None: the one that is taken.
    """
    with ddpm_fast.use_backend(backend):
        got = _results(case.fast(Inputs.make(2, dtype, device)), case.checked)
    with ddpm_fast.use_backend("reference"):
        expected = _results(case.fast(Inputs.make(2, dtype, device)), case.checked)
    if case.exact:
        same = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        return None if same else "differs from the reference"
    for a, b in zip(got, expected, strict=True):
        rtol = 1e-5 if a.dtype == torch.float32 else 2**-7  # one rounding to the storage dtype on either side
        if not torch.allclose(a.float(), b.float(), rtol=rtol, atol=case.atol):
            return "further than rounding from the reference"
    return None


def measure(
    case: Case, inputs: Inputs, device: torch.device, budget: float, names: Sequence[str] = ("ddpm_fast",)
) -> dict[str, list[float]]:
    """Seconds of every round of ours, eager and torch.compile of the eager code, in turns.

    names: backends of ours; "ddpm_fast" for the one that is taken.
    """
    torch._dynamo.reset()
    candidates: dict[str, Callable[[], object]] = {}
    for name in names:
        candidates[name] = functools.partial(_served, None if name == "ddpm_fast" else name, case.fast, inputs)
    candidates["eager"] = functools.partial(case.eager, inputs)
    candidates["torch.compile"] = functools.partial(torch.compile(case.eager), inputs)
    # An image tensor alone is many times the cache at the sizes that count: nothing of it is left for the next call.
    flush = not exceeds_cache(device, inputs.x.nbytes)
    return interleaved_rounds(candidates, device, budget=budget, flush=flush)


def _served(backend: str | None, function: Callable[[Inputs], object], inputs: Inputs) -> object:
    if backend is None:
        return function(inputs)
    with ddpm_fast.use_backend(backend):
        return function(inputs)


def run_ops(
    device: torch.device,
    dtype: torch.dtype,
    *,
    elements: int | None = None,
    budget: float = 1.0,
    only: str | None = None,
    say: Callable[[str], None] = print,
    keep: Callable[[dict[str, Any]], None] = lambda figures: None,
    in_time: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Check and measure every op (or those whose name contains `only`), a line each; JSON-ready figures.

    elements: of each image tensor; None: 4 Mi on a CPU, 64 Mi on a GPU. budget: seconds for each candidate.
    keep: is given the figures so far after every op. in_time: asked before every op whether to go on.
    """
    elements = elements or (2**26 if device.type == "cuda" else 2**22)
    inputs = Inputs.make(max(1, elements // (CHANNELS * EDGE * EDGE)), dtype, device)
    bandwidth = copy_bandwidth(device, 2**26 if device.type == "cuda" else 2**25)
    name, chosen, names = str(dtype).removeprefix("torch."), taken(device, dtype), measured(device, dtype)
    figures: dict[str, Any] = {
        "dtype": name,
        "elements": inputs.x.numel(),
        "copy_bytes_per_second": bandwidth,
        "cases": [],
        "failed": {},
        "not_done": [],
    }
    say(f"{inputs.x.numel()} elements, {name}; copy {bandwidth / 1e9:.1f} GB/s; {chosen} is taken where not named")
    say(f"{'op':<26}{'':<8}{'ms':>9}{'GB/s':>8}{'of copy':>9}{'vs eager':>10}{'vs compile':>12}")
    for case in CASES:
        if only and only not in case.name:
            continue
        if not in_time():
            figures["not_done"].append(case.name)
            continue
        right = []
        for backend in names:
            try:
                wrong = verify(case, dtype, device, backend)
            except Exception as error:
                wrong = _told(error)
            if wrong is None:
                right.append(backend)
                continue
            figures["failed"][case.name if len(names) == 1 else f"{case.name}, {backend}"] = wrong
            say(f"{case.name:<26}{'' if len(names) == 1 else backend:<8}  check failed: {wrong}")
        if chosen in right:
            try:
                figures["cases"].append(_row(case, inputs, device, budget, right, chosen))
                _show(figures["cases"][-1], bandwidth, say)
            except Exception as error:  # an op that fails must not take the others' figures with it
                figures["failed"][case.name] = _told(error)
                say(f"{case.name:<26}  failed: {_told(error)}")
        keep(figures)
    if figures["not_done"]:
        say(f"no time left for {', '.join(figures['not_done'])}")
    return figures


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200}"


def _row(
    case: Case, inputs: Inputs, device: torch.device, budget: float, names: Sequence[str], chosen: str
) -> dict[str, Any]:
    """An op's figures: `seconds` of ours and of the baselines, `ratios` of theirs to ours, `backends`: both of each."""
    single = len(names) == 1
    rounds = measure(case, inputs, device, budget, ("ddpm_fast",) if single else names)
    rounds = {"ddpm_fast": rounds["ddpm_fast" if single else chosen], **rounds}

    def against(name: str) -> dict[str, Any]:
        return {baseline: vars(ratios(rounds[baseline], rounds[name])) for baseline in BASELINES}

    return {
        "op": case.name,
        "bytes": case.bytes_per_element(inputs.x.element_size()) * inputs.x.numel(),
        "backend": chosen,
        "seconds": {name: vars(Timing.of(values)) for name, values in rounds.items()},
        "ratios": against("ddpm_fast"),
        "backends": {} if single else {name: against(name) for name in names},
    }


def _show(row: dict[str, Any], bandwidth: float, say: Callable[[str], None]) -> None:
    for name, against in (row["backends"] or {"": row["ratios"]}).items():
        seconds = row["seconds"][name or "ddpm_fast"]["median"]
        say(
            f"{row['op']:<26}{name:<8}{seconds * 1e3:>9.3f}{row['bytes'] / seconds / 1e9:>8.1f}"
            f"{row['bytes'] / seconds / bandwidth:>9.0%}"
            f"{against['eager']['median']:>9.2f}x{against['torch.compile']['median']:>11.2f}x"
        )


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table; exit code 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--elements", type=int, help="of each image tensor (default: 4 Mi on a CPU, 64 Mi on a GPU)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--only", help="a case whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args(argv)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    machine = facts(device)
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    print(f"{name}, torch {torch.__version__}, commit {machine['commit']}")
    figures = run_ops(
        device,
        dtype,
        elements=options.elements,
        budget=options.seconds,
        only=options.only,
        say=lambda line: print(line, flush=True),
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, **figures}, file, indent=1)
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
