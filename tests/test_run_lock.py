"""Two processes cannot train in one folder at once; a lock goes with its process."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from ddpm_fast import Schedule
from ddpm_fast.cli import main
from ddpm_fast.training import Trainer, lock

pytestmark = pytest.mark.skipif(lock.fcntl is None, reason="this system has no POSIX record locks")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return self.scale * x


def trainer(out):
    return Trainer(Net(), Schedule.linear(10), torch.ones(16, 4), out=out, images=16, batch_size=8)


@pytest.fixture
def somebody(tmp_path) -> Iterator[Callable[[], int]]:
    """Starts another process that holds the lock of the run's folder until it is killed; its number."""
    children = []

    def begin() -> int:
        folder = tmp_path / "checkpoints"
        folder.mkdir(exist_ok=True)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:  # never comes back to pytest, whatever happens
            try:
                with lock.alone(folder):
                    os.write(write, b"held")
                    while True:
                        signal.pause()
            finally:
                os._exit(1)
        children.append(child)
        os.close(write)
        assert os.read(read, 4) == b"held"
        os.close(read)
        return child

    yield begin
    for child in children:
        end(child)


def end(child: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):  # it has ended before
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_second_run_is_refused_and_deletes_nothing(tmp_path, somebody):
    child = somebody()
    half = tmp_path / "checkpoints" / ".checkpoint-000000000008.safetensors.part"
    half.write_bytes(b"what the other is writing")
    with pytest.raises(ValueError, match=rf"another process trains in {tmp_path} \(process {child} on .*\); wait"):
        trainer(tmp_path)
    assert half.read_bytes() == b"what the other is writing"


def test_training_is_refused_too(tmp_path, somebody):
    mine = trainer(tmp_path)
    child = somebody()
    with pytest.raises(ValueError, match=f"process {child} on"):
        mine.train()
    assert mine.images_seen == 0
    end(child)  # killed: nothing has to be cleaned up
    mine.train()
    assert mine.images_seen == 16


def test_it_is_held_while_training_and_no_longer(tmp_path):
    mine = trainer(tmp_path)
    seen = []

    class Look:
        def on_step(self, trainer, report):
            child = os.fork()  # POSIX record locks are not inherited: the child is another process
            if child == 0:
                try:
                    with lock.alone(tmp_path / "checkpoints"):
                        os._exit(0)
                except ValueError:
                    os._exit(7)
                finally:
                    os._exit(1)
            seen.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

    mine.callbacks.append(Look())
    mine.train()
    assert seen == [7, 7]
    trainer(tmp_path)  # and a second object of the same process goes on from there
    child = os.fork()
    if child == 0:
        try:
            with lock.alone(tmp_path / "checkpoints"):
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    trainer(tmp_path).train()


def test_a_system_without_locks_still_tries_to_write(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    trainer(tmp_path).train()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"cannot write to .*checkpoints: Not a directory"):
        trainer(tmp_path / "file")
    with pytest.raises(NotADirectoryError), lock.alone(tmp_path / "file"):
        pass


def test_the_command_says_it_in_one_line(tmp_path, somebody, capsys):
    pytest.importorskip("sklearn", reason="digits come with scikit-learn: pip install 'ddpm_fast[demo]'")
    child = somebody()
    code = main(["train", "--data", "digits", "--out", str(tmp_path), "--images", "64", "--model", "unet"])
    assert code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"process {child}" in message
    assert not (tmp_path / "config.toml").exists()
