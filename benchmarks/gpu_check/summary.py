"""What a run has found, as text: which stages ran and how they ended, then the last lines that each of them printed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .children import Outcome
from .files import save, save_text
from .preflight import Machine

DRY = (
    "DRY RUN: nothing here was measured on a GPU. Counts are read from compiled code; a rate or a mark beside them is "
    "a data sheet's or a goal's."
)


@dataclasses.dataclass(frozen=True)
class Record:
    """One stage of a run. verdict: in words; commands: per command its verdict, seconds and last lines."""

    name: str
    what: str
    ok: bool
    verdict: str
    seconds: float
    limit: float
    commands: list[dict[str, Any]]

    @classmethod
    def of(cls, name: str, what: str, limit: float, seconds: float, outcomes: list[Outcome]) -> Record:
        """From how its commands ended."""
        bad = [outcome for outcome in outcomes if not outcome.ok]
        verdict = bad[0].verdict if bad else "ok"
        commands = [
            {
                "command": " ".join(outcome.command),
                "verdict": outcome.verdict,
                "seconds": round(outcome.seconds, 1),
                "lines": outcome.lines,
                "errors": [] if outcome.ok else outcome.errors,
            }
            for outcome in outcomes
        ]
        return cls(name, what, not bad, verdict, round(seconds, 1), limit, commands)

    @classmethod
    def skipped(cls, name: str, what: str, why: str) -> Record:
        """A stage that was asked for and not started."""
        return cls(name, what, False, why, 0.0, 0.0, [])


class Report:
    """The stages of one OUT, of this call and of earlier ones."""

    def __init__(self, machine: Machine, dry_run: bool, records: list[Record]) -> None:
        self.machine, self.dry_run, self.records = machine, dry_run, records

    @classmethod
    def read(cls, out: Path, machine: Machine, dry_run: bool) -> Report:
        """Go on with what OUT has. ValueError if that is a run of the other kind or of another machine."""
        file = out / "stages.json"
        if not file.exists():
            return cls(machine, dry_run, [])
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["dry_run"] != dry_run:
            has, asked = ("a dry run", "a real one") if kept["dry_run"] else ("a run on a GPU", "a dry run")
            raise ValueError(f"{out} has the results of {has}, and this is {asked}; name another folder")
        before = Machine(**kept["machine"])
        if machine.gpu is None and not dry_run:
            machine = before  # a report made elsewhere is of the machine that was measured
        elif before.gpu != machine.gpu:
            raise ValueError(
                f"{out} has results of {before.gpu}, and this machine has {machine.gpu}; name another folder"
            )
        return cls(machine, dry_run, [Record(**record) for record in kept["stages"]])

    @property
    def broken(self) -> bool:
        """Whether this machine's build is known to have failed, after which nothing can run."""
        return any(
            record.name == "build" and not record.ok and record.commands[:1] and not built(record)
            for record in self.records
        )

    def add(self, record: Record) -> None:
        """In the place of an earlier one of that name."""
        for i, old in enumerate(self.records):
            if old.name == record.name:
                self.records[i] = record
                return
        self.records.append(record)

    def write(self, out: Path) -> None:
        """stages.json and summary.md, whole or not at all."""
        kept = {
            "dry_run": self.dry_run,
            "machine": dataclasses.asdict(self.machine),
            "stages": [dataclasses.asdict(record) for record in self.records],
        }
        save(out / "stages.json", kept)
        save_text(out / "summary.md", self.markdown())

    def table(self) -> list[str]:
        """A line per stage."""
        width = max((len(record.name) for record in self.records), default=0)
        return [
            f"{record.name:<{width}}  {record.seconds:>6.0f} s of {record.limit:>4.0f}  {record.verdict}"
            for record in self.records
        ]

    def text(self, out: Path) -> str:
        """For a terminal."""
        failed = [f"  {r.name}: {r.verdict}; see {out / r.name}.log" for r in self.records if not r.ok]
        head = [DRY, ""] if self.dry_run else []
        return "\n".join(
            [*head, self.machine.line(), *self.table(), *(["failed:", *failed] if failed else ["all well"])]
        )

    def markdown(self) -> str:
        """The whole summary."""
        lines = ["# gpu_check" + (", dry run" if self.dry_run else ""), ""]
        if self.dry_run:
            lines += [DRY, ""]
        lines += [self.machine.line(), "", "```", *self.table(), "```"]
        for record in self.records:
            lines += ["", f"## {record.name}: {record.verdict}", "", f"It {record.what}.", ""]
            for command in record.commands:
                shown = command["lines"] + command["errors"][-15:]
                lines += [f"`{command['command']}`: {command['verdict']}, {command['seconds']} s", ""]
                lines += ["```", *shown, "```", ""] if shown else []
        return "\n".join(lines).rstrip()


def built(record: Record) -> bool:
    """Whether the first command of a `build`, which makes the extension, ended well."""
    verdict: str = record.commands[0]["verdict"]
    return verdict == "ok"
