"""One sampling step captured in a CUDA graph and replayed: launches cost nothing, whatever the network is made of.

A graph reads and writes fixed addresses: the static buffers of a `Loop` and the network's weights. New seeds, labels of
the same shape, guidance scales and start states are written into the buffers and need no new capture. A new batch
size, sample shape or dtype does, and so do weights that moved. A few recent graphs are kept, for each holds memory.

Between two replays the device waits a few microseconds, which a single image feels. So a loop that is used a second
time gets a graph of STRIDE steps beside that of one. Each step still finds its row in the device's own counter; what
the host has to do between steps (given noise, a progress bar, handing out each state) rules longer strides out.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Literal

import torch

from .. import backends
from .loop import Layout, Loop, Plan
from .model import fingerprint

WARMUP_STEPS = 3  # enough for lazy initialisation, and for cuDNN and cuBLAS to have chosen
KEPT = 4
STRIDE = 10  # more would save less than a tenth of what ten save, and take longer to capture

Replay = Callable[[], None]
Advance = Callable[[], None]
"""What moves a loop on by a row: `loop.step`, or a `Captured`, which takes a number of rows too."""


def supported(device: torch.device) -> bool:
    """Whether steps on this device can be captured."""
    return device.type == "cuda"


_one_at_a_time = threading.RLock()  # torch records one graph at a time in a process


@functools.cache
def _stream(device: torch.device, use: Literal["warm-up", "capture"]) -> torch.cuda.Stream:
    """One for each use on a device: cuBLAS keeps tens of MB for every stream that it has seen.

    torch.cuda.graph's own stream is of the GPU that was current when the first graph was recorded: on another GPU
    nothing would be recorded, and replays would do nothing.
    """
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _casting_anew() -> Iterator[None]:
    """Under autocast every step casts the weights itself: those that autocast keeps are gone when it ends, and a graph
    would go on reading them.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def capture(loop: Loop) -> Replay:
    """Record `loop.step` and return what replays it. Runs a few steps first: load the loop again afterwards."""
    device = loop.plan.device
    with torch.cuda.device(device), _casting_anew():
        beside = _stream(device, "warm-up")
        beside.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(beside):
                for _ in range(WARMUP_STEPS):
                    loop.rows.zero_()  # a short step table must not be run past its end
                    loop.step()
                loop.rows.zero_()
        finally:  # after an error, too: the buffers are about to be used here
            torch.cuda.current_stream(device).wait_stream(beside)
    return record(loop, 1)


def record(loop: Loop, steps: int) -> Replay:
    """Record that many steps in turn, none of which runs now, and return what replays them all.

    Raises what the steps raised, else the RuntimeError of a capture that failed; streams and generators of torch are
    then as they were.
    """
    device = loop.plan.device
    graph = torch.cuda.CUDAGraph()
    failed: BaseException | None = None
    with _one_at_a_time, torch.cuda.device(device), _casting_anew():
        before, beside = torch.cuda.current_stream(device), _stream(device, "capture")
        try:
            # Other threads, a data loader's for one, may go on talking to the device meanwhile.
            with torch.cuda.graph(graph, stream=beside, capture_error_mode="thread_local"):
                try:
                    for _ in range(steps):
                        loop.step()
                except BaseException as error:
                    failed = error  # which says more than that the capture cannot be ended
        except BaseException as error:
            _end_failed_capture(device)
            torch.cuda.set_stream(before)  # torch.cuda.graph stays on its own where it fails to begin or end
            raise (failed or error) from None
        if failed is not None:
            raise failed
    replay: Replay = graph.replay
    return replay


def _end_failed_capture(device: torch.device) -> None:
    """A capture that ends well: after one that did not, torch.randn on the device would go on raising."""
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=_stream(device, "capture")):
        torch.zeros(1, device=device)


class Captured:
    """Replays of one loop's step: `captured()` is one row, `captured(rows)` as many.

    stride: how many rows are best asked for at a time. 1 until `again` says that the loop is in use once more, for
    recording STRIDE steps takes tens of milliseconds, which a single run does not earn back; and 1 once that failed.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop, self._one = loop, capture(loop)
        self._many: Replay | None = None
        self._again = True
        self.stride = 1
        self._device = loop.plan.device
        self._given = torch.cuda.Event() if self._device.type == "cuda" else None

    def again(self) -> None:
        """Says that another run begins; on another stream it waits for the one before."""
        if self._given is not None:
            torch.cuda.current_stream(self._device).wait_event(self._given)
        if self._again:
            self.stride = STRIDE

    def given(self) -> None:
        """Says that a run has ended, as far as the host is concerned."""
        if self._given is not None:
            self._given.record(torch.cuda.current_stream(self._device))

    def __call__(self, rows: int = 1) -> None:
        if rows >= self.stride > 1 and self._many is None:
            try:
                self._many = record(self._loop, STRIDE)
            except RuntimeError:  # no memory for it, most likely; one row at a time does the same
                self._again, self.stride = False, 1
        while rows >= STRIDE and self._many is not None:
            self._many()
            rows -= STRIDE
        for _ in range(rows):
            self._one()


def stride_of(advance: Advance) -> int:
    """How many rows are best asked of it at a time."""
    return advance.stride if isinstance(advance, Captured) else 1


def portions(first: int, last: int, stride: int) -> Iterator[tuple[int, int]]:
    """(row, rows) that cover first .. last - 1 in order: `stride` at a time as long as that many are left, then one."""
    row = first
    while row < last:
        rows = stride if row + stride <= last else 1
        yield row, rows
        row += rows


class Loops:
    """Hands out loops and what advances them by a row, and keeps the KEPT most recently returned captured ones.

    A loop belongs to one run from `take` to `give`, so two streams that are read in turn never share buffers.
    wanted: None captures where the device can and falls back to eager with one warning; True raises where capture is
    impossible; False never captures.
    """

    def __init__(self, wanted: bool | None) -> None:
        self._wanted = wanted
        self._kept: OrderedDict[Hashable, tuple[Loop, Captured]] = OrderedDict()
        self._failed = False

    def check(self, device: torch.device) -> None:
        """ValueError where a graph is demanded of a device that has none."""
        if self._wanted and not supported(device):
            raise ValueError(f"cuda_graph=True needs a CUDA device, and the sampler runs on {device}")

    def take(self, plan: Plan, layout: Layout) -> tuple[Loop, Advance]:
        """A loop for this layout, not in use by anyone else, and its advance: a `Captured` or `loop.step`."""
        if self._wanted is False or self._failed or not supported(plan.device):
            return _eager(plan, layout)
        key = self._key(plan, layout)
        if key in self._kept:
            loop, captured = self._kept.pop(key)
            captured.again()
            return loop, captured
        loop, step = _eager(plan, layout)
        try:
            return loop, Captured(loop)
        except RuntimeError as error:  # ValueError and TypeError are the model's fault, which eager would not mend
            if self._wanted:
                raise RuntimeError(f"cuda_graph=True, but the sampling step could not be captured: {error}") from error
            self._failed = True
            warnings.warn(
                f"the sampling step could not be captured in a CUDA graph and runs eagerly: {error} "
                "(cuda_graph=False silences this)",
                RuntimeWarning,
                stacklevel=2,
            )
            return loop, step

    def give(self, loop: Loop, advance: Advance) -> None:
        """Return what `take` gave. Eager loops are dropped; of captured ones the oldest makes room for the newest."""
        if not isinstance(advance, Captured):
            return
        advance.given()
        self._kept[self._key(loop.plan, loop.layout)] = (loop, advance)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def clear(self) -> None:
        """Forget every graph that is not in use."""
        self._kept.clear()

    def __len__(self) -> int:
        return len(self._kept)

    @staticmethod
    def _key(plan: Plan, layout: Layout) -> Hashable:
        """What a captured step goes on doing as it was done when it was captured."""
        kind = plan.device.type
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return plan.device, plan.dtype, layout, fingerprint(plan.model), cast, backends.requested()


def _eager(plan: Plan, layout: Layout) -> tuple[Loop, Advance]:
    with torch.inference_mode(False):  # ordinary tensors, so that copies of them may take part in autograd
        loop = Loop(plan, layout)
    return loop, loop.step
