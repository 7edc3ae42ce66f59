"""What several processes do in the tests: `python processes_child.py FOLDER JOB...`, started once in each of them.

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
from typing import Any

import torch
from torch import Tensor, nn
from unet_configs import SMALL

from ddpm_fast import Schedule
from ddpm_fast.nn import DDPMUNet, UNet
from ddpm_fast.training.data import TensorData
from ddpm_fast.training.processes import World, share
from ddpm_fast.training.trainer import Trainer

# -- in the test ------------------------------------------------------------------------------------------------------


def environment(**more: str) -> dict[str, str]:
    """For a child: its own processes take one thread each."""
    path = os.pathsep.join(
        [str(Path(__file__).parent.parent), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    )
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **more}


def launch(launcher: list[str], folder: Path, *jobs: str) -> subprocess.CompletedProcess[str]:
    """Runs the jobs in the processes that `python -m LAUNCHER...` starts."""
    command = [sys.executable, "-m", *launcher, __file__, str(folder), *jobs]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200)


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


# -- jobs: BatchNorm --------------------------------------------------------------------------------------------------


def batchnorm(world: World) -> dict[str, Any]:
    """Every case of BATCHNORMS in every dtype, this rank's part of it."""
    return {
        f"{name}, {dtype}": batchnorm_case(world, name, dtype)
        for name in BATCHNORMS
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }


# name: (layer, shape of the whole batch, mean of the values)
BATCHNORMS: dict[str, Any] = {
    "vectors": (lambda: nn.BatchNorm1d(5), (6, 5), 0.5),
    "sequences": (lambda: nn.BatchNorm1d(5), (6, 5, 7), 0.5),
    "images": (lambda: nn.BatchNorm2d(8), (8, 8, 5, 6), 0.5),
    "channels_last": (lambda: nn.BatchNorm2d(8), (8, 8, 5, 6), 0.5),
    "unequal shares": (lambda: nn.BatchNorm2d(8), (7, 8, 5, 6), 0.5),
    "one image each": (lambda: nn.BatchNorm2d(8), (2, 8, 3, 3), 0.5),
    "far from zero": (lambda: nn.BatchNorm2d(8), (8, 8, 16, 16), 30.0),
    "volumes": (lambda: nn.BatchNorm3d(4), (4, 4, 3, 2, 5), 0.5),
    "without weights": (lambda: nn.BatchNorm2d(8, affine=False), (8, 8, 5, 6), 0.5),
    "without running statistics": (lambda: nn.BatchNorm2d(8, track_running_stats=False), (8, 8, 5, 6), 0.5),
    "running average": (lambda: nn.BatchNorm2d(8, momentum=None), (8, 8, 5, 6), 0.5),
}


def batchnorm_case(world: World, name: str, dtype: torch.dtype, exact: bool = False) -> dict[str, Tensor]:
    """Two batches through a layer, forward and backward: outputs, gradients, buffers.

    Weights are as in mixed precision: float32 under bf16 images. exact: the same numbers, computed in float64.
    """
    make, shape, centre = BATCHNORMS[name]
    generator = torch.Generator().manual_seed(7)
    layer = make().to(torch.float64 if exact else torch.promote_types(dtype, torch.float32))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    if world.size > 1:
        from ddpm_fast.training.sync_batchnorm import convert

        convert(layer, world)
    first, last = share(shape[0], world.rank, world.size)
    got: dict[str, Tensor] = {}
    for step in range(2):
        whole = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        x, dy = (part.to(dtype)[first:last] for part in (centre + whole[0] * (2 + step), whole[1]))
        if exact:
            x, dy = x.double(), dy.double()
        if name == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        y = layer(x)
        y.backward(dy)
        got |= {f"y{step}": y.detach(), f"dx{step}": x.grad}
        assert y.dtype == x.dtype
        assert y.stride() == x.stride()
    got |= {f"d{key}": parameter.grad for key, parameter in layer.named_parameters()}  # of both steps
    return got | dict(layer.named_buffers())


def batchnorm_calls(world: World) -> dict[str, Any]:
    """How often a network of three layers waits for the others in a forward and a backward pass."""
    from ddpm_fast.training import sync_batchnorm
    from ddpm_fast.training.sync_batchnorm import convert

    network = nn.Sequential(nn.Linear(3, 4), *(nn.Sequential(nn.BatchNorm1d(4), nn.SiLU()) for _ in range(3)))
    keys = list(network.state_dict())
    converted = convert(network, world)
    calls, plain = [], World.sum

    def counted(self: World, tensor: Tensor) -> Tensor:
        calls.append(tensor.numel())
        return plain(self, tensor)

    World.sum = counted  # type: ignore[method-assign]
    try:
        y = network(torch.ones(2, 3) * torch.arange(2)[:, None])
        forward = len(calls)
        y.sum().backward()
        compiled = torch.compile(network, backend="eager")(torch.ones(2, 3) * torch.arange(2)[:, None])
    finally:
        World.sum = plain  # type: ignore[method-assign]
    same_keys = list(network.state_dict()) == keys
    network.eval()
    alone = network(torch.full((1, 3), float(world.rank))) if world.rank == 0 else None  # nobody to wait for
    sync_batchnorm.revert(network)
    kinds = {type(part) for part in network.modules()} - {nn.Sequential, nn.Linear, nn.SiLU}
    return {
        "converted": converted,
        "keys": same_keys,
        "forward": forward,
        "both": len(calls) - forward - 3,  # without those of the compiled pass
        "compiled": torch.equal(compiled, y),
        "alone": alone is None or bool(alone.isfinite().all()),
        "reverted": kinds == {nn.BatchNorm1d},
    }


def main() -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(100, exit=True)  # a hang says where it is
    folder, world = Path(sys.argv[1]), World.from_environment("cpu")
    for job in sys.argv[2:]:
        start = time.perf_counter()
        torch.save(globals()[job](world), folder / f"{job}.{world.rank}.pt")
        print(f"{job}: {time.perf_counter() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main()
