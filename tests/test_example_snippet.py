"""examples/snippet.py at a tiny setting: its files, its figures, and what it says of a folder that will not do."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trainer_models import pictures

Image = pytest.importorskip("PIL.Image", reason="pip install 'ddpm_fast[train]'")
pytest.importorskip("matplotlib", reason="pip install 'ddpm_fast[train]'")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*holds only")]

EXAMPLE = Path(__file__).parent.parent / "examples" / "snippet.py"
TINY = ["--dim", "8", "--image-size", "8", "--sampling-timesteps", "2", "--train-num-steps", "3"]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("snippet_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(the example, its folder, its report) of the command without a folder, but for fewer images."""
    module, out = load(), tmp_path_factory.mktemp("snippet")
    module.RENDERED, module.SAMPLES = 48, 8
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the tests
    assert module.main(["--out", str(out), "--seed", "3", *TINY]) == 0
    torch.set_num_threads(before)
    return module, out, json.loads((out / "report.json").read_text())


def test_without_a_folder_it_renders_images_and_measures_samples(run):
    _, out, report = run
    assert len(list((out / "images").iterdir())) == 48
    for name in ("samples.png", "loss.png"):
        with Image.open(out / name) as picture:
            assert picture.width >= 800
            assert len(np.unique(np.asarray(picture))) > 20
    assert (report["samples"], report["real_images"]) == (8, 32)
    assert math.isfinite(report["energy_ratio"])
    assert report["energy_ratio"] > 3, "three steps cannot have taught it anything"
    assert 0 < report["last_loss"] < 2
    settings = report["settings"]
    assert (settings["dim"], settings["train_lr"], settings["seed"]) == (8, 1e-3, 3)


def test_a_seed_gives_the_same_figures_again(run, tmp_path):
    module, out, report = run
    assert module.main([str(out / "images"), "--small", "--out", str(tmp_path), "--seed", "3", *TINY]) == 0
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["energy_ratio"] == report["energy_ratio"]
    assert again["last_loss"] == report["last_loss"]
    assert not (tmp_path / "images").exists(), "a folder was given"


def test_of_a_folder_it_makes_what_the_article_says(tmp_path):
    folder = pictures(tmp_path / "pictures", 120, size=20)
    module = load()
    sizes = {**module.ARTICLE, "dim": 8}  # the article's 64 takes seconds to set up
    trainer = module.article(folder, tmp_path / "out", module.argparse.Namespace(**sizes))
    assert module.ARTICLE["dim"] == 64
    assert trainer.image_size == (128, 128)
    assert (trainer.model.num_timesteps, trainer.model.sampling_timesteps, trainer.model.loss_type) == (1000, 250, "l1")
    assert (trainer.batch_size, trainer.gradient_accumulate_every, trainer.train_num_steps) == (8, 2, 10000)
    assert (trainer.opt.param_groups[0]["lr"], trainer.ema.beta, trainer.ema.update_every) == (8e-5, 0.995, 10)


@pytest.mark.parametrize(
    ("made", "message"),
    [(None, "no folder .*absent to read images from"), ("empty", "hold no image; looked for .jpg"), (3, "holds 3 im")],
)
def test_a_folder_that_will_not_do_is_one_line(tmp_path, capsys, made, message):
    folder = tmp_path / "absent"
    if made == "empty":
        folder.mkdir()
    elif made is not None:
        pictures(folder, made)
    assert load().main([str(folder), "--small", "--out", str(tmp_path / "out"), *TINY]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "without one, shapes are rendered" in error
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["PIL", "matplotlib.figure"])
def test_a_missing_package_is_one_line(run, monkeypatch, capsys, tmp_path, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert run[0].main(["--out", str(tmp_path), *TINY]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("snippet.py: ")
    assert error.endswith("pip install ddpm_fast[train]")
