"""The baseline to beat: `torch.compile` of the whole step.

C16   network with BatchNorm folded, bfloat16, channels_last, and update: freezing on a CPU, max-autotune on a GPU
C32   the same in float32

On a CPU a few sets of options are tried and the fastest correct one taken. On a GPU each takes minutes:
gpu_check.search tries them, and here the best one known is built (compile_options.py).
"""

from __future__ import annotations

import contextlib
import time
import types
import warnings
from contextlib import AbstractContextManager
from typing import Any

import torch
from baselines import Baseline, Step, StepGraph, whole_step
from candidate import Problem, check
from compile_options import Options, Outcome, Store, best_first, for_gpu, key, named, told
from packages import Missing
from plain import Plain, cast


class Compiled(Baseline):
    """The best correct one of a list of option sets; `notes` tells what each of them gave.

    On a GPU the compiled step is captured in a CUDA graph of ours: it feeds on its own output, which the graphs that
    torch.compile makes would have to copy.
    """

    most: int | None = None  # option sets to try on a CPU; None: all
    found: Store | None = None  # what a search on this GPU has found

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(dtype)
        short = {torch.bfloat16: "16", torch.float32: "32"}[dtype]
        self.id = f"C{short}"
        self.what = f"torch.compile of the whole step, {str(dtype).removeprefix('torch.')}"
        self.flags = ""

    def options(self) -> list[Options]:
        """Option sets for torch._inductor.config."""
        if self.problem.device.type == "cpu":
            # fallback_random: torch's own generator. Inductor's does not vectorise on a CPU and can cost more than the
            # network. cpp_wrapper: no Python between the kernels, which pays where they are short.
            wrappers = (False, True) if self.problem.case.n <= 16 else (False,)
            return [{"freezing": True, "fallback_random": True, "cpp_wrapper": cpp} for cpp in wrappers]
        return for_gpu()

    def network(self, problem: Problem) -> Plain:
        return cast(problem.plain().folded(), self.dtype)

    def guard(self) -> AbstractContextManager[Any]:
        stack = contextlib.ExitStack()
        stack.enter_context(torch.no_grad())  # freezing does not work under inference_mode
        # Compiled again later, it would be under other options.
        stack.enter_context(torch.compiler.set_stance("fail_on_recompile"))
        return stack

    def make(self, network: Plain) -> Step:
        gpu, problem = self.problem.device.type == "cuda", self.problem
        order, known = self.options()[: self.most], list[Outcome]()
        torch._dynamo.reset()
        if gpu:
            known = self.found.outcomes(key(problem.case, self.dtype, problem.device)) if self.found else []
            order = best_first(known, self.options())
        tried: list[tuple[float, Options, Step, StepGraph | None]] = []
        notes = []
        for options in order:
            try:
                self.build(network, options)
            except Exception as failure:  # whatever a compiler may raise; another option set may work
                first = (str(failure).splitlines() or [""])[0]
                notes.append(f"{named(options)}: {type(failure).__name__}: {first[:120]}")
                continue
            error, verdict = check(self, problem)
            best = min(self._once() for _ in range(5)) if verdict != "wrong" else float("inf")
            notes.append(f"{named(options)}: {verdict}, error {error:.1e}, {best * 1e3:.2f} ms")
            tried.append((best, options, self.step, self.captured))
            if gpu and verdict != "wrong":
                break
        if not tried:
            raise Missing("torch.compile failed: " + ("; ".join(notes) or told(known, len(self.options()))))
        _, options, self.step, self.captured = min(tried, key=lambda item: item[0])
        self.notes = "; ".join(notes) if len(notes) > 1 else ""
        if gpu:
            self.notes = "; ".join(filter(None, [told(known, len(self.options())), self.notes]))
        layout = "NCHW" if self.dtype == torch.float32 else "channels_last"
        prepared = ", ".join(filter(None, [network.folds, str(self.dtype), layout]))
        self.flags = (
            f"torch.compile(step, fullgraph=True, dynamic=False) of {network.what} ({prepared}) and update with "
            f"randn_like, no_grad, float32 state{', in a torch.cuda.CUDAGraph' if gpu else ''}; "
            f"torch._inductor.config: {named(options)}"
        )
        return self.step

    def build(self, network: Plain, options: Options) -> None:
        """The step compiled under these options, captured on a GPU. Raises whatever the compiler raises."""
        self.step = compiled(whole_step(network, self.problem, self.dtype), options, self.problem)
        on_gpu = self.problem.device.type == "cuda"
        self.captured = StepGraph(self.step, self.problem, self.guard) if on_gpu else None

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
