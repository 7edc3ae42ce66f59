"""One op on one backend: its cases run on a device, guarded and poisoned, compared with the reference on the CPU."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import ddpm_fast
from gpu_check.guards import Guarded, guarded_allocations
from gpu_check.op_cases import CLOSE, CLOSE_SUMS, RULES, TOLERANCES, Case, build, cases

REPORTED = 3
"""Failures of one op that are described."""

TILED, LARGE_SHAPE = 5, (5, 32, 8, 8)
"""Samples of a large case are these few, again and again."""


@dataclasses.dataclass
class Result:
    """What a task found. ulp: the largest error where bits are not promised, in units of the last place of the largest
    exact value. error: of a network, relative to its output. dead: the device answers no more, so that this process is
    of no use."""

    cases: int = 0
    outputs: int = 0
    equal: int = 0
    ulp: float = 0.0
    error: float = 0.0
    seconds: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)
    not_done: list[str] = dataclasses.field(default_factory=list)
    dead: bool = False


def run(case: Case, arguments: Sequence[Any]) -> dict[str, Tensor]:
    """Call the op; its results, and what it writes, by name."""
    op = getattr(torch.ops.ddpm_fast, case.op).default
    with torch.no_grad():
        returned = op(*arguments)
    named = {
        argument.name: value
        for argument, value in zip(op._schema.arguments, arguments, strict=True)
        if argument.alias_info is not None and argument.alias_info.is_write and value is not None
    }
    results = returned if isinstance(returned, tuple) else () if returned is None else (returned,)
    return {**named, **{f"result {k}": value for k, value in enumerate(results)}}


def rules(case: Case, names: Iterable[str]) -> dict[str, str]:
    """Which rule each output of `run` is held to."""
    kinds = RULES[case.op]
    return {name: kinds[int(name.split()[1])] if name.startswith("result ") else "same" for name in names}


def copied(arguments: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """The same arguments in memory of their own; floating point in `dtype` if given."""
    result = []
    for value in arguments:
        if isinstance(value, Tensor):
            new = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
            value = new.to(dtype) if dtype is not None and value.is_floating_point() else new
        result.append(value)
    return result


def expected_of(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the reference answers, and in float64 where an output is held to that."""
    with ddpm_fast.use_backend("reference"):
        expected = run(case, copied(case.arguments))
        if all(rule == "same" for rule in rules(case, expected).values()):
            return expected, {}
        return expected, run(case, copied(case.arguments, torch.float64))


def difference(rule: str, got: Tensor, expected: Tensor, exact: Tensor | None) -> tuple[Tensor | None, float]:
    """Where `got` is not as it should be (None: nowhere), and its error in units of the last place."""
    if rule == "same" or exact is None or not expected.is_floating_point():
        same = got == expected
        if got.is_floating_point():
            same |= got.isnan() & expected.isnan()
        return (None if bool(same.all()) else ~same), 0.0
    if got.numel() == 0:
        return None, 0.0
    closeness = {"close": CLOSE, "sums": CLOSE_SUMS}.get(rule, {})
    tolerance = closeness.get(got.dtype, TOLERANCES["reduction"])
    largest = exact.abs().max()
    error, of_reference = (got.double() - exact).abs(), (expected.double() - exact).abs().max()
    limit = tolerance["atol"] + tolerance["rtol"] * exact.abs()
    if rule == "close":  # 8 ulp of the largest: 3 of SiLU, 4 operations before it, and the statistics
        limit = limit.clamp_min(2**-20 * float(largest))
    elif rule == "sums":  # each term may be off by an ulp of itself, and what is left of them may be small
        limit = limit + 2**-18 * largest
    wrong = ~(error <= limit.clamp_min(float(of_reference)))
    spacing = torch.finfo(got.dtype).eps * 2.0 ** torch.floor(torch.log2(largest.clamp_min(1e-30)))
    return (wrong if bool(wrong.any()) else None), min(float(error.max() / spacing), 1e12)


def describe(case: Case, name: str, wrong: Tensor, got: Tensor, expected: Tensor) -> str:
    """One line: how many elements are wrong, the first of them, and the inputs that it came of."""
    at = tuple(int(i) for i in wrong.nonzero()[0])
    line = (
        f"{case.op} {case.what}: {int(wrong.sum())} of {wrong.numel()} elements of {name} differ, first at {at}: "
        f"got {got[at].item()!r}, expected {expected[at].item()!r}"
    )
    schema = getattr(torch.ops.ddpm_fast, case.op).default._schema.arguments
    inputs = []
    for argument, value in zip(schema, case.arguments, strict=True):
        if isinstance(value, Tensor) and value.shape == wrong.shape:
            inputs.append(f"{argument.name}={value[at].item()!r}")
        elif isinstance(value, Tensor) and value.dim() == 1 and len(at) > 1 and value.shape[0] == wrong.shape[1]:
            inputs.append(f"{argument.name}[{at[1]}]={value[at[1]].item()!r}")
    return line + (f"; inputs there: {', '.join(inputs)}" if inputs else "")


def check(case: Case, device: torch.device, result: Result) -> None:
    """Run one case with the backend that is in use, and count what was found."""
    expected, exact = expected_of(case)
    placed = [Guarded(value, device) if isinstance(value, Tensor) else value for value in case.arguments]
    arguments = [value.view if isinstance(value, Guarded) else value for value in placed]
    with guarded_allocations() as made:
        got = run(case, arguments)
    result.cases += 1
    failures = []
    for name, rule in rules(case, got).items():
        mine, theirs = got[name].cpu(), expected[name]
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            failures.append(
                f"{case.op} {case.what}: {name} is {mine.dtype} {tuple(mine.shape)}, "
                f"expected {theirs.dtype} {tuple(theirs.shape)}"
            )
            continue
        wrong, ulp = difference(rule, mine, theirs, exact.get(name))
        result.outputs += 1
        result.equal += torch.equal(mine.nan_to_num(), theirs.nan_to_num())
        result.ulp = max(result.ulp, ulp)
        if wrong is not None:
            failures.append(describe(case, name, wrong, mine, theirs))
    schema = getattr(torch.ops.ddpm_fast, case.op).default._schema.arguments
    for argument, before, after in zip(schema, case.arguments, placed, strict=True):
        if not isinstance(after, Guarded):
            continue
        if not after.intact():
            failures.append(f"{case.op} {case.what}: wrote beside {argument.name}")
        written = argument.alias_info is not None and argument.alias_info.is_write
        if not written and not torch.equal(after.view.cpu().nan_to_num(), before.nan_to_num()):
            failures.append(f"{case.op} {case.what}: changed its input {argument.name}")
    failures += [f"{case.op} {case.what}: wrote beside what {where} allocated" for where, x in made if not x.intact()]
    result.failures += failures[: max(0, REPORTED - len(result.failures))]


def attempt(what: str, device: torch.device, result: Result, action: Any) -> bool:
    """Run `action`; an exception is a failure. Whether the device still answers."""
    try:
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # whatever it is, the other cases are to be run
        text = str(error).strip().splitlines() or [""]
        result.failures.append(f"{what}: {type(error).__name__}: {text[0]}")
        if device.type == "cuda":
            try:
                torch.cuda.synchronize(device)
            except RuntimeError:
                result.dead = True
    return not result.dead


def check_op(
    op: str, backend: str, dtype: torch.dtype, device: torch.device, *, seed: int, seconds: float, small: bool = False
) -> Result:
    """All cases of an op in a dtype, for at most so many seconds."""
    result, began = Result(), time.perf_counter()
    with ddpm_fast.use_backend(backend):
        listed = list(cases(op, dtype, seed, small))
        for k, case in enumerate(listed):
            if time.perf_counter() - began > seconds or result.dead:
                why = "the device had failed" if result.dead else "out of time"
                result.not_done.append(f"{op} {backend} {dtype}: {len(listed) - k} of {len(listed)} cases: {why}")
                break
            attempt(f"{op} {case.what}", device, result, lambda case=case: check(case, device, result))
    result.seconds = time.perf_counter() - began
    return result


def check_golden(backend: str, device: torch.device, golden: list[dict[str, Any]]) -> Result:
    """The noise of tests/data/golden_normal.json: words, and the exclusive or of many."""
    result, began = Result(), time.perf_counter()
    with ddpm_fast.use_backend(backend):
        for wanted in golden:
            n, elements = (1, len(wanted["bits"])) if "bits" in wanted else (64, wanted["elements"])
            keyed = {name: wanted[source] for name, source in GOLDEN_ARGUMENTS.items() if source in wanted}
            z = ddpm_fast.normal(n, (elements,), device=device, **keyed).cpu().numpy().view(np.uint32)
            words = (
                [f"{int(word):08x}" for word in z[0]]
                if "bits" in wanted
                else f"{int(np.bitwise_xor.reduce(z.ravel())):08x}"
            )
            same = words == wanted["bits" if "bits" in wanted else "xor_of_bits"]
            result.cases, result.outputs, result.equal = result.cases + 1, result.outputs + 1, result.equal + same
            if not same:
                result.failures.append(f"normal {backend} {keyed}: not the golden values")
    result.seconds = time.perf_counter() - began
    return result


GOLDEN_ARGUMENTS = {"seed": "seed", "first_sample": "sample", "stream": "stream"}


# ---- more than 2^31 elements ---------------------------------------------------------------------------------------


def tiled(value: Any, n: int, device: torch.device) -> Any:
    """A tensor of `TILED` samples as one of n, the same ones again and again; anything else on the device."""
    if not isinstance(value, Tensor):
        return value
    if value.shape[:1] != (TILED,):
        return value.to(device)
    return value.to(device).repeat(-(-n // TILED), *[1] * (value.dim() - 1))[:n]


def samples(case: Case, first: int, count: int) -> Case:
    """The same case for samples first ... first + count - 1 of the tiled ones."""
    schema = getattr(torch.ops.ddpm_fast, case.op).default._schema.arguments
    arguments = []
    for argument, value in zip(schema, case.arguments, strict=True):
        if isinstance(value, Tensor) and argument.name == "rng":
            value = torch.stack([value[0], value[1] + first])
        elif isinstance(value, Tensor) and value.shape[:1] == (TILED,):
            value = value[torch.arange(first, first + count) % TILED].clone()
        arguments.append(value)
    return Case(case.op, f"samples {first} ... of {case.what}", tuple(arguments))


def check_large(op: str, n: int, device: torch.device, result: Result, seed: int) -> None:
    """An op over n samples of 2048 elements: some of them against the reference, all of them finite, nothing beside."""
    variant = {"batch_norm_silu": 2, "q_sample": 4}.get(op, 0)
    case = build(op, LARGE_SHAPE, torch.bfloat16, "contiguous", variant, seed)
    case = Case(op, f"bfloat16 ({n}, 32, 8, 8)", case.arguments)
    with guarded_allocations() as made:
        got = run(case, [tiled(value, n, device) for value in case.arguments])
    result.cases += 1
    failures = [f"{op} {case.what}: wrote beside what {where} allocated" for where, x in made if not x.intact()]
    middle = min(2**20, n // 2)  # sample 2^20 begins at element 2^31
    for first, count in ((0, 2), (middle - 2, 4), (n - 2, 2)):
        part = samples(case, first, count)
        expected, exact = expected_of(part)
        for name, rule in rules(case, got).items():
            if got[name].shape[:1] != (n,):
                continue
            mine, theirs = got[name][first : first + count].cpu(), expected[name]
            wrong, ulp = difference(rule, mine, theirs, exact.get(name))
            result.outputs += 1
            result.equal += torch.equal(mine, theirs)
            result.ulp = max(result.ulp, ulp)
            if wrong is not None:
                failures.append(describe(part, name, wrong, mine, theirs))
    for name, value in got.items():
        if value.is_floating_point():
            bad = sum(int((~part.isfinite()).sum()) for part in value.flatten().split(2**28))
            if bad:
                failures.append(f"{op} {case.what}: {bad} elements of {name} are not finite or were not written")
    result.failures += failures[:REPORTED]


SLICEABLE = tuple(op for op in RULES if op not in ("random_bits", "batch_norm_silu_backward"))
"""Ops whose samples do not depend on each other (of a batch's statistics, the running ones); int64 would be 17 GB."""


def check_all_large(
    backend: str, device: torch.device, *, seed: int, seconds: float, n: int, ops: Iterable[str] = SLICEABLE
) -> Result:
    """The ops over more elements than an int32 can number."""
    result, began = Result(), time.perf_counter()
    with ddpm_fast.use_backend(backend):
        for op in ops:
            if time.perf_counter() - began > seconds or result.dead:
                result.not_done.append(f"large {backend}: {op}: {'device failed' if result.dead else 'out of time'}")
                continue
            attempt(f"large {op} {backend}", device, result, lambda op=op: check_large(op, n, device, result, seed))
            if device.type == "cuda" and not result.dead:
                torch.cuda.empty_cache()
    result.seconds = time.perf_counter() - began
    return result
