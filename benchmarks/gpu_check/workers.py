"""Tasks done by a few child processes, so that one that crashes, hangs or loses its device takes no other with it.

A child is `python -m MODULE --worker`: it reads a task per line of standard input, as JSON, and answers each by a line
on standard output that begins with ANSWER and goes on in JSON; an answer with "dead" true means that the child ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

ANSWER = "ANSWER "
GRACE = 20.0
"""Seconds that a child may take beyond those of its task: it starts, compiles one kernel more, frees memory."""

RESERVE = 25.0
"""Seconds before the end of a stage's time at which its tasks should be over: GRACE, and writing what was found."""

LONGEST = 300.0
"""Seconds that a task gets at the most."""

BENCHMARKS = Path(__file__).resolve().parents[1]

Task = dict[str, Any]


def serve(do: Callable[[Task], Task]) -> int:
    """The child's side: do what is asked until there is no more."""
    for line in sys.stdin:
        answer = do(json.loads(line))
        print(ANSWER + json.dumps(answer), flush=True)
        if answer.get("dead"):
            return 1
    return 0


def with_path(environment: Mapping[str, str]) -> dict[str, str]:
    """The same variables, with which a child of any folder imports this package, its neighbours and this checkout."""
    folders = [str(BENCHMARKS), str(BENCHMARKS.parent), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(folders)}


def deadline(minutes: float) -> float:
    """When (of time.monotonic) tasks should be over, so many minutes being given from now on."""
    return time.monotonic() + max(60 * minutes - RESERVE, 30 * minutes)


class Child:
    """One process that serves."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=dict(environment), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, task: Task, seconds: float) -> Task:
        """The answer to a task; RuntimeError where there is none: the child is gone then."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        late = threading.Timer(seconds, self.process.kill)
        late.start()
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith(ANSWER):
                    answer: Task = json.loads(line.removeprefix(ANSWER))
                    return answer
                print(line, end="", file=sys.stderr)
        except BrokenPipeError:
            pass
        finally:
            hung = not late.is_alive()
            late.cancel()
        code = self.process.wait()
        raise RuntimeError(
            f"no answer after {seconds:.0f} s, so it was ended" if hung else f"the process ended with exit code {code}"
        )

    def end(self) -> None:
        """Tell it that there is no more to do."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def spread(
    tasks: Iterable[Task],
    workers: int,
    command: list[str],
    environment: Mapping[str, str],
    *,
    until: float,
    done: Callable[[Task, Task | str], None],
) -> list[Task]:
    """Have the tasks done in their order, several at a time, none begun after `until` (of time.monotonic).

    A task is sent with "seconds", what is left then, and not at all if that is less than its "needs". done: called with
    each task and its answer, or with why there is none; never twice at a time. Returns the tasks that were not begun.
    """
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    for task in tasks:
        waiting.put(task)
    left: list[Task] = []
    lock = threading.Lock()

    def work() -> None:
        child: Child | None = None
        while True:
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                break
            seconds = min(until - time.monotonic(), LONGEST)
            if seconds <= task.get("needs", 0):
                with lock:
                    left.append(task)
                continue
            child = child or Child(command, environment)
            answer: Task | str
            try:
                answer = child.ask({**task, "seconds": seconds}, seconds + GRACE)
            except RuntimeError as error:
                answer, child = str(error), None
            with lock:
                done(task, answer)
            if not isinstance(answer, str) and answer.get("dead"):
                child = None
        if child is not None:
            child.end()

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return left
