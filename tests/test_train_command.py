"""`ddpm-fast train` and `info` as they are called: runs, stops, resumption, and one line for whatever is wrong."""

from __future__ import annotations

import errno
import io
import signal

import pytest

pytest.importorskip("PIL", reason="pip install 'ddpm_fast[images]'")

import numpy as np
import torch
from PIL import Image

from ddpm_fast import cli
from ddpm_fast.commands import log, training_run
from ddpm_fast.commands.progress import Progress
from ddpm_fast.training import checkpoint_file, checkpoints

SMALL = "--model-options width=4 time_dim=8 depth=1 --timesteps 20 --batch-size 16 --precision none --no-plot"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """64 grey images of 8x8 in four classes."""
    place = tmp_path_factory.mktemp("data") / "small.npz"
    rng = np.random.default_rng(0)
    np.savez(place, images=rng.integers(0, 256, (64, 8, 8), dtype=np.uint8), labels=np.arange(64) % 4)
    return place


@pytest.fixture
def train(data, tmp_path, capsys):
    """Calls the command on RUN; (exit code, stdout, stderr)."""

    def call(line: str = "", *, base: str = f"--data {data} {SMALL} --images 96 --sample-every none"):
        code = cli.main(["train", *base.split(), "--out", str(tmp_path / "run"), *line.split()])
        return code, *capsys.readouterr()

    return call


def newest(run):
    return checkpoints.read(checkpoints.find(run))


def same(a, b) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(torch.equal(v, b.tensors[k]) for k, v in a.tensors.items())


def stop_at(monkeypatch, number: int, step: int) -> None:
    """A signal during that step."""
    original = Progress.on_step

    def on_step(self, trainer, report):
        original(self, trainer, report)
        if report.step == step:
            signal.raise_signal(number)

    monkeypatch.setattr(Progress, "on_step", on_step)


def test_a_run_and_what_is_in_its_folder(data, tmp_path, capsys):
    line = f"train --data {data} {SMALL} --images 96 --save-every 32 --keep 2 --sample-every 48 --sample-rows 2 --plot"
    assert cli.main([*line.split(), "--sample-steps", "4", "--log-every", "32", "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "[training]\nimages = 96\nbatch_size = 16\n" in out
    assert "64 of shape 1x8x8, uint8, 4 classes" in out
    assert "100.0 % | 96 of 96 images" in out
    assert f"ddpm-fast sample {tmp_path / 'run'} --num 64" in out
    run = tmp_path / "run"
    assert sorted(path.name for path in run.iterdir()) == [
        "checkpoints",
        "config.toml",
        "log.csv",
        "loss.png",
        "samples",
    ]
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == [checkpoints.file_name(64), checkpoints.file_name(96)]
    assert [row[:2] for row in log.read(run / "log.csv")] == [(32, 2), (64, 4), (96, 6)]
    for seen in (48, 96):
        with Image.open(run / "samples" / f"images-{seen:012d}.png") as picture:
            assert picture.width == 4 * (64 + 2) + 2  # a column for each class
    loaded = checkpoints.load_network(run)
    assert loaded.config["training"]["label_dropout"] == 0.1
    assert loaded.network.num_classes == 4

    assert cli.main(["info", str(run)]) == 0
    shown = capsys.readouterr().out
    for text in ("96, 6 steps of 16", "UNet(in_channels=1", "Schedule.linear(T=20", "64 of 1x8x8, 4 classes"):
        assert text in shown
    assert f"loss          {log.read(run / 'log.csv')[-1][2]:.4g}" in shown
    assert all(name in shown for name in names)
    assert cli.main(["info", str(run / "checkpoints" / names[0])]) == 0
    assert "64, 4 steps of 16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "Ctrl-C"), (signal.SIGHUP, 129, "SIGHUP")],
)
def test_a_stopped_run_goes_on_with_its_own_settings(train, tmp_path, monkeypatch, number, code, word):
    assert train("--log-every 16")[0] == 0
    whole, rows = newest(tmp_path / "run"), (tmp_path / "run" / "log.csv").read_text().splitlines()
    (tmp_path / "run").rename(tmp_path / "whole")

    with monkeypatch.context() as patch:
        stop_at(patch, number, 3)
        stopped, out, err = train("--log-every 16")
    assert stopped == code
    assert f"stopped by {word}: saved after 48 images; ddpm-fast train --out {tmp_path / 'run'} goes on" in out
    assert err == ""
    assert newest(tmp_path / "run").images_seen == 48

    assert train(base="")[0] == 0  # --out alone
    assert same(newest(tmp_path / "run"), whole)
    columns = [row.rsplit(",", 1)[0] for row in rows]  # all but the speed
    assert [row.rsplit(",", 1)[0] for row in (tmp_path / "run" / "log.csv").read_text().splitlines()] == columns


class Gone(io.StringIO):
    """Standard output of which somebody has read enough."""

    def write(self, text):
        if "done" in text or "%" in text or self.tell() > 100:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        return super().write(text)


@pytest.mark.parametrize("stream", [Gone, lambda: None], ids=["broken", "closed"])
def test_a_run_goes_on_when_nobody_listens(train, tmp_path, monkeypatch, stream):
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", stream())
        code = train()[0]
    assert code == 0
    assert newest(tmp_path / "run").images_seen == 96


def test_minutes_stop_a_run_that_goes_on_later(train, tmp_path):
    code, out, err = train("--minutes 1e-9")
    assert (code, err) == (0, "")
    assert "stopped after 0:0" in out
    assert newest(tmp_path / "run").images_seen == 16
    code, out, _ = train()
    assert code == 0
    assert "going on after 16 images" in out
    code, out, _ = train("--images 96")
    assert code == 0
    assert "nothing to do: this run has seen 96 images" in out
    code, out, _ = train(base="--images 128")
    assert code == 0
    assert newest(tmp_path / "run").images_seen == 128


def test_a_saved_config_is_a_config(train, tmp_path):
    assert train("--lr 3e-3 --weighting min-snr --betas 0.8,0.9")[0] == 0
    first = newest(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "first")
    assert train(base=f"--config {tmp_path / 'first' / 'config.toml'}")[0] == 0
    assert same(first, newest(tmp_path / "run"))


def test_contradictions_of_a_run_are_named_and_change_nothing(train, tmp_path):
    assert train("--images 16")[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    code, out, err = train("--lr 1 --seed 5 --model-options width=8")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert all(text in err for text in ("--lr 1.0 (0.0002)", "--seed 5 (0)", "--model-options width=8 (4)"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_before_the_first_checkpoint_everything_may_change(train, tmp_path):
    assert train("--lr 1e30 --max-grad-norm none --loss mse --images 9600")[0] == 1  # diverges
    if any((tmp_path / "run" / "checkpoints").glob("*.safetensors")):
        pytest.fail("it diverged after the first checkpoint: the test needs a wilder learning rate")
    assert train("--lr 1e-4")[0] == 0


def test_divergence_is_one_line_with_the_last_good_checkpoint(train, tmp_path):
    code, _, err = train("--save-every 16 --lr 1e30 --max-grad-norm none --images 9600")
    assert code == 1
    assert err.count("\n") == 1
    assert "the loss is nan" in err or "the gradient's norm is" in err
    good = newest(tmp_path / "run")
    assert str(good.path) in err
    assert all(value.isfinite().all() for value in good.tensors.values())


def test_a_full_disk_is_one_line_and_the_checkpoint_before_it_stays(train, tmp_path, monkeypatch):
    assert train("--images 32")[0] == 0
    good = newest(tmp_path / "run")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "write", full)
    code, _, err = train("--images 64")
    assert code == 2
    assert err.count("\n") == 1
    assert "the disk is full" in err
    assert f"{good.path} (32 images) is whole" in err
    assert same(newest(tmp_path / "run"), good)


def test_running_out_of_memory_says_what_to_do(train, monkeypatch):
    def step(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(training_run.Trainer, "step", step)
    code, _, err = train()
    assert code == 2
    assert (
        err == "ddpm-fast train: error: out of memory with --batch-size 16; try --accumulate 4, or a smaller network\n"
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--labels false", "labels = false\n"),
        ("--model rms --model-options dim=8 dim_mults=[1,2]", "labels = false\n"),
        ("--label-dropout 0", "label_dropout = 0.0\n"),
        ("--sample-every auto --sample-guidance 2 --sample-rows 1 --sample-steps 2", "samples after 16 images"),
        ("--schedule cosine --prediction v --zero-terminal-snr --loss huber --huber-delta 0.1", "loss = "),
        ("--weighting p2 --p2-k 2 --offset-noise 0.1 --flip --warmup 32 --lr-schedule cosine --accumulate 2", "flip"),
    ],
)
def test_what_can_be_chosen(data, train, line, expected):
    chosen = SMALL if "--model rms" not in line else SMALL.replace("--model-options width=4 time_dim=8 depth=1", "")
    sampled = "" if "--sample-every" in line else "--sample-every none"
    code, out, err = train(f"--data {data} {chosen} --images 16 {sampled} {line}", base="")
    assert (code, err) == (0, "")
    assert expected in out


def pictures(folder, *sizes, mode="L"):
    for i, size in enumerate(sizes):
        folder.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, color=i).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def wrong(tmp_path):
    """Places with something wrong with each."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "unknown.toml").write_text("[training]\nlearning_rate = 1\n")
    pictures(tmp_path / "sizes", (8, 8), (9, 9))
    pictures(tmp_path / "pictures", (8, 8), (8, 8))
    (tmp_path / "rubbish").mkdir()
    (tmp_path / "rubbish" / "0.png").write_bytes(b"not a picture")
    np.savez(tmp_path / "vectors.npz", np.zeros((8, 3), dtype=np.float32))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--data is missing, and"),
        ("--data {wrong}/empty", "hold no image"),
        ("--data {wrong}/rubbish", "can be read"),
        ("--data {wrong}/sizes", "size"),
        ("--data {wrong}/nowhere", "nowhere"),
        ("--data fashion-mnits", "fashion-mnist"),
        ("--data {wrong}/vectors.npz", "is for images (C, H, W), and the data has shape (3,)"),
        ("--data {wrong}/pictures --labels", "pictures has no labels"),
        ("--data {data} --labels --model rms", "--model rms knows no classes"),
        (
            "--data {data} --labels false --label-dropout 0.2",
            "--label-dropout 0.2 has no effect: no labels are learned",
        ),
        ("--data {data} --labels false --sample-guidance 2", "--sample-guidance 2 needs a class-conditional model"),
        ("--data {data} --model-options depth=4", "choose --image-size 16"),
        ("--data {data} --image-size 0", "--image-size must be at least 1, got 0"),
        ("--data {data} --device tpu", "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        ("--data {data} --device cuda:99", "sees"),
        ("--data {data} --precision fp16 --device cpu", "fp16"),
        ("--data {data} --batch-size 10 --accumulate 3", "batch_size must be a multiple of accumulate=3, got 10"),
        ("--data {data} --lr -1", "lr must be a finite number > 0, got -1.0"),
        ("--data {data} --zero-terminal-snr", "zero terminal SNR"),
        ("--data {data} --minutes 0", "--minutes must be more than 0, got 0"),
        ("--data {data} --min-snr-gamma 1", "--min-snr-gamma 1.0 has no effect with --weighting none"),
        ("--data {data} --config {wrong}/unknown.toml", "no key learning_rate in [training]"),
        ("--data {data} --config {wrong}/none.toml", "no file"),
        ("--data {data} --out {wrong}/file/run", "cannot be written to"),
    ],
)
def test_whatever_is_wrong_is_one_line(wrong, data, capsys, line, message):
    line = line.format(wrong=wrong, data=data)
    out = "" if "--out" in line else f"--out {wrong / 'run'}"
    assert cli.main(["train", *line.split(), *out.split()]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("ddpm-fast train: error: ")
    assert stderr.count("\n") == 1
    assert message in stderr
    assert not any((wrong / "run").glob("*"))


def test_a_run_needs_a_folder(capsys, data):
    assert cli.main(["train", "--data", str(data)]) == 2
    assert "--out is missing" in capsys.readouterr().err


def test_small_images_and_one_image_are_enough_with_a_warning(tmp_path, capsys):
    pictures(tmp_path / "one", (5, 7), mode="RGBA")
    line = f"train --data {tmp_path / 'one'} --image-size 8 {SMALL} --images 16 --sample-every none"
    assert cli.main([*line.split(), "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert "1 of shape 3x8x8" in out
    assert all(text.startswith("ddpm-fast train: warning: ") for text in err.splitlines())
    assert "smaller" in err


def test_a_checkpoint_of_another_model_or_a_newer_version_is_not_overwritten(train, tmp_path, monkeypatch):
    assert train("--images 16")[0] == 0
    run = tmp_path / "run"
    (run / "config.toml").unlink()
    code, _, err = train("--images 32 --model-options width=8")
    assert code == 2
    assert err.count("\n") == 1
    assert "width" in err
    assert not (run / "config.toml").exists()
    monkeypatch.setattr(checkpoint_file, "VERSION", 0)
    code, _, err = train("--images 32")
    assert code == 2
    assert "was made by a newer ddpm_fast" in err
    assert cli.main(["info", str(run)]) == 2


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("matplotlib", "--plot", "loss.png needs matplotlib (--no-plot does without); pip install ddpm_fast[train]"),
        ("PIL", "--sample-every 16", "grids of samples need Pillow (--sample-every none does without)"),
        ("tensorboard", "--tensorboard", "--tensorboard needs tensorboard; pip install ddpm_fast[tensorboard]"),
    ],
)
def test_missing_extras_are_named(train, monkeypatch, module, line, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else object())
    code, _, err = train(line)
    assert code == 2
    assert message in err


def test_tensorboard_has_the_log(train, tmp_path):
    pytest.importorskip("tensorboard", reason="pip install 'ddpm_fast[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("--tensorboard --log-every 16 --sample-every 48 --sample-rows 1 --sample-steps 2")[0] == 0
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    rows = log.read(tmp_path / "run" / "log.csv")
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [
        (row[0], pytest.approx(row[2])) for row in rows
    ]
    assert [event.step for event in board.Images("samples")] == [48, 96]


def test_evaluation_is_hung_on_where_it_is_asked_for(train, data, tmp_path, monkeypatch):
    made = []

    class Evaluate:
        def __init__(self, open_split, **options):
            made.append((open_split("train"), options))

        def on_step(self, trainer, report):
            made.append(report.images_seen)

    monkeypatch.setattr("ddpm_fast.metrics.hooks.Evaluate", Evaluate)
    assert train("--images 32")[0] == 0
    assert made == []
    assert train("--images 48 --eval-every 32 --eval-samples 20 --sample-steps 5")[0] == 0
    opened, options = made[0]
    assert len(opened) == 64
    assert (options["every"], options["num"], options["steps"]) == (32, 20, 5)
    assert options["file"] == tmp_path / "run" / "metrics.csv"
    assert made[1:] == [48]


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere", "no "), ("empty", "is no run: there is no checkpoint in it"), ("file", "file")],
)
def test_info_of_what_is_no_run(wrong, capsys, place, message):
    assert cli.main(["info", str(wrong / place)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ddpm-fast info: error: ")
    assert err.count("\n") == 1
    assert message in err
