"""One result file of what the benchmark stages measured, its tables and plots, and what was wanted beside it.

    python -m gpu_check.report --out FOLDER/report.json [--rehearse]

Reads the benchmark's files beside FILE.json, writes FOLDER/<gpu>.json, .md and .png, those that benchmarks/results
and README's table are made of. Needs no GPU. Exit code 1 where a mark of this very kind of GPU was missed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import machine
import report
import results
import targets

from .files import save

SECTIONS = ("ops", "sampler", "paper")
"""Files that stages of gpu_check.sh leave, without their .json."""


def table(result: dict[str, Any]) -> tuple[list[str], list[str]]:
    """A line per mark: what was wanted, what was measured, the verdict; and which were missed."""
    rows = targets.targets(result)
    lines = [
        f"{f'{row.case}, n = {row.n}':<44} {row.of():<24} {row.shown():<26} wanted {row.wanted():<8} {row.verdict}"
        for row in rows
    ]
    missed = [f"{row.case}, n = {row.n}, {row.of()}: {row.shown()}, wanted {row.wanted()}" for row in rows]
    return lines, [line for line, row in zip(missed, rows, strict=True) if row.verdict == "missed"]


def main(argv: list[str] | None = None) -> int:
    """Merge, write, print; the exit code."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options.add_argument("--rehearse", action="store_true", help="of figures that a rehearsal left: marks do not count")
    given = options.parse_args(argv)
    folder: Path = given.out.parent
    files = [folder / f"{name}.json" for name in SECTIONS if (folder / f"{name}.json").exists()]
    if not files:
        print(f"gpu_check.report: error: {folder} has none of {', '.join(SECTIONS)}; run those stages", file=sys.stderr)
        return 2
    try:
        result = results.merge([results.load(path) for path in files])
    except ValueError as error:
        print(f"gpu_check.report: error: {error}", file=sys.stderr)
        return 2
    merged = folder / f"{machine.slug(result['machine'])}.json"
    results.save(result, merged)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        failed = report.main([str(merged)]) and report.main([str(merged), "--no-plots"])
    lines, missed = table(result)
    missed = [] if given.rehearse else missed
    missing = [name for name in SECTIONS if folder / f"{name}.json" not in files]
    failures = [f"missed: {line}" for line in missed] + ([said.getvalue().strip()] if failed else [])
    figures = {
        "stage": "report",
        "machine": result["machine"],
        "rehearsal": given.rehearse,
        "ok": not failures,
        "failures": failures,
        "not_done": [f"{name} was not measured" for name in missing],
        "result": merged.name,
        "targets": lines,
    }
    save(given.out, figures)
    if said.getvalue():
        print(said.getvalue(), end="", file=sys.stderr)
    for line in (*lines, *figures["not_done"], *failures):
        print(line)
    print(f"{merged} and its report written; {len(missed)} of {len(lines)} marks missed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
