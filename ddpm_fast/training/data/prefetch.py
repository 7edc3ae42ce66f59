"""Batches ahead of the training step."""

from __future__ import annotations

import atexit
import pickle
import signal
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .base import Data
from .pictures import some_workers
from .slow import SlowData

_AHEAD = 2  # batches that each process has read or is reading
_open: weakref.WeakSet[Generator[Tensor, None, None]] = weakref.WeakSet()


def prefetch(data: Data, indices: Iterable[Tensor], workers: int | None = None) -> Iterator[Tensor]:
    """Batches of `data`, one for each int64 (n,) of `indices` (which may be endless), in exactly that order.

    Images of files and Datasets are read ahead by worker processes; once all are in memory, these end. Batches do not
    depend on `workers`. What goes wrong in a worker is raised here as it is. Ctrl-C and SIGTERM are left to the process
    that trains; workers end with the iterator, or within seconds after their process is gone.

    Args:
        workers: processes that read. None: none for up to 1000 images, else half of the processors (of this process's
            share of them under torchrun), at most 8. Data in memory needs none and gets none.
    """
    if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 0):
        raise ValueError(f"workers must be a number of processes, 0 or more, or None, got {workers!r}")
    source = iter(indices)
    if not isinstance(data, SlowData):
        return map(data.batch, source)
    batches = _reported(data, _ahead(data, source, workers))
    _open.add(batches)
    return batches


@atexit.register
def _close_all() -> None:
    """Before multiprocessing, at the end of the interpreter, sends its SIGTERM and waits: our workers leave signals."""
    for batches in list(_open):
        batches.close()


def _reported(data: SlowData, batches: Iterator[Tensor]) -> Generator[Tensor, None, None]:
    """With a warning after each epoch, and at the end, if there were new broken files."""
    seen = 0
    try:
        for batch in batches:
            yield batch
            seen += len(batch)
            if seen >= len(data):
                seen -= len(data)
                data.report_broken()
    finally:
        data.report_broken()


def _ahead(data: SlowData, source: Iterator[Tensor], workers: int | None) -> Iterator[Tensor]:
    if workers is None:
        workers = some_workers(len(data))
    if workers and not data.complete:
        asked: deque[tuple[Tensor, Tensor]] = deque()
        # As arrays through a pipe: tensors would go through /dev/shm, which is small in many containers.
        answers: Iterable[Any] = DataLoader(
            _Reader(data),
            batch_size=None,
            sampler=_requests(data, source, asked),
            num_workers=workers,
            prefetch_factor=_AHEAD,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals,
            generator=torch.Generator(),  # else it would draw from the program's own
        )
        for answer in answers:
            if isinstance(answer, _Failure):
                raise answer.error
            yield data.assemble(*asked.popleft(), answer)
    for some in source:
        yield data.batch(some)


def _requests(data: SlowData, source: Iterator[Tensor], asked: deque[tuple[Tensor, Tensor]]) -> Iterator[list[int]]:
    """What workers are to read for each batch, until all are in memory."""
    for some in source:
        missing = data.missing(some)
        asked.append((some, missing))
        yield missing.tolist()
        if data.complete:
            return


class _Failure:
    def __init__(self, error: Exception) -> None:
        self.error = error


class _Reader(Dataset[Any]):
    """What a worker process has: DataLoader would put its traceback into the message of an error."""

    def __init__(self, data: SlowData) -> None:
        self.data = data

    def __getitem__(self, indices: list[int]) -> NDArray[Any] | _Failure:
        try:
            return self.data.read_many(indices)
        except Exception as error:
            try:
                pickle.loads(pickle.dumps(error))
            except Exception:  # it could not travel; what it says can
                return _Failure(RuntimeError(f"{type(error).__name__}: {error}"))
            return _Failure(error)


def _as_it_is(x: Any) -> Any:
    return x


def _leave_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach all processes of a group: the one that trains ends its step first, and needs data."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
