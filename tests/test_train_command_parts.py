"""What surrounds a training run: the live line, the log, the plot, the network and the schedule that are asked for."""

from __future__ import annotations

import io
import types

import pytest

pytest.importorskip("PIL", reason="pip install 'ddpm_fast[images]'")

import torch
from PIL import Image

from ddpm_fast import DDPMUNet, Schedule, UNet, cli
from ddpm_fast.commands import config, log, networks
from ddpm_fast.commands.errors import CommandError
from ddpm_fast.commands.fields import FIELDS
from ddpm_fast.commands.progress import Progress, duration
from ddpm_fast.nn import RMSNormUNet
from ddpm_fast.training.data import SOURCES


def report(step: int, loss: float = 1.0, size: int = 10, seconds: float = 0.5) -> types.SimpleNamespace:
    return types.SimpleNamespace(images_seen=step * size, step=step, loss=loss, lr=1e-3, grad_norm=0.5, seconds=seconds)


def at(images_seen: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(images_seen=images_seen)


# -- the live line ----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def walk(progress: Progress, clock: Clock, steps: range) -> None:
    progress.on_start(at(10 * (steps.start - 1)))
    for step in steps:
        clock.now += 0.5
        progress.on_step(None, report(step, loss=float(step)))
    progress.on_end(None)


def test_progress_outside_a_terminal_prints_a_line_now_and_then():
    clock, stream = Clock(), io.StringIO()
    walk(Progress(10_000, stream=stream, clock=clock), clock, range(1, 131))  # 65 seconds
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3  # after 30 and 60 seconds, and the end
    assert lines[0] == "  6.0 % | 600 of 10,000 images | loss 31.02 | 20 images/s | 7:50 left"
    assert lines[2].startswith(" 13.0 % | 1,300 of 10,000 images")


def test_progress_in_a_terminal_rewrites_its_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    clock, stream = Clock(), Terminal()
    progress = Progress(100, stream=stream, clock=clock)
    progress.on_start(at(0))
    clock.now += 0.5
    progress.on_step(None, report(1))
    progress.say("a grid was drawn")
    progress.on_step(None, report(2))  # too soon to be drawn
    progress.on_end(None)
    pieces = stream.getvalue().split("\r\x1b[K")
    assert pieces[0] == ""
    assert pieces[1] == " 10.0 % | 10 of 100 images | loss 1 | 20 images/s "[:49]
    assert pieces[2] == "a grid was drawn\n"
    assert pieces[3].startswith(" 20.0 %")
    assert pieces[3].endswith("\n")
    assert len(pieces) == 4


def test_progress_averages_over_the_last_steps_and_says_when_it_will_be_stopped():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, stream=stream, clock=clock)
    progress.on_start(at(500))
    progress.deadline = clock.now + 20
    for step in range(51, 56):
        clock.now += 1
        progress.on_step(None, report(step, loss=step - 50, seconds=1.0))
    assert progress.speed == 10.0
    assert (
        progress.line(clock.now) == " 55.0 % | 550 of 1,000 images | loss 3 | 10 images/s | stops in 0:15 (0:45 left)"
    )
    for step in range(56, 1000):
        progress.on_step(None, report(step, loss=7.0))
    assert "loss 7 |" in progress.line(clock.now)


def test_quiet_progress_says_nothing():
    clock, stream = Clock(), io.StringIO()
    walk(Progress(10_000, quiet=True, stream=stream, clock=clock), clock, range(1, 200))
    assert stream.getvalue() == ""


def test_durations():
    assert [duration(s) for s in (0.4, 67, 3723, 200_000)] == ["0:00", "1:07", "1:02:03", "2 d 07:33:20"]


# -- log.csv ----------------------------------------------------------------------------------------------------------


def test_rows_are_means_since_the_row_before(tmp_path):
    kept = log.Log(tmp_path / "log.csv", every=30)
    told: list[log.Row] = []
    kept.listeners.append(told.append)
    kept.on_start(at(0))
    for step in range(1, 9):
        kept.on_step(None, report(step, loss=float(step)))
        if step == 4:
            kept.on_save(None, tmp_path / "x")
    kept.on_end(None)
    assert [(row[0], row[2]) for row in kept.rows] == [(30, 2.0), (40, 4.0), (60, 5.5), (80, 7.5)]
    assert kept.rows[0][5] == 20.0
    assert log.read(tmp_path / "log.csv") == kept.rows == told
    assert (tmp_path / "log.csv").read_text().splitlines()[0] == "images_seen,step,loss,lr,grad_norm,images_per_second"


def test_a_resumed_log_is_that_of_a_run_that_was_not_stopped(tmp_path):
    def steps(kept: log.Log, first: int, last: int, saved: int) -> None:
        kept.on_start(at(10 * (first - 1)))
        for step in range(first, last + 1):
            kept.on_step(None, report(step, loss=1 / step))
            if step % saved == 0:
                kept.on_save(None, tmp_path)

    steps(log.Log(tmp_path / "whole.csv", every=30), 1, 20, saved=5)
    broken = log.Log(tmp_path / "broken.csv", every=30)
    steps(broken, 1, 13, saved=5)  # killed here; the checkpoint of step 10 is the last
    with open(broken.path, "a") as file:
        file.write("140,14,0.0")  # a row that was being written
    steps(log.Log(broken.path, every=30), 11, 20, saved=5)
    assert broken.path.read_text() == (tmp_path / "whole.csv").read_text()


def test_another_file_in_the_place_of_the_log_is_not_overwritten(tmp_path):
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is no log of this program"):
        log.Log(tmp_path / "log.csv", every=1).on_start(at(0))
    assert (tmp_path / "log.csv").read_text() == "a,b\n1,2\n"


def test_the_plot_is_a_picture_with_the_losses(tmp_path):
    rows = [(10 * i, i, 1 / i, 1e-3, 0.5, 20.0) for i in range(1, 60)]
    log.draw_loss(tmp_path / "loss.png", rows, "data: mse of eps")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (800, 450)
        assert len(picture.convert("RGB").getcolors(10**6)) > 50
    log.draw_loss(tmp_path / "loss.png", rows[:1], "one")
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]


def test_the_plot_is_drawn_every_minute_and_only_where_there_is_something_new(tmp_path, monkeypatch):
    drawn, clock = [], Clock()
    monkeypatch.setattr(log, "draw_loss", lambda path, rows, title: drawn.append(len(rows)))
    monkeypatch.setattr(log.time, "monotonic", clock)
    kept = log.Log(tmp_path / "log.csv", every=10)
    plot = log.Plot(tmp_path / "loss.png", kept, "")
    kept.on_start(at(0))
    for step in range(1, 151):
        clock.now += 1.0
        kept.on_step(None, report(step))
        plot.on_step(None, report(step))
    plot.on_save(None, tmp_path)
    plot.on_save(None, tmp_path)
    plot.on_end(None)
    assert drawn == [60, 120, 150]


def test_running_mean():
    assert log.running_mean([1.0, 3.0, 8.0, 7.0, 9.0], 3) == [1.0, 4.0, 6.0, 8.0, 8.0]
    assert log.running_mean([4.0], 2) == [4.0]


# -- the network and the schedule -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "shape", "classes", "expected"),
    [
        ("unet", {"width": 8, "time_dim": 8}, (1, 28, 28), 10, {"depth": 2, "num_classes": 10}),
        ("unet", {"width": 8, "time_dim": 8}, (1, 8, 8), None, {"depth": 3, "num_classes": None}),
        ("unet", {"width": 8, "time_dim": 8, "depth": 1}, (3, 32, 32), None, {"depth": 1, "in_channels": 3}),
        ("rms", {"dim": 8}, (1, 28, 28), None, {"dim_mults": (1, 2, 4), "channels": 1}),
        ("rms", {"dim": 8, "dim_mults": [1, 2]}, (3, 8, 8), None, {"dim_mults": (1, 2)}),
        (
            "ddpm",
            {
                "block_out_channels": [8, 8],
                "norm_num_groups": 4,
                "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
                "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
            },
            (3, 8, 8),
            5,
            {"in_channels": 3, "out_channels": 3, "num_class_embeds": 5, "sample_size": (8, 8)},
        ),
    ],
)
def test_networks(kind, options, shape, classes, expected):
    chosen = config.Model(kind, options)
    before = torch.random.get_rng_state()
    network, full = networks.build_network(chosen, shape, classes, seed=3)
    again, _ = networks.build_network(config.Model(kind, full), shape, classes, seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    assert type(network) is {"unet": UNet, "rms": RMSNormUNet, "ddpm": DDPMUNet}[kind]
    assert expected.items() <= network.config.items()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "options", "shape", "message"),
    [
        ("unet", {"widht": 8}, (1, 8, 8), "--model-options widht: no such option of --model unet; did you mean width?"),
        ("unet", {"dim_mults": [1]}, (1, 8, 8), "no such option of --model unet; there are time_dim, width, depth"),
        ("unet", {"in_channels": 4}, (1, 8, 8), "--model-options in_channels is not for choosing"),
        ("unet", {"width": 0}, (1, 8, 8), "--model-options: width must be at least 1, got 0"),
        ("unet", {"width": "wide"}, (1, 8, 8), "--model-options: "),
        ("unet", {"width": 8, "depth": 3}, (1, 28, 28), "28x28 is no multiple of 8; choose --image-size 32"),
        ("unet", {"width": 8}, (1, 7, 7), "7x7 is no multiple of 2; choose --image-size 8"),
        ("rms", {"dim": 8, "dim_mults": [1, 2, 4, 8]}, (1, 28, 28), "choose --image-size 32"),
        ("rms", {"dim": 7}, (1, 8, 8), "--model-options: dim must be even"),
        ("unet", {}, (16,), "is for images (C, H, W), and the data has shape (16,)"),
    ],
)
def test_networks_that_cannot_be(kind, options, shape, message):
    with pytest.raises(CommandError) as error:
        networks.build_network(config.Model(kind, options), shape, None, seed=0)
    assert message in str(error.value)


def test_schedules():
    build = networks.build_schedule
    assert build(config.Schedule()) == Schedule.linear(1000)
    assert build(config.Schedule("cosine", 100, False, {"s": 0.01})) == Schedule.cosine(100, s=0.01)
    assert build(config.Schedule("cosine", 100, True)).has_zero_terminal_snr
    for chosen, message in (
        (config.Schedule("linaer"), "--schedule: schedule must be one of linear"),
        (config.Schedule("cosine", 10, False, {"beta_end": 1}), "--schedule-options beta_end: cosine has s, max_beta"),
        (config.Schedule("linear", 10, False, {"beta_end": 2}), "--schedule: "),
        (config.Schedule("linear", 10, False, {"beta_end": "x"}), "--schedule: "),
    ):
        with pytest.raises(CommandError) as error:
            build(chosen)
        assert message in str(error.value)


def test_sources_are_those_of_open_data():
    assert config.SOURCES == SOURCES
    assert all(name in FIELDS["data"]["source"].text for name in SOURCES[:4])


def test_info_of_a_run_before_its_first_checkpoint(tmp_path, capsys):
    (tmp_path / "config.toml").write_text("")
    assert cli.main(["info", str(tmp_path)]) == 0
    assert "0: no checkpoint was written yet" in capsys.readouterr().out


def test_help_has_examples_and_every_field(capsys):
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert "ddpm-fast train --data fashion-mnist --out runs/fashion --images 500000" in text
    assert all(flag in text for flag in ("--minutes", "--config", "--max-grad-norm", "--sample-every", "--tensorboard"))
    assert cli.main(["info", "--help"]) == 0
    assert "ddpm-fast info runs/fashion" in capsys.readouterr().out
