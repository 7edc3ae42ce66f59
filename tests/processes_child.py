"""What two processes do in the tests: `torchrun processes_child.py FOLDER JOB...`.

A job is a function of this file, (world) -> results, and its results lie in FOLDER/JOB.RANK.pt afterwards. The test
calls the same function with a world of one process, and compares.
"""

from __future__ import annotations

import copy
import faulthandler
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from processes_batchnorm import batchnorm, batchnorm_calls
from torch import Tensor, nn
from unet_configs import SMALL

from ddpm_fast import Schedule
from ddpm_fast.nn import DDPMUNet, UNet
from ddpm_fast.training.data import TensorData
from ddpm_fast.training.processes import World
from ddpm_fast.training.trainer import Trainer

if TYPE_CHECKING:
    import pytest

# -- in the test ------------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """For a child: its own processes take one thread each."""
    path = os.pathsep.join(
        [str(Path(__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **more}


def together(factory: pytest.TempPathFactory) -> Path:
    """The folder with what two processes under torchrun make of all jobs, and of a run that one process has begun.

    They are started once, whichever test, file or worker of pytest-xdist asks first.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "processes"
    try:
        folder.mkdir()
    except FileExistsError:
        until = time.monotonic() + 300
        while not (folder / "printed").exists() and time.monotonic() < until:
            time.sleep(0.05)
    else:
        trainer_for("GroupNorm", 0, out=folder / "run").train(until=BATCH)
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(folder), *JOBS]
        done = subprocess.run(
            [sys.executable, "-m", *torchrun], env=environment(), capture_output=True, text=True, timeout=250
        )
        (folder / "writing").write_text(done.stdout + done.stderr)
        (folder / "writing").rename(folder / "printed")
    printed = (folder / "printed").read_text()
    assert (folder / f"{lost.__name__}.0.pt").exists(), printed
    return folder


def results(folder: Path, job: str) -> tuple[Any, Any]:
    """What the two processes returned from a job."""
    first, second = (torch.load(folder / f"{job}.{rank}.pt", weights_only=False) for rank in (0, 1))
    return first, second


# -- jobs -------------------------------------------------------------------------------------------------------------


def talk(world: World) -> dict[str, Any]:
    """Every call of World."""
    odd = torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)[:, 1:] * (world.rank + 1)
    mine = torch.full((3,), float(world.rank))
    generator = torch.Generator().manual_seed(world.rank)
    noise = torch.randn(1000, generator=generator)
    results = {
        "sum": world.sum(odd.clone()),
        "in place": world.sum(mine) is mine,
        "integers": world.sum(torch.tensor([1, world.rank])),
        "mean": world.mean(torch.tensor([1.0, world.rank])),
        "noise": world.mean(noise),
        "any": [world.any(flag) for flag in (False, world.rank == 1, True)],
        "from_main": world.from_main({"rank": world.rank}),
    }
    weights = nn.Linear(2, 2)
    with torch.no_grad():
        weights.weight.fill_(world.rank)
    world.broadcast_([odd, *weights.parameters()])
    results |= {"broadcast": odd, "weight": weights.weight.detach()}
    started = time.perf_counter()
    if world.rank == 1:
        time.sleep(0.2)
    world.barrier()
    results["waited"] = time.perf_counter() - started
    world.close()
    again = World.from_environment("cpu")
    results["again"] = again == world and again.any(again.rank == 1)
    return results


# -- jobs: training ---------------------------------------------------------------------------------------------------


class TimedMLP(nn.Module):
    """Vectors of 6; `spare` has no part in the loss."""

    def __init__(self, spare: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 16), nn.SiLU(), nn.Linear(16, 6))
        if spare:
            self.spare = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y: Tensor = self.layers(torch.cat([x, t[:, None].to(x) / 50], 1))
        return y


# name: (network, shape of an image, options of the Trainer)
TRAININGS: dict[str, Any] = {
    "GroupNorm": (lambda: DDPMUNet(**SMALL), (2, 8, 8), {"accumulate": 2, "flip": True, "offset_noise": 0.1}),
    "MLP": (TimedMLP, (6,), {"weighting": "min-snr", "prediction": "v", "warmup": 100, "self_condition": False}),
    "BatchNorm": (
        lambda: UNet(1, 8, width=8, depth=1, num_classes=3), (1, 8, 8), {"sync_batchnorm": True, "label_dropout": 0.3},
    ),
    "BatchNorm apart": (lambda: UNet(1, 8, width=8, depth=1), (1, 8, 8), {}),
}  # fmt: skip
BATCH, STEPS, IMAGES = 8, 3, 20


def data_for(name: str) -> TensorData:
    generator = torch.Generator().manual_seed(5)
    shape = TRAININGS[name][1]
    labels = torch.randint(3, (IMAGES,), generator=generator) if name == "BatchNorm" else None
    if len(shape) == 3:
        return TensorData(torch.randint(256, (IMAGES, *shape), generator=generator, dtype=torch.uint8), labels)
    return TensorData(torch.rand(IMAGES, *shape, generator=generator) * 2 - 1, labels)


def trainer_for(name: str, rank: int, dtype: torch.dtype = torch.float64, **options: Any) -> Trainer:
    """The processes' networks begin with different weights: rank 0's count."""
    make, _, usual = TRAININGS[name]
    torch.manual_seed(rank)
    data = options.pop("data", None) or data_for(name)
    given = {"images": BATCH * STEPS, "batch_size": BATCH, "seed": 3, "ema": 0.9, "lr": 1e-2, **usual, **options}
    return Trainer(make().to(dtype), Schedule.linear(50), data, **given)


def trained(world: World) -> dict[str, Any]:
    return {name: training(world, name) for name in TRAININGS} | {
        "float32": training(world, "MLP", dtype=torch.float32)
    }


def training(world: World, name: str, **options: Any) -> dict[str, Any]:
    """Losses as every process has them, what process 0 is told, weights, and what the network saw."""
    trainer = trainer_for(name, world.rank, **options)
    seen: list[str] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for i in range(len(inputs[0])):
            parts = [part[i].contiguous().numpy().tobytes() for part in inputs]
            seen.append(hashlib.sha256(b"".join(parts)).hexdigest())

    handle = trainer.model.register_forward_pre_hook(look)
    told: list[float] = []
    trainer.callbacks.append(Listener(told))
    losses = [trainer.step() for _ in range(STEPS)]
    handle.remove()
    tensors, state = trainer.state()
    return {
        "losses": losses,
        "told": told,
        "seen": seen,
        "tensors": {key: value.clone() for key, value in tensors.items()},
        "state": state,
        "order": [trainer._order.indices(0, BATCH * STEPS).tolist()],
    }


class Listener:
    def __init__(self, told: list[float]) -> None:
        self.told = told

    def on_step(self, trainer: Trainer, report: Any) -> None:
        self.told.append(report.loss)


def resumed(world: World) -> dict[str, Any]:
    """Takes up FOLDER/run after a step, and trains to the second."""
    trainer = trainer_for("GroupNorm", world.rank, out=Path(sys.argv[1]) / "run")
    began = trainer.images_seen
    trainer.train(until=2 * BATCH)
    return {"began": began, "ended": trainer.images_seen}


class Troubled(TensorData):
    """Calls `trouble(indices)` before every batch that is read; what it returns, if anything, is the batch."""

    trouble: Callable[[Tensor], Tensor | None]

    def batch(self, indices: Tensor) -> Tensor:
        changed = self.trouble(indices)
        return super().batch(indices) if changed is None else changed


def stops(world: World) -> dict[str, Any]:
    """What happens in one process, and what both make of it."""
    return {name: stop(world) for name, stop in STOPS.items()}


def _trouble(world: World, rank: int, at: int, do: Callable[[], Tensor | None]) -> TensorData:
    """Data that do it in the process `rank` when it reads its batch number `at`."""
    data = Troubled(torch.rand(IMAGES, 6, generator=torch.Generator().manual_seed(5)))
    reads = 0

    def trouble(indices: Tensor) -> Tensor | None:
        nonlocal reads
        reads += 1
        return do() if world.rank == rank and reads == at else None

    data.trouble = trouble
    return data


def _caught(act: Callable[[], Any]) -> str:
    try:
        act()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _not_finite(world: World) -> dict[str, Any]:
    data = _trouble(world, 1, 2, lambda: torch.full((BATCH // 2, 6), float("nan")))
    trainer = trainer_for("MLP", world.rank, data=data, workers=0)
    trainer.step()
    before = copy.deepcopy(trainer.model.state_dict())
    error = _caught(trainer.train)
    same = all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    trainer.train()  # they can go on together
    return {"error": error, "same": same, "ended": trainer.images_seen}


def _signalled(number: signal.Signals) -> Callable[[World], dict[str, Any]]:
    def stop(world: World) -> dict[str, Any]:
        data = _trouble(world, 1, 2, lambda: os.kill(os.getpid(), number))
        trainer = trainer_for("MLP", world.rank, data=data, workers=0, images=100 * BATCH)
        error = _caught(trainer.train)
        return {"error": error, "stopped": trainer.stopped, "images_seen": trainer.images_seen}

    return stop


def _unused(world: World) -> dict[str, Any]:
    trainer = Trainer(TimedMLP(spare=True), Schedule.linear(50), data_for("MLP"), batch_size=BATCH)
    return {"error": _caught(trainer.train)}


def _different(world: World) -> dict[str, Any]:
    return {"error": _caught(lambda: trainer_for("MLP", world.rank, seed=world.rank))}


STOPS: dict[str, Callable[[World], dict[str, Any]]] = {
    "not finite": _not_finite,
    "SIGTERM": _signalled(signal.SIGTERM),
    "SIGINT": _signalled(signal.SIGINT),
    "unused": _unused,
    "different": _different,
}


def lost(world: World) -> dict[str, Any]:
    """The last job: process 1 cannot read its second batch, and nobody catches that. What process 0 makes of it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from the launcher, which would be the other end of this process

    def fail() -> None:
        raise OSError("no such picture")

    trainer = trainer_for("MLP", world.rank, data=_trouble(world, 1, 2, fail), workers=0)
    if world.rank == 1:
        trainer.train()
    started = time.perf_counter()
    return {"error": _caught(trainer.train), "seconds": time.perf_counter() - started}


JOBS = {job.__name__: job for job in (talk, trained, resumed, stops, batchnorm, batchnorm_calls, lost)}


def main() -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(100, exit=True)  # a hang says where it is
    folder, world = Path(sys.argv[1]), World.from_environment("cpu")
    for job in sys.argv[2:]:
        start = time.perf_counter()
        torch.save(JOBS[job](world), folder / f"{job}.{world.rank}.pt")
        print(f"{job}: {time.perf_counter() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
