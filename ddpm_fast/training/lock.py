"""One process trains in a run's folder at a time: two would delete what the other is writing, and mix their logs."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder that exists. ValueError, naming who has it, where another process does.

    The lock is the system's (POSIX record locks): it goes with its process, however that ends, and the workers that the
    process has started do not hold it. Its file goes at the end; what a killed process leaves of it means nothing. A
    file system without locks keeps nobody out. OSError where the folder cannot be written.
    """
    path = folder / NAME
    file = _open_locked(path)
    try:
        with contextlib.suppress(OSError):  # a full disk: who it is will not be known
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may be gone; Windows deletes no open file
            path.unlink()
        os.close(file)


def _open_locked(path: Path) -> int:
    """The file's number, locked, and the file still the one of that name."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _locked(file):
                who = os.pread(file, 200, 0).decode(errors="replace") or "not known which"
                raise ValueError(
                    f"another process trains in {path.parent.parent} ({who}); wait, stop it, or use another folder"
                )
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), path.stat()):
                    return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # whoever had it has just deleted it: to hold it would keep nobody out


def _locked(file: int) -> bool:
    """Whether the file is locked now by this process, or cannot be by any."""
    if fcntl is None:
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        pass
    return True
