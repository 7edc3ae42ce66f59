"""The configuration: flags and TOML say the same, mistakes are named, what is written is read back to the bit."""

from __future__ import annotations

import argparse
import inspect
import math
from pathlib import Path

import pytest

from ddpm_fast import Trainer
from ddpm_fast.cli import _Parser
from ddpm_fast.commands import given, values
from ddpm_fast.commands.config import Config
from ddpm_fast.commands.errors import CommandError
from ddpm_fast.commands.fields import FIELDS


def flags(line: str) -> given.Given:
    parser = _Parser(prog="x")
    given.add_flags(parser)
    return given.from_flags(parser.parse_args(line.split()))


def file(tmp_path, text: str) -> given.Given:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    return given.from_file(tmp_path / "run.toml")


def test_flags_are_unique_over_sections():
    names = [field.flag for fields in FIELDS.values() for field in fields.values()]
    assert len(set(names)) == len(names)
    assert FIELDS["data"]["source"].flag == "data"
    assert FIELDS["training"]["max_grad_norm"].flag == "max-grad-norm"


def test_defaults_survive_their_own_checks():
    for fields in FIELDS.values():
        for field in fields.values():
            assert values.checked(field.default, field.kind, field.choices) == field.default
            assert field.in_bounds(field.default)
            assert field.text


def test_defaults_are_the_trainers():
    """Two differ, and say so: labels are dropped where there are any, and the precision is what pays."""
    parameters = inspect.signature(Trainer).parameters
    ours = {**vars(Config().training), "flip": Config().data.flip, "workers": Config().data.workers}
    assert ours.keys() <= parameters.keys()
    different = {name: value for name, value in ours.items() if value != parameters[name].default}
    assert different == {"label_dropout": 0.1, "precision": "auto", "device": "auto"}
    chosen_elsewhere = {"model", "schedule", "data", "out", "optimizer", "save_every", "keep", "resume"}
    assert parameters.keys() - ours.keys() == chosen_elsewhere


def test_a_flag_and_its_line_of_toml_say_the_same(tmp_path):
    line = (
        "--data cifar10 --image-size 16 --labels false --flip --workers none --model rms --model-options dim=8 "
        "dim_mults=[1,2] --schedule-options s=0.01 --lr 1e-3 --betas 0.5,0.9 --ema none --self-condition "
        "--weighting p2 --sample-every auto --no-plot"
    )
    text = """
        [data]
        source = "cifar10"
        image_size = 16
        labels = false
        flip = true
        workers = "none"
        [model]
        kind = "rms"
        options = { dim = 8, dim_mults = [1, 2] }
        [schedule.options]
        s = 0.01
        [training]
        lr = 1e-3
        betas = [0.5, 0.9]
        ema = "none"
        self_condition = true
        weighting = "p2"
        [sampling]
        sample_every = "auto"
        [output]
        plot = false
    """
    assert flags(line) == file(tmp_path, text)
    config = Config().replaced(flags(line))
    assert config.training.betas == (0.5, 0.9)
    assert config.training.ema is None
    assert config.model.options == {"dim": 8, "dim_mults": [1, 2]}


def test_what_is_written_is_read_back(tmp_path):
    odd = {
        "data": {"source": 'a "b" \\ c\n\t\x7f\x01 é 🙂', "workers": None},
        "model": {"options": {"name": "x", "flags": [True, False], "dim_mults": [1, 2, 4], "theta": 1e300}},
        "training": {"lr": 0.1 + 0.2, "weight_decay": 5e-324, "betas": (1 / 3, 0.999), "seed": 2**63 - 1},
    }
    config = Config().replaced(odd)
    assert Config().replaced(file(tmp_path, values.write_toml(config.sections()))) == config
    assert Config().replaced(file(tmp_path, values.write_toml(Config().sections()))) == Config()
    assert values.toml_value(math.inf) == "inf"


def test_the_configuration_of_the_page_is_one(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "command_line.md").read_text(encoding="utf-8")
    found = file(tmp_path, page.split("```toml")[1].split("```")[0])
    assert found["model"] == {"kind": "unet", "options": {"width": 16, "time_dim": 64}}


def test_flags_win_and_options_are_merged(tmp_path):
    first = file(tmp_path, "[training]\nlr = 1e-3\nseed = 3\n[model.options]\nwidth = 8\ndepth = 2\n")
    both = given.merged(first, flags("--lr 5e-4 --model-options width=16"))
    assert both == {"training": {"lr": 5e-4, "seed": 3}, "model": {"options": {"width": 16, "depth": 2}}}
    assert first["training"]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[trainig]\nlr = 1\n", "no section [trainig]; did you mean training?"),
        ("[training]\nlearning_rat = 1\n", "no key learning_rat in [training]"),
        ("[training]\nbatchsize = 1\n", "no key batchsize in [training]; did you mean batch_size?"),
        ("[data]\nlr = 1\n", "no key lr in [data]; it belongs to [training]"),
        ("lr = 1\n", "no section [lr]"),
        ("training = 1\n", "training must be a section, [training], got 1"),
        ('[training]\nlr = "fast"\n', "lr in [training] must be a number, got 'fast'"),
        ("[training]\nimages = 1.5\n", "images in [training] must be a whole number, got 1.5"),
        ("[training]\nimages = true\n", "images in [training] must be a whole number, got True"),
        ("[training]\ncompile = 1\n", "compile in [training] must be true or false, got 1"),
        ("[training]\nbetas = [0.9]\n", "betas in [training] must be 2 numbers, got [0.9]"),
        ("[training]\nlr = nan\n", "lr in [training] must be a number, got nan"),
        ('[training]\nema = "off"\n', "ema in [training] must be a number or none, got 'off'"),
        ('[training]\nloss = "rmse"\n', "loss in [training] must be 'mse', 'l1' or 'huber', got 'rmse'"),
        ('[training]\nprecision = "f16"\n', "must be 'auto', 'bf16', 'fp16' or none, got 'f16'"),
        ("[training]\nbatch_size = 0\n", "batch_size in [training] must be at least 1, got 0"),
        ("[training]\nseed = -1\n", "seed in [training] must be at least 0 and at most"),
        ("[model]\noptions = 3\n", "options in [model] must be a table, got 3"),
        ("[training\n", "is no TOML:"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path, text, message):
    with pytest.raises(CommandError) as error:
        file(tmp_path, text)
    assert message in str(error.value)
    assert str(tmp_path / "run.toml") in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--lr fast", "argument --lr: expected a number, got 'fast'"),
        ("--images 1.5", "argument --images: expected a whole number, got '1.5'"),
        ("--betas 0.9", "argument --betas: expected 2 numbers, got '0.9'"),
        ("--loss rmse", "argument --loss: expected 'mse', 'l1' or 'huber', got 'rmse'"),
        ("--model-options width", "expected name=value, got 'width'"),
        ("--learning-rate 1", "unrecognized arguments: --learning-rate 1"),
        ("--imag 5", "unrecognized arguments: --imag 5"),
    ],
)
def test_mistakes_in_flags_are_named(capsys, line, message):
    with pytest.raises(SystemExit) as stop:
        flags(line)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_numbers_out_of_bounds_are_named():
    with pytest.raises(CommandError, match=r"--label-dropout must be at least 0 and at most 1, got 1.5"):
        flags("--label-dropout 1.5")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CommandError, match="no file"):
        given.from_file(tmp_path / "none.toml")
    with pytest.raises(CommandError, match="cannot be read"):
        given.from_file(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--huber-delta 2", "--huber-delta 2.0 has no effect with --loss mse; it is for --loss huber"),
        ("--min-snr-gamma 3 --weighting p2", "no effect with --weighting p2; it is for --weighting min-snr"),
        ("--p2-k 3", "--p2-k 3.0 has no effect with --weighting none; it is for --weighting p2"),
        ("--huber-delta 2 --loss huber", None),
        ("--huber-delta 1", None),
    ],
)
def test_flags_without_effect_are_refused(line, message):
    asked = flags(line)
    if message is None:
        given.check_conflicts(asked, Config().replaced(asked))
        return
    with pytest.raises(CommandError) as error:
        given.check_conflicts(asked, Config().replaced(asked))
    assert message in str(error.value)


def test_a_saved_run_keeps_its_settings(tmp_path):
    saved = Config().replaced(flags("--data digits --lr 1e-3 --model-options width=8 depth=2 --precision bf16"))
    same = "--data digits --lr 0.001 --model-options width=8 --precision auto --labels auto"
    may = "--images 7 --save-every 3 --keep 9 --workers 1 --device cpu --sample-every none --log-every 2 --out x"
    given.check_unchanged(flags(f"{same} {may}"), saved, tmp_path)
    with pytest.raises(CommandError) as error:
        given.check_unchanged(
            flags("--lr 2e-3 --seed 1 --model-options width=16 time_dim=4 --ema none"), saved, tmp_path
        )
    message = str(error.value)
    assert "--lr 0.002 (0.001)" in message
    assert "--seed 1 (0)" in message
    assert "--model-options width=16 (8)" in message
    assert "time_dim=4 (none)" in message
    assert "--ema none (0.9999)" in message
    assert message.count("--") == 6  # these five and --out


def test_paths_do_not_depend_on_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "digits").mkdir()
    monkeypatch.chdir(tmp_path)
    assert flags("--data pictures") == {"data": {"source": str(tmp_path / "pictures")}}
    assert flags("--data digits") == {"data": {"source": "digits"}}


def test_help_shows_defaults():
    parser = argparse.ArgumentParser()
    given.add_flags(parser)
    text = " ".join(parser.format_help().split())
    assert "learning rate; default: 0.0002" in text
    assert "--ema X decay of the average of the weights that samples are drawn from; default: 0.9999" in text
    assert "--loss mse|l1|huber of the prediction; default: mse" in text
