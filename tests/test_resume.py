"""A run stopped anywhere and continued ends with the bits of one that was not; what is not of it is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_child import BATCH, KILLS, PLACES, SHORT, STEPS, bits_of, files, trainer

from ddpm_fast import cli
from ddpm_fast.training import checkpoints, resume

ROOT = Path(__file__).parents[1]


class At:
    """Calls `action` after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, trainer, report):
        if report.step == self.step:
            self.action()


@pytest.mark.skipif(sys.platform != "linux", reason="the child forks, and looks into /proc")
def test_twenty_kills(tmp_path):
    """Of a run with dropout, label dropout, flips, BatchNorm, EMA, AdamW, warm-up, cosine, accumulation and bf16."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    child = [sys.executable, str(ROOT / "tests" / "training_child.py"), str(tmp_path), "0"]
    done = subprocess.run(child, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lives = json.loads(done.stdout)
    assert [life["killed"] for life in lives] == [True] * KILLS, done.stderr
    assert [sum(life["place"] == place for life in lives) for place in PLACES] == [2] * len(PLACES)
    for life in lives:
        assert life["files"] == len(life["saved"])  # nothing that is called a checkpoint is less than one
        if life["place"] in PLACES[:3]:
            assert life["temporary"]
    newest = [max(life["saved"], default=0) for life in lives]
    assert newest == sorted(newest)
    assert newest[-1] > STEPS * BATCH // 3  # they were spread over the run
    whole, killed = (tmp_path / name / "checkpoints" for name in ("whole", "killed"))
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())
    assert len(list(whole.iterdir())) == 2
    for path in whole.iterdir():  # model, average, optimiser, counters and all
        assert (killed / path.name).read_bytes() == path.read_bytes()


def test_the_command_killed_and_called_again(tmp_path):
    """`ddpm-fast train` as a process, killed as soon as there is a checkpoint; then --out alone goes on with it."""
    generator = torch.Generator().manual_seed(0)
    data = {"images": torch.randint(0, 256, (64, 8, 8), generator=generator, dtype=torch.uint8).numpy()}
    np.savez(tmp_path / "data.npz", **data)
    options = "--images 4000 --batch-size 8 --save-every 16 --sample-every none --no-plot --quiet --seed 5"
    network = "--model-options width=4 depth=1 time_dim=8"
    begun = ["train", "--data", str(tmp_path / "data.npz"), *options.split(), *network.split()]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "ddpm_fast.cli", *begun, "--out", str(killed)]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not any(killed.glob("checkpoints/*.safetensors")):
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL, child.stderr.read()
    child.stderr.close()
    left = checkpoints.read_header(checkpoints.find(killed)).images_seen
    goal = left + 64
    assert 16 <= left < 4000
    assert cli.main(["train", "--out", str(killed), "--images", str(goal), "--quiet"]) == 0
    assert cli.main([*begun, "--out", str(whole), "--images", str(goal)]) == 0
    assert files(killed) == files(whole)
    for path in (whole / "checkpoints").iterdir():
        assert (killed / "checkpoints" / path.name).read_bytes() == path.read_bytes()


def rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=1e-3, momentum=0.9, centered=True)


class Odd(torch.optim.Optimizer):
    """One with state of all kinds: float64 of the parameter's shape and not, a Python number, a flag, a counter."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3, "kind": "odd", "pair": (0.5, 2)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["sum"] = torch.zeros_like(parameter, dtype=torch.float64)
                    state["size"] = torch.zeros((), dtype=torch.float64)
                    state["count"] = torch.zeros((), dtype=torch.int64)
                    state["half"], state["up"] = 1.0, True
                state["sum"] += parameter.grad / 3
                state["size"] += parameter.grad.double().norm()
                state["count"] += 1
                state["half"], state["up"] = state["half"] / 3, not state["up"]
                factor = group["lr"] * (state["half"] + state["up"]) / (1 + state["size"]) * group["pair"][0]
                parameter -= (factor * state["sum"]).to(parameter.dtype)


@pytest.mark.parametrize("optimizer", [None, rmsprop, Odd], ids=["AdamW", "RMSprop", "Odd"])
def test_any_optimizer_goes_on_as_it_was(tmp_path, optimizer):
    changed = {"optimizer": optimizer, "precision": None, "images": SHORT}
    whole = trainer(None, **changed)
    whole.train()
    trainer(tmp_path, **changed).train(until=SHORT // 2)
    again = trainer(tmp_path, **changed)
    assert again.images_seen == SHORT // 2
    again.train()
    assert bits_of(again) == bits_of(whole)
    for parameter in again.optimizer.param_groups[0]["params"]:
        for name, value in again.optimizer.state[parameter].items():
            expected = next(iter(whole.optimizer.state.values()))[name]
            assert type(value) is type(expected)
            assert not isinstance(value, torch.Tensor) or value.dtype == expected.dtype


def test_the_scaler_of_fp16(tmp_path):
    """CPUs have no fp16 training; the state is CUDA's all the same."""
    first = trainer(tmp_path, images=SHORT)
    first._update.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=3)
    first.train(until=2 * BATCH)
    second = trainer(tmp_path, images=SHORT, resume=True)
    second._update.scaler = torch.amp.GradScaler("cpu")
    second.load(tmp_path)
    assert second._update.scaler.state_dict() == first._update.scaler.state_dict()
    assert second._update.scaler.get_scale() == 512.0
    assert second._update.scaler.state_dict()["_growth_tracker"] == 2


def test_when_it_saves(tmp_path, monkeypatch):
    saved = []

    class Seen:
        def on_save(self, trainer, path):
            saved.append((trainer.images_seen, path))

    run = trainer(tmp_path, images=SHORT + 1, save_every=20, keep=3)
    assert files(tmp_path) == []
    run.callbacks.append(Seen())
    run.train()
    assert [images for images, _ in saved] == [24, 40, 56]  # the first step at or after 20, 40, ...; and the last
    assert [path for _, path in saved] == sorted((tmp_path / "checkpoints").iterdir())
    run.train()  # there is nothing left to do, nor to save
    assert len(saved) == 3
    again = trainer(tmp_path, images=SHORT + 1, save_every=20, keep=3)
    again.train()
    assert files(tmp_path) == [path.name for _, path in saved]
    # Without a number of images it is time that counts.
    run = trainer(tmp_path / "b", images=SHORT, save_every=None)
    run.callbacks.append(Seen())
    monkeypatch.setattr(resume, "SECONDS", 0.0)
    run.train(until=2 * BATCH)
    monkeypatch.setattr(resume, "SECONDS", 1e9)
    run.train()
    assert [images for images, _ in saved[3:]] == [BATCH, 2 * BATCH, SHORT]
    with pytest.raises(ValueError, match="no folder to save in"):
        trainer(None).save()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals(tmp_path, name):
    whole = trainer(None, images=SHORT)
    whole.train()
    run = trainer(tmp_path, images=SHORT, save_every=None)
    run.callbacks.append(At(2, lambda: os.kill(os.getpid(), getattr(signal, name))))
    ended = []
    run.callbacks.append(type("End", (), {"on_end": lambda self, trainer: ended.append(trainer.stopped)})())
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    if name == "SIGINT":
        with pytest.raises(KeyboardInterrupt):
            run.train()
    else:
        run.train()
    assert (run.stopped, run.images_seen, ended) == (name, 2 * BATCH, [name])
    assert files(tmp_path) == [checkpoints.file_name(2 * BATCH)]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    again = trainer(tmp_path, images=SHORT)
    again.train()
    assert again.stopped is None
    assert bits_of(again) == bits_of(whole)
    run.callbacks.clear()
    run.train()  # and so does the object that was interrupted
    assert bits_of(run) == bits_of(whole)


WITH_WORKERS = """
import os, signal, torch
from ddpm_fast.training.data import as_data, prefetch
from ddpm_fast.training.resume import noticed

class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 2000
    def __getitem__(self, index):
        return torch.full((1, 8, 8), index % 255, dtype=torch.uint8)

batches = prefetch(as_data(Pictures()), (torch.arange(i, i + 8) for i in range(1000)), workers=1)
with noticed() as stops:
    next(batches)
    os.killpg(0, signal.SIGTERM)
    total = sum(int(next(batches).sum()) for step in range(20))
    print(stops.asked, total)
"""


def test_a_signal_to_all_processes():
    """As a batch system sends it: those that read data leave it to the one that trains, and end with it."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", WITH_WORKERS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )
    total = 64 * sum(i + k for i in range(1, 21) for k in range(8))
    assert (done.returncode, done.stdout) == (0, f"SIGTERM {total}\n"), done.stderr


def test_a_second_ctrl_c_takes_effect_at_once(tmp_path):
    run = trainer(tmp_path, images=SHORT, save_every=None)

    def twice():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise KeyboardInterrupt

    run.callbacks.append(At(2, twice))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert files(tmp_path) == []


def test_handlers_of_the_users_own_are_left(tmp_path):
    heard = []
    old = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        run = trainer(None, images=3 * BATCH)
        run.callbacks.append(At(1, lambda: signal.raise_signal(signal.SIGTERM)))
        run.train()
    finally:
        signal.signal(signal.SIGTERM, old)
    assert (heard, run.stopped, run.images_seen) == ([signal.SIGTERM], None, 3 * BATCH)


def test_divergence_names_the_last_good_checkpoint(tmp_path):
    run = trainer(tmp_path, images=SHORT, save_every=2 * BATCH)

    def spoil():
        with torch.no_grad():
            run.model.last.bias.fill_(float("nan"))

    run.callbacks.append(At(3, spoil))
    with pytest.raises(FloatingPointError, match=r"step 4 .*the loss is nan.*the last checkpoint is .*00000016\.safe"):
        run.train()
    assert files(tmp_path) == [checkpoints.file_name(2 * BATCH)]
    whole, again = trainer(None, images=SHORT), trainer(tmp_path, images=SHORT)
    whole.train()
    again.train()
    assert bits_of(again) == bits_of(whole)


def test_a_broken_newest_checkpoint_costs_its_steps_only(tmp_path):
    whole = trainer(None, images=SHORT)
    whole.train()
    trainer(tmp_path, images=SHORT, save_every=BATCH).train(until=4 * BATCH)
    newest = tmp_path / "checkpoints" / checkpoints.file_name(4 * BATCH)
    os.truncate(newest, newest.stat().st_size - 1)
    with pytest.warns(UserWarning, match=r"cut off.*passed over"):
        again = trainer(tmp_path, images=SHORT)
    assert again.images_seen == 3 * BATCH
    again.train()
    assert bits_of(again) == bits_of(whole)


@pytest.mark.filterwarnings("ignore:.*passed over")
def test_nothing_is_started_over_by_itself(tmp_path):
    run = trainer(tmp_path, images=SHORT)
    run.train(until=BATCH)
    with pytest.raises(ValueError, match=r"holds a run of 8 images already; go on with it \(resume=True\)"):
        trainer(tmp_path, resume=False)
    (path,) = (tmp_path / "checkpoints").iterdir()
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the checkpoints in .* is whole"):
        trainer(tmp_path)
    assert files(tmp_path) == [path.name]


def test_left_over_temporaries_go(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / f"{checkpoints.file_name(8)}.77.part").write_bytes(b"half of it")
    trainer(tmp_path)
    assert files(tmp_path) == []
