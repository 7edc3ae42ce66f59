"""Two processes train as one: the same images, noise and losses, and one end."""

from __future__ import annotations

import functools
import itertools
import shutil
from pathlib import Path
from typing import Any

import processes_child
import pytest
import torch
from processes_child import BATCH, STEPS, TRAININGS, results

from ddpm_fast.training import processes
from ddpm_fast.training.processes import LostContact, World, share


@functools.cache
def in_one_process(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return processes_child.training(World(), name, dtype=dtype)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes_child.together(tmp_path_factory)


# -- World ------------------------------------------------------------------------------------------------------------


def test_share_is_contiguous_and_whole() -> None:
    for total, size in ((0, 3), (7, 3), (8, 2), (50_000, 7), (2, 5)):
        parts = [share(total, rank, size) for rank in range(size)]
        assert parts[0][0] == 0
        assert parts[-1][1] == total
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(parts))
        lengths = [last - first for first, last in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("arguments", [(5, 2, 2), (5, -1, 2), (5, 0, 0), (-1, 0, 1)])
def test_share_of_nobody(arguments: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        share(*arguments)


def test_two_processes_talk(pair: Path) -> None:
    first, second = results(pair, "talk")
    whole = torch.arange(24.0).reshape(2, 3, 2, 2)[:, 1:]
    for rank, got in enumerate((first, second)):
        assert torch.equal(got["sum"], 3 * whole)
        assert got["in place"]
        assert got["integers"].tolist() == [2, 1]
        assert got["mean"].tolist() == [1.0, 0.5]
        assert torch.equal(got["noise"], first["noise"])
        assert got["any"] == [False, True, True]
        assert got["from_main"] == {"rank": 0}
        assert torch.equal(got["broadcast"], whole)
        assert got["weight"].eq(0).all()
        assert got["waited"] > (0.1 if rank == 0 else 0.2)
        assert got["again"]


def test_one_process_needs_nothing() -> None:
    tensor = torch.tensor([1.0, 2.0])
    assert World() == World(0, 1, 0)
    assert World().is_main
    assert World().sum(tensor) is tensor
    assert World().mean(tensor) is tensor
    assert tensor.tolist() == [1.0, 2.0]
    assert World().any(True)
    assert not World().any(False)
    assert World().from_main("x") == "x"
    World().broadcast_([tensor])
    World().barrier()
    World().close()
    assert not torch.distributed.is_initialized()
    with pytest.raises(TypeError, match=r"floating tensors, got torch\.int64"):
        World().mean(torch.tensor([1]))


def set_environment(monkeypatch: pytest.MonkeyPatch, **given: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    set_environment(monkeypatch)
    assert World.from_environment("cpu") == World()
    assert processes.launched() == 1
    set_environment(monkeypatch, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # torchrun of one
    assert World.from_environment("cpu") == World()
    set_environment(monkeypatch, RANK="3", WORLD_SIZE="4", LOCAL_RANK="1")
    assert processes.launched() == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set, though its companion is; start with torchrun"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK must be a number, got 'x'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2, WORLD_SIZE=2 and LOCAL_RANK=2 contradict each other"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, "contradict each other"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT must say where process 0 is"),
    ],
)
def test_bad_environment(monkeypatch: pytest.MonkeyPatch, given: dict[str, str], message: str) -> None:
    set_environment(monkeypatch, **given)
    with pytest.raises(ValueError, match=message):
        World.from_environment("cpu")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert processes._device(None, 1, 4) == torch.device("cuda:1")
    assert processes._device("cuda:0", 1, 4) == torch.device("cuda:0")
    with pytest.raises(ValueError, match="local process 2 needs cuda:2, and there are 2 GPUs"):
        processes._device("cuda", 2, 4)


def test_accelerate_that_started_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --cpu --num_processes 2` leaves behind."""
    set_environment(monkeypatch, ACCELERATE_USE_CPU="True", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    with pytest.warns(UserWarning, match="starts one process on a machine"):
        assert World.from_environment("cpu").size == 1


# -- training ---------------------------------------------------------------------------------------------------------


def close(got: torch.Tensor, expected: torch.Tensor, far: float) -> bool:
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    return float((got - expected).abs().max()) <= far * max(1.0, float(expected.abs().max()))


def put_together(first: list[str], second: list[str]) -> list[str]:
    """What the network saw, by position: of each step the first process has the first half."""
    half, whole = BATCH // 2, []
    for step in range(STEPS):
        whole += first[step * half : (step + 1) * half] + second[step * half : (step + 1) * half]
    return whole


@pytest.mark.parametrize("name", TRAININGS)
def test_the_same_images_noise_and_timesteps(pair: Path, name: str) -> None:
    """Bit for bit, by position: x_t, t and the label that every image had."""
    first, second = results(pair, "trained")
    alone = in_one_process(name)
    assert first[name]["order"] == second[name]["order"] == alone["order"]
    assert len(set(alone["seen"])) == BATCH * STEPS
    assert put_together(first[name]["seen"], second[name]["seen"]) == alone["seen"]


@pytest.mark.parametrize("name", ["GroupNorm", "MLP", "BatchNorm"])
def test_losses_and_weights_of_one_process(pair: Path, name: str) -> None:
    """Within the order of summation: float64, 1e-10 relative. Weights, the average, the optimiser's moments."""
    first, second = results(pair, "trained")
    alone = in_one_process(name)
    assert first[name]["losses"] == pytest.approx(alone["losses"], rel=1e-11)
    assert first[name]["losses"] == second[name]["losses"] == first[name]["told"]
    assert second[name]["told"] == []  # only process 0 calls back
    assert first[name]["tensors"].keys() == alone["tensors"].keys()  # no prefix of DDP
    assert first[name]["state"] == alone["state"]
    for key, value in alone["tensors"].items():
        assert torch.equal(first[name]["tensors"][key], second[name]["tensors"][key]), key
        assert close(first[name]["tensors"][key], value, 1e-9), key


def test_float32_losses(pair: Path) -> None:
    first, _ = results(pair, "trained")
    alone = in_one_process("MLP", torch.float32)
    assert first["float32"]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


def test_without_sync_batchnorm_statistics_are_each_processs_own(pair: Path) -> None:
    """As documented: the losses then differ, and what is saved are the statistics of process 0."""
    name = "BatchNorm apart"
    first, second = results(pair, "trained")
    alone = in_one_process(name)
    assert first[name]["losses"] == second[name]["losses"]
    assert abs(first[name]["losses"][0] / alone["losses"][0] - 1) > 1e-4
    buffer = "model.down1.norm1.running_mean"
    assert not torch.equal(first[name]["tensors"][buffer], second[name]["tensors"][buffer])
    weight = "model.down1.conv1.weight"
    assert torch.equal(first[name]["tensors"][weight], second[name]["tensors"][weight])


def test_one_process_two_and_one_again(pair: Path, tmp_path: Path) -> None:
    """A run begun by one process, gone on with by two, ended by one: the weights of one that was never stopped."""
    assert results(pair, "resumed") == ({"began": BATCH, "ended": 2 * BATCH},) * 2
    shutil.copytree(pair / "run", tmp_path / "run")
    last = processes_child.trainer_for("GroupNorm", 0, out=tmp_path / "run")
    assert last.images_seen == 2 * BATCH
    last.train()
    alone = in_one_process("GroupNorm")
    for key, value in last.state()[0].items():
        assert close(value, alone["tensors"][key], 1e-10), key


# -- ends -------------------------------------------------------------------------------------------------------------


def stopped(pair: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = results(pair, "stops")
    return first[name], second[name]


def test_a_loss_that_is_not_finite_in_one_process_stops_both(pair: Path) -> None:
    for got in stopped(pair, "not finite"):
        assert got["error"].startswith("FloatingPointError: training stopped at step 2")
        assert got["same"]
        assert got["ended"] == BATCH * STEPS


@pytest.mark.parametrize(("name", "error"), [("SIGTERM", "nothing"), ("SIGINT", "KeyboardInterrupt: ")])
def test_a_signal_to_one_process_stops_both(pair: Path, name: str, error: str) -> None:
    """After the same step."""
    for got in stopped(pair, name):
        assert got == {"error": error, "stopped": name, "images_seen": 2 * BATCH}


def test_a_parameter_without_gradient_is_named(pair: Path) -> None:
    for got in stopped(pair, "unused"):
        assert got["error"].startswith("ValueError: with several processes every parameter must have a part in")
        assert "spare.weight, spare.bias" in got["error"]


def test_settings_that_differ(pair: Path) -> None:
    first, second = stopped(pair, "different")
    said = "ValueError: all processes must be given the same settings and data; in process"
    assert first["error"] == f"{said} 0: another one says which"
    assert second["error"] == f"{said} 1: seed is 1, in process 0 0"


def test_an_error_in_one_process_ends_both(pair: Path) -> None:
    """Its own error is printed, the launcher's exit code says so, and the other one does not wait."""
    printed = (pair / "printed").read_text()
    assert "ChildFailedError" in printed  # torchrun, which then ends with 1
    assert "OSError: no such picture" in printed
    assert "lost: " in printed
    got = torch.load(pair / "lost.0.pt")
    assert got["error"] == (
        "LostContact: process 0 of 2 cannot go on: another one has stopped; its own message says why"
    )
    assert got["seconds"] < 10
    assert issubclass(LostContact, RuntimeError)
