"""A small run that is killed again and again, for test_resume.py.

    python training_child.py FOLDER SEED

trains once without interruption into FOLDER/whole, and once into FOLDER/killed, where one life after the other ends
with SIGKILL at moments drawn from SEED: some after a random number of steps, some inside a save. It prints what
happened, as JSON. The lives are forks of one process, which has torch imported and has never used a second thread.
"""

from __future__ import annotations

import builtins
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import nn

from ddpm_fast import Schedule
from ddpm_fast.training import Trainer, checkpoints, tensor_file

KILLS = 20
BATCH = 8
STEPS = 80
SAVED = 3  # steps from save to save
SHORT = 6 * BATCH  # images of runs that tests make in their own process
PLACES = ("in the file", "before it is synced", "before it is renamed", "after it is renamed", "before the oldest goes")


class Network(nn.Module):
    """What a state can hold: parameters, running statistics, dropout; labels."""

    num_classes, null_label = 3, 3

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.norm, self.dropout = nn.BatchNorm2d(8), nn.Dropout(0.2)
        self.time, self.labels = nn.Linear(1, 8), nn.Embedding(4, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        known = self.time(t[:, None].to(x.dtype) / 20) + self.labels(labels)
        hidden = self.dropout(torch.relu(self.norm(self.first(x)) + known[:, :, None, None]))
        return self.last(hidden)


def trainer(out: Path | None, *, images: int = STEPS * BATCH, **changed: object) -> Trainer:
    """The run, as it is or as it was left; everything that can leave a trace in its state is on."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (50, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 3, (50,), generator=generator)
    torch.manual_seed(1)
    options = {
        "batch_size": BATCH,
        "prediction": "v",
        "weighting": "min-snr",
        "label_dropout": 0.2,
        "flip": True,
        "lr": 1e-3,
        "warmup": 100,
        "lr_schedule": "cosine",
        "weight_decay": 0.01,
        "accumulate": 2,
        "precision": "bf16",
        "ema": 0.99,
        "seed": 3,
        "save_every": SAVED * BATCH,
        "keep": 2,
        **changed,
    }
    return Trainer(Network(), Schedule.linear(20), (pictures, labels), out=out, images=images, **options)


def files(out: Path) -> list[str]:
    """What is in the run's folder of checkpoints."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def bits_of(run: Trainer) -> tuple[dict[str, list[int]], dict[str, object]]:
    """Everything that training has changed, as bytes."""
    tensors, state = run.state()
    return {name: value.contiguous().reshape(-1).view(torch.uint8).tolist() for name, value in tensors.items()}, state


class Life:
    """One process that trains until it is killed. The parent reads what it announces: a byte after every step, and
    where it waits inside a save for its end, the number of the place, 100 and above.
    """

    def __init__(self, out: Path, place: str | None, save: int) -> None:
        self.place, self.saves = place, save
        self.heard, self.say = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(self.say)
            return
        os.close(self.heard)
        try:
            self._live(out)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def on_step(self, trainer: Trainer, report: object) -> None:
        os.write(self.say, bytes([1]))

    def _live(self, out: Path) -> None:
        if self.place is not None:
            self._set_traps()
        run = trainer(out)
        run.callbacks.append(self)
        run.train()

    def _here(self, place: str) -> None:
        """Waits to be killed, if this is the place and the save."""
        if place != self.place:
            return
        self.saves -= 1
        if self.saves < 0:
            os.write(self.say, bytes([100 + PLACES.index(place)]))
            time.sleep(60)

    def _set_traps(self) -> None:
        sync, rename, unlink = os.fsync, os.replace, Path.unlink

        def trapped_sync(number: int) -> None:
            self._here("before it is synced" if os.path.isfile(f"/proc/self/fd/{number}") else "after it is renamed")
            sync(number)

        def trapped_rename(*names: object) -> None:
            self._here("before it is renamed")
            rename(*names)

        def trapped_unlink(path: Path, missing_ok: bool = False) -> None:
            if path.suffix == ".safetensors":
                self._here("before the oldest goes")
            unlink(path, missing_ok=missing_ok)

        def trapped_open(path: Path, mode: str = "r") -> object:
            if mode != "wb":
                return builtins.open(path, mode)
            return Halfway(builtins.open(path, mode, buffering=0), self)

        os.fsync, os.replace, Path.unlink = trapped_sync, trapped_rename, trapped_unlink
        tensor_file.open = trapped_open


class Halfway:
    """A file that stops in the middle of its fifth piece."""

    def __init__(self, file: object, life: Life) -> None:
        self.file, self.life, self.pieces = file, life, 0

    def __enter__(self) -> Halfway:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def write(self, piece: memoryview) -> None:
        self.pieces += 1
        if self.pieces == 5:
            half = len(piece) // 2
            self.file.write(piece[:half])
            self.life._here("in the file")
            piece = piece[half:]
        self.file.write(piece)


def live_and_die(out: Path, place: str | None, steps: int, chance: random.Random) -> dict[str, object]:
    """A life that ends in the given place of its first save or the one after, or some moment after so many steps."""
    life = Life(out, place, chance.randrange(2))
    done, reached = 0, None
    before = now = time.perf_counter()
    while reached is None and (place is not None or done < steps):
        heard = os.read(life.heard, 1)
        if not heard:
            break
        if heard[0] == 1:
            done, before, now = done + 1, now, time.perf_counter()
        else:
            reached = PLACES[heard[0] - 100]
    if reached is None:
        time.sleep(chance.random() * (now - before))  # anywhere in the next step, or in the save before it
    os.kill(life.pid, signal.SIGKILL)
    _, status = os.waitpid(life.pid, 0)
    os.close(life.heard)
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "place": reached,
        "steps": done,
        "temporary": any(out.glob("checkpoints/*.part")),
        "saved": [found.images_seen for found in checkpoints.whole(out / "checkpoints")],
        "files": len(list(out.glob("checkpoints/*.safetensors"))),
    }


def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(seed)
    trainer(folder / "whole").train()
    places = [*PLACES, *PLACES, *[None] * (KILLS - 2 * len(PLACES))]
    chance.shuffle(places)
    lives = [live_and_die(folder / "killed", place, chance.randrange(2, 8), chance) for place in places]
    trainer(folder / "killed").train()
    print(json.dumps(lives))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
