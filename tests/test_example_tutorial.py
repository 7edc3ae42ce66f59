"""examples/tutorial.py at a tiny setting: its files and figures, and its images beside the tutorial's own loop."""

from __future__ import annotations

import importlib.util
import json
import pickle
import re
import signal
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pip install 'ddpm_fast[images]'")
pytest.importorskip("sklearn", reason="pip install 'ddpm_fast[demo]'")

import numpy as np
import torch
from PIL import Image
from sampler_models import threads, tutorial_loop
from test_unet import TutorialUNet

import ddpm_fast
from ddpm_fast import ops
from ddpm_fast.training import open_data

FILES = {"best.pt", "loss.png", "report.json", "samples.png", "time_embedding.png"}
T = 250  # of the tutorial's 1000: a network that has seen this little would make white and black of them
TINY = ["--width", "4", "--depth", "4", "--train", "512", "--epochs", "3", "--samples", "8", "--compare", "1"]


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parent.parent / "examples" / "tutorial.py"
    spec = importlib.util.spec_from_file_location("example_tutorial", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_fashion(source, **options):
    """open_data on a machine that has no Fashion-MNIST."""
    if source == "fashion-mnist":
        raise FileNotFoundError("no fashion-mnist data found")
    return open_data(source, **options)


@pytest.fixture(scope="module")
def done(example, tmp_path_factory):
    """A run on the digits: its folder and its report."""
    out = tmp_path_factory.mktemp("tutorial")
    with pytest.MonkeyPatch.context() as patch, threads(1):
        patch.setattr(example, "open_data", without_fashion)
        patch.setattr(example, "SCHEDULE", ddpm_fast.Schedule.linear(T))
        assert example.main(["--out", str(out), *TINY]) == 0
    return out, json.loads((out / "report.json").read_text())


def test_files_and_figures(done):
    out, report = done
    assert {path.name for path in out.iterdir()} == FILES
    for path in out.glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
            assert picture.width == 800
            assert np.asarray(picture.convert("L")).std() > 10, path.name
    assert (report["data"], report["samples"], report["training"]["images"]) == ("digits", 8, 3 * 512)
    assert report["network"] == {"in_channels": 1, "time_dim": 256, "width": 4, "depth": 4, "num_classes": None}
    assert len(report["losses"]) == 3
    assert report["losses"][2] < 0.9 * report["losses"][0]
    assert 0.5 < report["energy_ratio_of_real"] < 2 < report["energy_ratio"] < 1000  # three epochs are too few
    eager, fused, half = report["speed"]["rows"]
    assert fused["speed_up"] == pytest.approx(eager["seconds"][0] / fused["seconds"][0])
    assert fused["max_abs_difference"] < 1e-3 < half["max_abs_difference"]
    assert fused["pixels_that_differ"] <= 1


def test_images_of_the_tutorials_own_loop(done):
    """Its classes and its loop in eager PyTorch, our file of weights: the same images from the same noise, sooner."""
    out, _ = done
    weights = torch.load(out / "best.pt", weights_only=True)
    theirs = TutorialUNet(1, 256, 4)
    theirs.load_state_dict(weights)
    ours = ddpm_fast.UNet(1, 256, width=4, depth=4)
    ours.load_state_dict(weights)
    shape = (1, 16, 16)
    x_t = ops.normal(2, shape, seed=5)
    noise = [ops.normal(2, shape, seed=5, stream=1 + t) for t in range(T)]
    with threads(1):
        began = time.process_time()
        *_, (_, x) = tutorial_loop(theirs.eval(), T, x_t, noise)
        expected, eager = (x.clamp(-1, 1) + 1) / 2, time.process_time() - began
        sampler = ddpm_fast.Sampler(ours, ddpm_fast.Schedule.linear(T), like="tutorial", fused=True)
        sampler.sample(2, x=x_t, start=T - 1)  # chooses the plan
        began = time.process_time()
        got = sampler.sample(2, shape, seed=5)
        fused = time.process_time() - began
    print(f"2 images: {eager:.2f} s by the tutorial's loop, {fused:.2f} s by the fused Sampler")
    assert sampler.fused
    clamped = (expected == 0) | (expected == 1)
    assert float(clamped.float().mean()) < 0.9
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-3)
    assert torch.equal((got * 255).round().byte(), (expected * 255).round().byte())
    assert fused < 0.8 * eager


def test_cifar(example, tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {b"data": rng.integers(0, 256, (20, 3072), np.uint8), b"labels": [0] * 20}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    monkeypatch.setattr(example, "SCHEDULE", ddpm_fast.Schedule.linear(20))
    options = ["--width", "2", "--depth", "1", "--train", "64", "--epochs", "1", "--samples", "4", "--compare", "1"]
    assert example.main(["--data", str(folder), "--out", str(tmp_path / "out"), *options]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["data"], report["network"]["in_channels"], report["speed"]["pixels"]) == ("cifar10", 3, 3072)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--data", "missing"],
            "no cifar10 data found, looked in: missing, .* from https://www.cs.toronto.edu/~kriz/cifar.html, .* digits",
        ),
        (["--samples", "300"], "real must hold more samples than samples' 300 .*, got 287"),
        (["--depth", "5"], "height and width of x must be multiples of 32"),
        (["--epochs", "0"], "images must be at least 1, got 0"),
        (["--out", "file"], "file"),
    ],
)
def test_bad_input(example, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example, "open_data", without_fashion)
    Path("file").touch()
    assert example.main(["--width", "2", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tutorial.py: ")
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_stops_when_asked(example, tmp_path, monkeypatch):
    """It does not go on to sample, by weights that an earlier run may have left."""

    class Asked(example.BestEpoch):
        def on_step(self, trainer, report):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(example, "open_data", without_fashion)
    monkeypatch.setattr(example, "BestEpoch", Asked)
    with pytest.raises(SystemExit, match="stopped by SIGTERM"):
        example.main(["--out", str(tmp_path), "--width", "2"])
    assert not (tmp_path / "samples.png").exists()


def test_without_matplotlib(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert example.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "tutorial.py: plots need matplotlib; pip install ddpm_fast[train]\n"
