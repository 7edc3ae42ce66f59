"""The stages of gpu_check.sh in their order: proofs first, then figures. A stage is a few commands and a time limit.

In commands {python} is the interpreter, {out} the folder of results, {root} the checkout, {minutes} what is left of the
stage's time when the command starts, {workers} how many tests run at a time.
"""

from __future__ import annotations

import dataclasses

LONGEST = 600  # seconds of a stage, at the most


@dataclasses.dataclass(frozen=True)
class Stage:
    """A step of a run. limit: seconds for all of its commands, which run one after the other, whatever became of the
    one before unless `strict`. environment: variables besides those of the caller.
    """

    name: str
    what: str
    limit: int
    commands: tuple[tuple[str, ...], ...]
    strict: bool = False
    environment: tuple[tuple[str, str], ...] = ()


def module(name: str, *options: str) -> tuple[str, ...]:
    """The command that runs a module of this package, its results in {out}/<name>.json."""
    return ("{python}", "-m", f"gpu_check.{name}", "--out", f"{{out}}/{name}.json", *options)


def bench(section: str, *options: str, device: str = "cuda") -> tuple[str, ...]:
    """The command that runs a section of benchmarks/run.py."""
    run = ("{python}", "{root}/benchmarks/run.py", "--device", device, "--minutes", "{minutes}")
    return (*run, "--only", section, "--out", f"{{out}}/{section}.json", *options)


def rehearsed(command: tuple[str, ...]) -> tuple[str, ...]:
    """The same with its results in a folder of their own, where nobody takes them for measurements."""
    return tuple(word.replace("{out}/", "{out}/rehearsal/") for word in command)


def pytest_run(*arguments: str, spread: bool = False) -> tuple[str, ...]:
    """The command that runs tests, whole files per worker, or `spread` one by one: some files have most of those that
    need a GPU."""
    whole = ("--dist", "worksteal") if spread else ("--dist", "loadfile", "--no-loadscope-reorder")
    return ("{python}", "-m", "pytest", "-q", "-n", "{workers}", *whole, "-p", "no:cacheprovider", *arguments)


REQUIRE = (("DDPM_FAST_REQUIRE_GPU", "1"),)

STAGES = (
    Stage(
        "build",
        "builds the extension in place, then every op on the device against the reference, bit for bit where promised",
        180,
        (module("build"), module("exactness", "--minutes", "{minutes}")),
        strict=True,
    ),
    Stage(
        "suite-gpu",
        "the tests that need the device; a skip for lack of it is a failure",
        LONGEST,
        (pytest_run("-m", "gpu", "{root}/tests", spread=True),),
        environment=REQUIRE,
    ),
    Stage(
        "sanitize",
        "the op tests under compute-sanitizer: memcheck, and racecheck of what shares memory",
        LONGEST,
        (module("sanitize", "--minutes", "{minutes}"),),
    ),
    Stage(
        "limits", "the rate of a large copy and of a large bf16 product; what a launch costs", 120, (module("limits"),)
    ),
    Stage(
        "loop",
        "whole-loop sampling: no host sync in a profile, one image's bits whatever the batch, seconds of 1000 steps",
        LONGEST,
        (module("loop", "--minutes", "{minutes}"),),
    ),
    Stage(
        "search",
        "which options make torch.compile fastest; goes on where an earlier call stopped",
        LONGEST,
        (module("search", "--minutes", "{minutes}"),),
    ),
    Stage("ops", "every op, both backends, against eager and torch.compile, 64 Mi elements", LONGEST, (bench("ops"),)),
    Stage(
        "sampler",
        "sampling steps of the tutorial's U-Net beside every baseline",
        LONGEST,
        (bench("sampler", "--n", "1,64,512,16"),),
    ),
    Stage(
        "paper",
        "the same of ddpm-cifar10-32's network, the baselines being diffusers' own",
        LONGEST,
        (bench("paper", "--n", "64,1"),),
    ),
    Stage(
        "tune",
        "every candidate of every layer timed: cuDNN against the Triton kernels; steps per graph; norms",
        LONGEST,
        (module("tune", "--minutes", "{minutes}"),),
    ),
    Stage(
        "suite-rest",
        "the tests that need no device",
        LONGEST,
        (pytest_run("-m", "not gpu", "{root}/tests"),),
        environment=REQUIRE,
    ),
    Stage("report", "one result file, tables, plots and the summary; needs no GPU", 120, (module("report"),)),
)

REHEARSED = ("exactness", "sanitize", "limits", "loop", "search", "tune")
"""Modules whose code also runs on a CPU, at tiny sizes."""

DRY_STAGES = (
    Stage("build", "builds the extension in place, with its CUDA half", LONGEST, (module("build"),), strict=True),
    Stage(
        "static",
        "compiles every kernel for sm_80 and sm_90; registers, spills, tensor cores, width of access, instructions",
        LONGEST,
        (module("static", "--minutes", "{minutes}"),),
    ),
    Stage(
        "compiled",
        "executes what the compilers made of the kernels, instruction by instruction, on the CPU",
        LONGEST,
        (module("compiled_code", "--minutes", "{minutes}"),),
    ),
    Stage(
        "shim",
        "runs the CUDA kernels as C++ under AddressSanitizer and UBSan",
        LONGEST,
        (pytest_run("{root}/tests/test_cuda_on_cpu.py"),),
    ),
    Stage(
        "rehearsal",
        "the scripts of the real run at tiny sizes on the CPU, so that no time on a GPU is lost to a slip",
        LONGEST,
        (
            *(rehearsed(module(name, "--rehearse")) for name in REHEARSED),
            rehearsed(bench("sampler", "--n", "1", "--candidates", "F16,E32", "--seconds", "0.2", device="cpu")),
            rehearsed(module("report", "--rehearse")),
        ),
    ),
)


def chosen(names: list[str], dry_run: bool) -> list[Stage]:
    """The stages of these names in the order of a run; all of them for no names. ValueError for an unknown one."""
    stages = DRY_STAGES if dry_run else STAGES
    known = [stage.name for stage in stages]
    for name in names:
        if name not in known:
            kind = "stage of a dry run" if dry_run else "stage"
            raise ValueError(f"there is no {kind} {name!r}; there are {', '.join(known)}")
    return [stage for stage in stages if not names or stage.name in names]
