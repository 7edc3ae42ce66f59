"""The baseline to beat: `torch.compile` of the whole step.

C16   network with BatchNorm folded, bfloat16, channels_last, and update: freezing on a CPU, max-autotune on a GPU,
      where a grid of options is tried and the fastest correct one taken
C32   the same in float32
"""

from __future__ import annotations

import contextlib
import itertools
import time
import types
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from baselines import Baseline, Step, StepGraph, whole_step
from candidate import Problem, check
from packages import Missing
from plain import Plain, cast


class Compiled(Baseline):
    """The best correct one of a list of option sets; `notes` tells what each of them gave.

    On a GPU the compiled step is captured in a CUDA graph of ours: it feeds on its own output, which the graphs that
    torch.compile makes would have to copy.
    """

    most: int | None = None  # option sets to try; None: all

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(dtype)
        short = {torch.bfloat16: "16", torch.float32: "32"}[dtype]
        self.id = f"C{short}"
        self.what = f"torch.compile of the whole step, {str(dtype).removeprefix('torch.')}"
        self.flags = ""

    def options(self) -> list[dict[str, Any]]:
        """Option sets for torch._inductor.config."""
        if self.problem.device.type == "cpu":
            # fallback_random: torch's own generator. Inductor's does not vectorise on a CPU and can cost more than the
            # network. cpp_wrapper: no Python between the kernels, which pays where they are short.
            wrappers = (False, True) if self.problem.case.n <= 16 else (False,)
            return [{"freezing": True, "fallback_random": True, "cpp_wrapper": cpp} for cpp in wrappers]
        common = {
            "max_autotune": True,
            "conv_1x1_as_mm": True,
            "coordinate_descent_tuning": True,
            "coordinate_descent_check_all_directions": True,
        }
        # The paper's network compiles for minutes: fewer sets.
        fusion = (True, False) if self.problem.case.network == "tutorial" else (True,)
        grid = itertools.product((False, True), fusion, ("ATEN", "ATEN,TRITON"))
        return [
            {**common, "epilogue_fusion": fused, "max_autotune_conv_backends": backends, "freezing": freezing}
            for freezing, fused, backends in grid
        ]

    def network(self, problem: Problem) -> Plain:
        return cast(problem.plain().folded(), self.dtype)

    def guard(self) -> AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.no_grad())  # freezing does not work under inference_mode
        # Compiled again later, it would be under other options.
        stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
        return stack

    def make(self, network: Plain) -> Step:
        torch._dynamo.reset()
        gpu = self.problem.device.type == "cuda"
        tried: list[tuple[float, str, Step, StepGraph | None]] = []
        notes = []
        layout = "NCHW" if self.dtype == torch.float32 else "channels_last"
        for options in self.options()[: self.most]:
            named = ", ".join(f"{name}={value}" for name, value in options.items())
            try:
                self.step = compiled(whole_step(network, self.problem, self.dtype), options, self.problem)
                self.captured = StepGraph(self.step, self.problem, self.guard) if gpu else None
            except Exception as failure:  # whatever a compiler may raise; another option set may work
                notes.append(f"{named}: {type(failure).__name__}: {str(failure).splitlines()[0][:120]}")
                continue
            error, verdict = check(self, self.problem)
            best = min(self._once() for _ in range(5)) if verdict != "wrong" else float("inf")
            notes.append(f"{named}: {verdict}, error {error:.1e}, {best * 1e3:.2f} ms")
            tried.append((best, named, self.step, self.captured))
        if not tried:
            raise Missing("torch.compile failed: " + "; ".join(notes))
        _, named, step, self.captured = min(tried, key=lambda item: item[0])
        self.notes = "; ".join(notes) if len(notes) > 1 else ""
        prepared = ", ".join(filter(None, [network.folds, str(self.dtype), layout]))
        self.flags = (
            f"torch.compile(step, fullgraph=True, dynamic=False) of {network.what} ({prepared}) and update with "
            f"randn_like, no_grad, float32 state{', in a torch.cuda.CUDAGraph' if gpu else ''}; "
            f"torch._inductor.config: {named}"
        )
        return step

    def _once(self) -> float:
        start = time.perf_counter()
        self.run(1)
        if self.problem.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def compiled(step: Step, options: dict[str, Any], problem: Problem) -> Step:
    """`step` compiled for this problem under these Inductor options; the first call, which compiles, has been made."""
    import torch._inductor.config as config

    # Dynamo keeps what it compiled by code object: a copy of it keeps the option sets apart.
    fresh = types.FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)
    with config.patch(**options), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")  # version checks
        result: Step = torch.compile(fresh, fullgraph=True, dynamic=False)
        for _ in range(2):
            result(problem.x, problem.rows[:1])
    return result
