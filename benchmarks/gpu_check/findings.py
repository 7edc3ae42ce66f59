"""The JSON file that a module of this package leaves, written again after every part: a run cut off keeps its figures.

{"stage": ..., "machine": {...}, "rehearsal": false, "ok": true, "failures": [], "not_done": [], ...its figures}
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from machine import facts, progress

from .files import save

R = TypeVar("R")


class Findings:
    """What a module has found so far. device: what it measures; rehearsal: the same code on a CPU at tiny sizes.

    minutes: no part begins once they are over; None for no end.
    """

    def __init__(self, stage: str, out: Path, device: torch.device, *, rehearsal: bool, minutes: float | None) -> None:
        self.stage, self.out, self.device, self.rehearsal = stage, out, device, rehearsal
        self.failures: list[str] = []
        self.not_done: list[str] = []
        self.figures: dict[str, Any] = {}
        self._machine = facts(device)
        self._end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def add(self, **figures: Any) -> None:
        """Figures, or a list that an earlier call gave and that has grown; the file has them at once."""
        self.figures |= figures
        self.write()

    def say(self, *lines: str) -> None:
        """Lines of a table, at once: a run that is cut off has shown what it had."""
        print("\n".join(lines), flush=True)

    def fail(self, line: str) -> None:
        """A check that did not hold, in one line."""
        self.failures.append(line)
        progress(f"FAILED: {line}")

    def leave_out(self, line: str) -> None:
        """What was not done, and why."""
        self.not_done.append(line)

    def attempt(self, what: str, part: Callable[..., R], *arguments: Any) -> R | None:
        """part(*arguments), unless the time is over. An exception fails the run and leaves the other parts alone; on a
        GPU without the memory a part counts as not done."""
        if time.monotonic() >= self._end:
            self.leave_out(f"{what}: no time left")
            return None
        progress(f"{self.stage}: {what}")
        try:
            return part(*arguments)
        except torch.cuda.OutOfMemoryError:
            self.leave_out(f"{what}: not enough memory on the device")
        except Exception as error:  # whatever it is, it must not take the other parts' figures with it
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            self.fail(f"{what}: {type(error).__name__}: {first}")
        finally:
            self.write()
        return None

    def write(self) -> None:
        """The file, whole or not at all."""
        result = {
            "stage": self.stage,
            "machine": self._machine,
            "rehearsal": self.rehearsal,
            "ok": not self.failures,
            "failures": self.failures,
            "not_done": self.not_done,
            **self.figures,
        }
        save(self.out, result)

    def ending(self) -> list[str]:
        """The last lines of the output: what was not done, what failed."""
        return [
            *(f"not done: {line}" for line in self.not_done),
            *(f"FAILED: {line}" for line in self.failures),
            *(["a rehearsal on the CPU: no figure here says anything"] if self.rehearsal else []),
            f"{self.stage}: {'failed' if self.failures else 'ok'}",
        ]


def parser(stage: str, description: str | None) -> argparse.ArgumentParser:
    """The options that every module has."""
    result = argparse.ArgumentParser(
        prog=f"gpu_check.{stage}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    result.add_argument("--rehearse", action="store_true", help="the same code on the CPU, at tiny sizes")
    result.add_argument("--minutes", type=float, metavar="M", help="begin nothing new after so many minutes")
    return result


def run(stage: str, options: argparse.Namespace, work: Callable[[Findings], list[str]]) -> int:
    """Measure, write, print; the exit code: 0, 1 where a check failed, 2 without a GPU.

    work: says its tables as they come, and returns the lines that are to stand last.
    """
    if not options.rehearse and not torch.cuda.is_available():
        print(
            f"gpu_check.{stage}: error: torch {torch.__version__} finds no NVIDIA GPU here; "
            "--rehearse runs the same code on the CPU",
            file=sys.stderr,
        )
        return 2
    # With its index, so that it compares equal to where tensors and modules say that they are.
    device = torch.device("cpu") if options.rehearse else torch.device("cuda", torch.cuda.current_device())
    findings = Findings(stage, options.out, device, rehearsal=options.rehearse, minutes=options.minutes)
    findings.write()
    last = work(findings)
    findings.write()
    findings.say("", *last, *findings.ending())
    return 1 if findings.failures else 0
