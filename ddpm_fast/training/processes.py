"""The processes that train one model together: who there is, and what they tell each other.

`torchrun` and `accelerate launch` start W processes and say in environment variables who is who. Each computes a
contiguous slice of every batch; what they agree on goes through the few calls here. One process needs none of it: every
call is then a no-op.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

# As long as rank 0 may take over a checkpoint or a page of samples while the others wait for it.
TIMEOUT = datetime.timedelta(minutes=30)
ACROSS = ("MASTER_ADDR", "MASTER_PORT")


class LostContact(RuntimeError):
    """Another process ended while this one waited for it."""


def share(total: int, rank: int, size: int) -> tuple[int, int]:
    """(first, last): of 0..total-1 the rank's contiguous part [first, last); the parts differ by one at most.

    Raises ValueError unless 0 <= rank < size and total >= 0.
    """
    if size < 1 or not 0 <= rank < size:
        raise ValueError(f"rank must be in 0..size - 1, got rank {rank} of size {size}")
    if total < 0:
        raise ValueError(f"total must be at least 0, got {total}")
    return rank * total // size, (rank + 1) * total // size


@dataclass(frozen=True)
class World:
    """This process among `size` of them. Holds numbers only, so that it can be copied with whatever holds it.

    Args:
        rank: 0..size-1; rank 0 alone writes, prints and calls back.
        size: number of processes, W.
        local_rank: the rank on this machine, which chooses the GPU.
        device: where this process computes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def from_environment(cls, device: torch.device | str | None = None) -> World:
        """The world that RANK, WORLD_SIZE and LOCAL_RANK describe; one process where they are not set.

        Of more than one process it joins the process group that exists already (a script's own, or accelerate's), or
        else makes one from MASTER_ADDR and MASTER_PORT: gloo on CPUs, and for CUDA tensors NCCL. It is left when the
        interpreter ends, or by `close`.

        Args:
            device: None is CUDA where there is any, else the CPU. "cuda" without a number is the GPU of the local rank,
                in one process the current one.

        Raises ValueError for variables that are missing or contradict each other, and for a GPU that is not there.
        """
        rank, size, local_rank = _identity(os.environ)
        if size == 1 and os.environ.get("ACCELERATE_USE_CPU") == "True" and "MASTER_ADDR" in os.environ:
            warnings.warn(
                "accelerate launch --cpu starts one process on a machine, however many were asked for; use "
                "torchrun --nproc-per-node N, or accelerate launch --multi_gpu --num_processes N",
                stacklevel=2,
            )
        world = cls(rank, size, local_rank, _device(device, local_rank, size))
        if size > 1:
            _join(world)
        return world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Returns when all processes have called it."""
        self.sum(torch.zeros((), device=self._host()))  # unlike dist.barrier, never a guess at a device

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, in place: the sum over the processes, the same bits in all of them."""
        if self.size > 1:
            with self.contact(), _reachable(tensor.detach(), self._host(tensor), write=True) as buffer:
                _distributed().all_reduce(buffer)
                _recent.append(buffer)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """`tensor`, in place: the mean over the processes. TypeError for integers, which have none."""
        if not tensor.is_floating_point():
            raise TypeError(f"the mean is of floating tensors, got {tensor.dtype}")
        if self.size > 1:
            with torch.no_grad():
                self.sum(tensor).div_(self.size)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in one process at least; the same answer in all of them."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), device=self._host())).item())

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites every tensor with rank 0's; the same shapes and dtypes in the same order everywhere."""
        if self.size == 1:
            return
        for tensor in tensors:
            with self.contact(), _reachable(tensor.detach(), self._host(tensor), write=not self.is_main) as buffer:
                _distributed().broadcast(buffer, 0)
                _recent.append(buffer)

    def from_main(self, value: T) -> T:
        """Rank 0's `value`, anything that pickles; what the others pass is not looked at."""
        if self.size == 1:
            return value
        box = [value if self.is_main else None]
        with self.contact():
            _distributed().broadcast_object_list(box, 0, device=self._host())
        return box[0]  # type: ignore[return-value]

    @contextlib.contextmanager
    def contact(self) -> Iterator[None]:
        """What a broken connection raises inside becomes `LostContact`, which says what that means."""
        try:
            yield
        except LostContact:
            raise
        except RuntimeError as error:
            if self.size == 1 or not _is_lost(error):
                raise
            raise LostContact(
                f"process {self.rank} of {self.size} cannot go on: another one has stopped; its own message says why"
            ) from error

    def close(self) -> None:
        """Leaves the process group, if `from_environment` made it. Every process has to, at the same point; the end of
        the interpreter does it otherwise.
        """
        if self.size > 1:
            _leave()

    def _host(self, tensor: Tensor | None = None) -> torch.device:
        """Where a tensor can be sent from: where it is, if the process group has a backend for that."""
        kind = "cpu" if tensor is None else tensor.device.type
        if self.size == 1 or kind in _distributed().get_backend_config():
            return torch.device("cpu") if tensor is None else tensor.device
        return self.device


def launched() -> int:
    """How many processes a launcher has started, as the environment says; 1 without a launcher."""
    return _identity(os.environ)[1]


def _distributed() -> Any:
    import torch.distributed

    if not torch.distributed.is_available():
        raise RuntimeError("this torch was built without torch.distributed; train in one process")
    return torch.distributed


def _identity(environment: Mapping[str, str]) -> tuple[int, int, int]:
    """(rank, size, local rank)."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return 0, 1, 0
    numbers = {}
    for name, otherwise in (("WORLD_SIZE", None), ("RANK", None), ("LOCAL_RANK", environment.get("RANK"))):
        text = environment.get(name, otherwise)
        if text is None:
            raise ValueError(f"{name} is not set, though its companion is; start with torchrun or accelerate launch")
        if not text.isdecimal():
            raise ValueError(f"{name} must be a number, got {text!r}")
        numbers[name] = int(text)
    rank, size, local_rank = numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]
    if not rank < size or local_rank > rank:
        raise ValueError(f"RANK={rank}, WORLD_SIZE={size} and LOCAL_RANK={local_rank} contradict each other")
    return rank, size, local_rank


def _device(asked: torch.device | str | None, local_rank: int, size: int) -> torch.device:
    device = torch.device(asked if asked is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return device
    if size == 1:
        return device if device.index is not None else torch.device("cuda", torch.cuda.current_device())
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"local process {local_rank} needs cuda:{index}, and there are {torch.cuda.device_count()} GPUs; start one "
            "process for each at most (torchrun --nproc-per-node)"
        )
    return torch.device("cuda", index)


def _join(world: World) -> None:
    distributed = _distributed()
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
    if not distributed.is_initialized():
        missing = [name for name in ACROSS if name not in os.environ]
        if missing:
            raise ValueError(f"{' and '.join(missing)} must say where process 0 is; start with torchrun")
        backend = "cpu:gloo,cuda:nccl" if world.device.type == "cuda" else "gloo"
        if not _stores:
            _stores.append(next(distributed.rendezvous("env://", world.rank, world.size, timeout=TIMEOUT))[0])
        _stores.append(distributed.PrefixStore(f"ddpm_fast {len(_stores)}", _stores[0]))
        distributed.init_process_group(
            backend, store=_stores[-1], rank=world.rank, world_size=world.size, timeout=TIMEOUT
        )
        _owned.append(distributed.group.WORLD)
        atexit.register(_leave)
    rank, size = distributed.get_rank(), distributed.get_world_size()
    if (rank, size) != (world.rank, world.size):
        raise ValueError(
            f"this process is {rank} of {size} in the process group, {world.rank} of {world.size} in the environment"
        )


_owned: list[Any] = []  # the process group that is ours to leave
_stores: list[Any] = []  # where processes find each other, and a part of it for each group: none meets stale entries


_recent: deque[Tensor] = deque(maxlen=2)  # what was sent last; gloo has two threads


def _leave() -> None:
    atexit.unregister(_leave)
    distributed = _distributed()
    if distributed.is_initialized() and distributed.group.WORLD in _owned:
        _settle()
        distributed.destroy_process_group()
    _owned.clear()


def _settle() -> None:
    """gloo's threads let go of a tensor a little after it has arrived, and need the interpreter's lock for it. Who
    leaves the group waits for the threads and holds that lock: for ever, unless they have done so before.
    """
    until = time.monotonic() + 1
    while any(tensor._use_count() > 1 for tensor in _recent) and time.monotonic() < until:  # type: ignore[attr-defined]
        time.sleep(0.001)
    time.sleep(0.01)
    _recent.clear()


@contextlib.contextmanager
def _reachable(tensor: Tensor, device: torch.device, write: bool) -> Iterator[Tensor]:
    """`tensor`, or a copy that is contiguous and on `device`, written back afterwards if asked."""
    buffer = tensor.to(device).contiguous()
    yield buffer
    if write and buffer.data_ptr() != tensor.data_ptr():
        tensor.copy_(buffer)


def _is_lost(error: RuntimeError) -> bool:
    """gloo raises plain RuntimeErrors, with the file of its transport in them."""
    import torch.distributed as distributed

    kinds = (distributed.DistBackendError, distributed.DistNetworkError)
    return isinstance(error, kinds) or "gloo/transport" in str(error) or "NCCL" in str(error)
