"""Runs the stages of gpu_check.sh, each with a time limit, and writes what they found into one folder.

    python -m gpu_check OUT [STAGE...] [--dry-run] [--minutes M] [--list]

OUT gets STAGE.log, the modules' JSON, stages.json (what ran, how it ended) and summary.md. A later call with the same
OUT replaces the stages that it runs and keeps the others. Exit code 0: all is well; 1: a stage failed or ran out of
time; 2: it could not start.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from . import summary
from .children import Outcome, run
from .preflight import Unfit, look
from .stages import DRY_STAGES, STAGES, Stage, chosen

ROOT = Path(__file__).resolve().parents[2]
MARGIN = 15.0
"""Seconds before its limit at which a stage's command is asked to have finished."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("out", type=Path, nargs="?", metavar="OUT", help="folder for everything that is found")
    result.add_argument("stages", nargs="*", metavar="STAGE", help="default: all; --list shows them")
    result.add_argument("--dry-run", action="store_true", help="what can be shown without a GPU")
    result.add_argument("--minutes", type=float, metavar="M", help="start and run stages for so long, no longer")
    result.add_argument("--list", action="store_true", help="show the stages and end")
    return result


def listing() -> str:
    """The stages of both kinds of run."""
    lines = []
    for title, stages in (("on a GPU:", STAGES), ("with --dry-run:", DRY_STAGES)):
        width = max(len(stage.name) for stage in stages)
        lines += [title, *(f"  {s.name:<{width}}  at most {s.limit // 60:>2} min  {s.what}" for s in stages)]
    return "\n".join(lines)


def filled(command: tuple[str, ...], out: Path, seconds: float) -> list[str]:
    """A command with its places filled in."""
    values = {
        "python": sys.executable,
        "out": str(out),
        "root": str(ROOT),
        "minutes": f"{max(seconds - MARGIN, 1.0) / 60:.2f}",
        "workers": str(max(1, min(8, (os.cpu_count() or 1) // 2 + 1))),
    }
    return [word.format(**values) for word in command]


def run_stage(stage: Stage, out: Path, seconds: float) -> summary.Record:
    """Run a stage's commands within so many seconds; its log is OUT/<stage>.log."""
    began, outcomes = time.monotonic(), list[Outcome]()
    environment = {**os.environ, **dict(stage.environment), "PYTHONUNBUFFERED": "1"}
    with (out / f"{stage.name}.log").open("w", encoding="utf-8") as log:
        for command in stage.commands:
            left = seconds - (time.monotonic() - began)
            if left <= 0 or (stage.strict and outcomes and not outcomes[-1].ok):
                outcomes.append(Outcome.not_run(filled(command, out, 0)))
                continue
            outcomes.append(run(filled(command, out, left), ROOT, environment, left, log))
    return summary.Record.of(stage.name, stage.what, seconds, time.monotonic() - began, outcomes)


def run_stages(stages: list[Stage], out: Path, minutes: float | None, report: summary.Report) -> bool:
    """Run them in turn; whether all went well. After a failed build the rest has nothing to run."""
    began = time.monotonic()
    for stage in stages:
        left = float("inf") if minutes is None else 60 * minutes - (time.monotonic() - began)
        if report.broken:
            report.add(summary.Record.skipped(stage.name, stage.what, "not run: the build failed"))
        elif left < MARGIN:
            report.add(summary.Record.skipped(stage.name, stage.what, "not run: no time left"))
        else:
            limit = min(float(stage.limit), left)
            print(f"\n== {stage.name}: {stage.what} (at most {limit:.0f} s)", flush=True)
            report.add(run_stage(stage, out, limit))
        report.write(out)
    return all(record.ok for record in report.records if record.name in {stage.name for stage in stages})


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for; the exit code."""
    options = parser().parse_intermixed_args(argv)
    if options.list:
        print(listing())
        return 0
    if options.out is None:
        print("gpu_check.sh: error: name a folder for the results: benchmarks/gpu_check.sh OUT", file=sys.stderr)
        return 2
    try:
        stages = chosen(options.stages, options.dry_run)
        if options.minutes is not None and not options.minutes > 0:
            raise ValueError(f"--minutes must be above 0, got {options.minutes:g}")
        only_report = [stage.name for stage in stages] == ["report"]
        machine = look(need_gpu=not (options.dry_run or only_report), need_nvcc=not only_report)
        out: Path = options.out.resolve()
        (out / "rehearsal").mkdir(parents=True, exist_ok=True)
        report = summary.Report.read(out, machine, options.dry_run)
    except (ValueError, OSError, Unfit) as error:
        print(f"gpu_check.sh: error: {error}", file=sys.stderr)
        return 2
    print(machine.line(), flush=True)
    well = run_stages(stages, out, options.minutes, report)
    print("\n" + report.text(out))
    print(f"{out / 'summary.md'} written", flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
