"""`ddpm-fast eval` on a tiny run: table and file, samples that were drawn before, bits, bad input, two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from ddpm_fast import Sampler, Schedule, UNet
from ddpm_fast.cli import main
from ddpm_fast.commands import evaluate_job
from ddpm_fast.metrics import bits_per_dim
from ddpm_fast.training import TensorData, Trainer
from ddpm_fast.training.checkpoints import load_network

pytestmark = pytest.mark.usefixtures("one_thread")

SCHEDULE = Schedule.linear(8, 0.02, 0.6)


def pictures(n, seed):
    images = torch.randint(0, 80, (n, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[:, :, 2:4] += 170
    return images


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """data/train.npz-like parts as IDX files, a run, and samples of it."""
    place = tmp_path_factory.mktemp("eval")
    (place / "data").mkdir()
    for name, images in (("train", pictures(96, 0)), ("t10k", pictures(40, 1))):
        array = images[:, 0].numpy()
        head = (0x803).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (place / "data" / f"{name}-images-idx3-ubyte").write_bytes(head + array.tobytes())
        labels = (np.arange(len(array)) % 3).astype(np.uint8)
        head = (0x801).to_bytes(4, "big") + len(labels).to_bytes(4, "big")
        (place / "data" / f"{name}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    torch.manual_seed(0)
    labels = torch.arange(96) % 3
    model = UNet(1, 16, width=4, depth=1, num_classes=3)
    data = TensorData(pictures(96, 0), labels)
    Trainer(model, SCHEDULE, data, out=place / "run", images=64, batch_size=32, precision=None).train()
    return place


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("ddpm_fast.metrics.small_classifier.IMAGES", 256)


def evaluate(place, *options):
    return main(["eval", str(place / "run"), "--data", str(place / "data"), "--num", "24", *options])


def test_a_run(place, tmp_path, capsys):
    out = tmp_path / "eval.json"
    assert evaluate(place, "--metrics", "frechet,kid,precision-recall,bits", "--out", str(out), "--no-fused") == 0
    said = capsys.readouterr().out
    assert "24 samples x 8 = 192 network passes" in said
    assert "bits of 40 images x 8 = 320 network passes" in said
    assert said.index("cost:") < said.index("Frechet distance")
    assert "not comparable with published FID" in said
    assert "no Inception here" in said
    report = json.loads(out.read_text())
    assert set(report["figures"]) == {"frechet", "kid", "precision", "recall", "density", "coverage"}
    # An untrained model is far from the data, the data's other part is not.
    assert report["figures"]["frechet"]["samples"] > report["figures"]["frechet"]["real"] > 0
    assert report["against"] == {"name": "data train", "images": 96}
    assert report["real"] == {"name": "data test", "images": 24}
    loaded = load_network(place / "run")
    sampler = Sampler(loaded.network, loaded.schedule, clip=1.0)
    bits = bits_per_dim(sampler, pictures(40, 1), labels=torch.arange(40) % 3, batch_size=40)
    assert report["bits"]["bits_per_dim"] == pytest.approx(bits.mean, rel=1e-5)
    assert report["bits"]["exact"]
    # The classifier is there now, and everything is a function of the seed.
    again = tmp_path / "again.json"
    assert evaluate(place, "--metrics", "frechet", "--out", str(again), "--no-fused", "--batch-size", "7") == 0
    assert "trained on data before" in capsys.readouterr().out
    value = json.loads(again.read_text())["figures"]["frechet"]["samples"]
    assert value == pytest.approx(report["figures"]["frechet"]["samples"], rel=1e-3)


def test_a_dry_run_draws_nothing(place, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_job, "drawn", None)
    options = ("--dry-run", "--features", "pixels", "--method", "ddim", "--steps", "4", "--guidance", "2")
    assert evaluate(place, *options) == 2  # guidance without label dropout in training
    assert evaluate(place, *options[:-2]) == 0
    said = capsys.readouterr().out
    assert "24 samples x 4 = 96 network passes" in said
    assert "Frechet" not in said


def test_samples_that_are_there_already(place, tmp_path, capsys):
    real = pictures(40, 5)
    np.savez(tmp_path / "samples.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    data = ["--data", str(place / "data"), "--features", "pixels"]
    assert main(["eval", str(tmp_path / "samples.npz"), *data, "--out", str(tmp_path / "a.json")]) == 0
    assert main(["sample", str(place / "run"), "--num", "8", "--out", str(tmp_path / "drawn"), "--quiet"]) == 0
    assert main(["eval", str(tmp_path / "drawn"), *data, "--out", str(tmp_path / "b.json"), "--quiet"]) == 0
    good, poor = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert (good["num"], poor["num"]) == (40, 8)  # the grid is no sample
    assert good["figures"]["frechet"]["samples"] < 2 * good["figures"]["frechet"]["real"]
    assert good["figures"]["frechet"]["samples"] < poor["figures"]["frechet"]["samples"]
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "drawn"), *data, "--metrics", "bits"]) == 2
    assert "bits are of a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics", "fid"), "--metrics must be some of frechet, kid, precision-recall, bits, got 'fid'"),
        (("--num", "1"), "--num must be at least 4, got 1"),
        (("--bits-steps", "none"), '--bits-steps must be a number of at least 1, or "all"'),
        (("--out", "/nowhere/eval.json"), "--out /nowhere/eval.json: a file in a folder that exists was expected"),
        (("--features", "inception"), "no Inception weights at"),
        (("--features", "pixels", "--inception", "x"), "--inception and --features pixels exclude each other"),
        (("--labels", "7"), "--labels must lie in 0..2, got 7"),
        (("--metrics", "bits", "--data", "nowhere"), "no folder or file nowhere"),
    ],
)
def test_bad_input_is_one_line(place, capsys, options, message):
    assert evaluate(place, *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_bad_sources(place, tmp_path, capsys):
    assert main(["eval", str(tmp_path / "none"), "--data", str(place / "data")]) == 2
    assert "a run, a checkpoint, or samples" in capsys.readouterr().err
    assert main(["eval", str(place / "run")]) == 2
    assert "--data is missing" in capsys.readouterr().err


def test_two_processes_find_the_same(place, tmp_path, monkeypatch):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    options = ["--features", "pixels", "--metrics", "frechet,precision-recall,bits", "--deterministic", "--quiet"]
    assert evaluate(place, *options, "--out", str(one)) == 0
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    for name, value in {**world, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    line = ["eval", str(place / "run"), "--data", str(place / "data"), "-n", "24", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "RANK": "1", "LOCAL_RANK": "1"}
    second = subprocess.Popen([sys.executable, "-m", "ddpm_fast.cli", *line], env=environment)
    try:
        assert main([*line, "--out", str(two)]) == 0
        assert second.wait(60) == 0
    finally:
        second.kill()
    ours, theirs = (json.loads(path.read_text()) for path in (one, two))
    for name, value in ours["figures"].items():
        assert theirs["figures"][name]["samples"] == pytest.approx(value["samples"], rel=1e-6)
        assert theirs["figures"][name]["real"] == pytest.approx(value["real"], rel=1e-6)
    assert theirs["bits"]["bits_per_dim"] == pytest.approx(ours["bits"]["bits_per_dim"], rel=1e-5)
