"""examples/letters.py: a tiny run's files and figures, that VAE and page are right, bad input."""

import importlib.util
import json
import re
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_fast
from ddpm_fast.training.data import letters as source

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")
PATH = Path(__file__).parents[1] / "examples" / "letters.py"
TINY = ["--reader", "128", "--vae", "4", "--ddpm", "2"]


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_letters", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def few(example, monkeypatch, one_thread):
    """Ten images of each letter instead of a thousand; ten steps."""
    for split, count in (("train", 10), ("test", 5)):
        monkeypatch.setitem(source.EACH, split, count)
    for name, value in {"T": 10, "SCHEDULE": ddpm_fast.Schedule.cosine(10)}.items():
        monkeypatch.setattr(example, name, value)


def test_a_run(example, tmp_path, capsys):
    assert example.main(["--out", str(tmp_path), "--text", "hi all", "--counter", *TINY]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("drawn", "real", "decoded"):
        assert 0 <= report["read right"][name] <= 1
    assert report["drawn"] == 26 * 40
    assert report["settings"]["guidance"] == 2
    assert f"drawn {report['read right']['drawn']:.1%}" in capsys.readouterr().out.splitlines()[-1]
    with Image.open(tmp_path / "sentence.png") as picture:
        assert picture.size == (3 * 86 + 2, 2 * 86 + 2)
        last = np.asarray(picture.convert("L")).astype(int)
    with Image.open(tmp_path / "sentence.gif") as film:
        assert film.n_frames == example.T
        durations, frames = [], []
        for i in range(film.n_frames):
            film.seek(i)
            durations.append(film.info["duration"])
            frames.append(np.asarray(film.convert("L")).astype(int))
    assert durations[-1] == pytest.approx(20 * durations[0], rel=0.05)
    assert np.abs(frames[-1] - last)[:60].mean() < 10  # but for the grey levels and the counter below it is the picture
    assert np.abs(frames[-1] - last)[-20:, -80:].mean() > 10
    assert (frames[0] != frames[-1])[:60].any()
    with Image.open(tmp_path / "letters.png") as picture:
        assert picture.width > 26 * 28


def test_letters_are_asked_for_by_label_and_read_against_it(example, tmp_path, monkeypatch):
    """With a reader that says A to everything, one letter of 26 is right."""
    asked = []
    stream = ddpm_fast.Sampler.stream

    def listen(self, n, *args, labels, guidance, **options):
        asked.append((labels.tolist(), guidance))
        return stream(self, n, *args, labels=labels, guidance=guidance, **options)

    monkeypatch.setattr(ddpm_fast.Sampler, "stream", listen)
    says_a = Namespace(predict=lambda images: torch.zeros(len(images), dtype=torch.int64))
    monkeypatch.setattr(example.metrics, "trained_classifier", lambda data, **options: says_a)
    assert example.main(["--out", str(tmp_path), "--text", "hi all", "--guidance", "3", *TINY]) == 0
    assert ([7, 8, 0, 11, 11], 3.0) in asked
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["read right"] == pytest.approx({"real": 1 / 26, "decoded": 1 / 26, "drawn": 1 / 26})


def test_the_same_seed_gives_the_same(example, tmp_path):
    for name in ("a", "b"):
        assert example.main(["--out", str(tmp_path / name), "--text", "ok", *TINY]) == 0
    for file in ("sentence.png", "sentence.gif", "letters.png"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_vae_learns_and_its_latents_are_standard(example):
    images = torch.from_numpy(source.rendered("train")[0])
    torch.manual_seed(0)
    vae = example.VAE()
    vae.fit(images, 160)
    x = vae.encode(images)
    assert x.shape == (260, example.LATENTS)
    assert x.mean(dim=0).abs().max() < 1e-4
    assert (x.std(dim=0) - 1).abs().max() < 1e-4
    decoded = vae.decode(x)
    assert decoded.dtype == torch.uint8
    pixels = images.float()
    assert ((decoded - pixels) ** 2).mean() < 0.75 * ((pixels.mean(dim=0) - pixels) ** 2).mean()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "no 1"], "--text must be words of the letters A to Z, got 'no 1'"),
        (["--text", " "], "--text must be words of the letters A to Z, got ' '"),
        (["--data", "missing"], r"emnist-letters.*missing.*www\.nist\.gov.*\"letters\" are rendered here"),
        (["--out", "file"], "file"),
        (["--ddpm", "0"], "images must be at least 1, got 0"),
    ],
)
def test_bad_input(example, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert example.main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("letters.py: ")
    assert re.search(message, error)
    assert error.count("\n") == 1


def test_stops_when_asked(example, tmp_path, monkeypatch):
    class Asked(example.ddpm_fast.Trainer):
        def step(self):
            signal.raise_signal(signal.SIGTERM)
            return super().step()

    monkeypatch.setattr(example.ddpm_fast, "Trainer", Asked)
    with pytest.raises(SystemExit, match="stopped by SIGTERM"):
        example.main(["--out", str(tmp_path), *TINY])
    assert not (tmp_path / "sentence.png").exists()
