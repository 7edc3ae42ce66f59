"""Child processes with a time limit, what they print shown, logged and its end kept."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

GRACE = 10.0
"""Seconds between the request to end and the end."""

KEPT = 250
"""Lines of standard output that are kept, the last ones."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended. returncode: None if it ran out of time or was not run; lines: the last of its output."""

    command: list[str]
    seconds: float
    returncode: int | None
    lines: list[str]
    errors: list[str]

    @property
    def ok(self) -> bool:
        """Whether it ended well."""
        return self.returncode == 0

    @classmethod
    def not_run(cls, command: list[str]) -> Outcome:
        """A command that had no time left or nothing to work on."""
        return cls(command, 0.0, None, [], ["not run"])

    @property
    def verdict(self) -> str:
        """In a few words."""
        if self.returncode is not None:
            return "ok" if self.ok else f"exit code {self.returncode}"
        return f"out of time after {self.seconds:.0f} s" if self.seconds else "not run"


def run(command: list[str], folder: Path, environment: Mapping[str, str], seconds: float, log: IO[str]) -> Outcome:
    """Run a command in `folder` for at most so many seconds, then end it with everything that it started."""
    began = time.monotonic()
    log.write(f"$ {' '.join(command)}\n")
    child = subprocess.Popen(
        command,
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that what it starts can be ended with it
    )
    kept: dict[str, collections.deque[str]] = {name: collections.deque(maxlen=KEPT) for name in ("out", "err")}
    lock = threading.Lock()

    def follow(pipe: IO[str], name: str, show: IO[str]) -> None:
        for line in pipe:
            with lock, contextlib.suppress(ValueError):  # the log is closed when a grandchild outlives its parent
                log.write(line)
                log.flush()
                show.write(line)
                show.flush()
            kept[name].append(line.rstrip("\n"))

    assert child.stdout is not None
    assert child.stderr is not None
    readers = [
        threading.Thread(target=follow, args=(child.stdout, "out", sys.stdout), daemon=True),
        threading.Thread(target=follow, args=(child.stderr, "err", sys.stderr), daemon=True),
    ]
    for reader in readers:
        reader.start()
    in_time = True
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        in_time = False
    finally:
        end(child)
    for reader in readers:
        reader.join(GRACE)
    took = time.monotonic() - began
    with lock:
        log.write(f"[{took:.1f} s, {f'exit code {child.returncode}' if in_time else 'out of time'}]\n\n")
    return Outcome(command, took, child.returncode if in_time else None, list(kept["out"]), list(kept["err"]))


def end(child: subprocess.Popen[Any]) -> None:
    """End a process and all that it started: a request first, then by force."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, number)
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
        if number == signal.SIGKILL or not alive(child.pid):
            return


def alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True
