"""examples/toy.py: the distributions, that training helps, the files and figures of a tiny run, bad input."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import ddpm_fast
from ddpm_fast.metrics import energy_distance

pytest.importorskip("matplotlib")
PATH = Path(__file__).parents[1] / "examples" / "toy.py"


def load():
    spec = importlib.util.spec_from_file_location("example_toy", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toy():
    return load()


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_distributions_are_the_texts(toy):
    rng, n = np.random.default_rng(0), 20_000
    x = toy.draw("mixture", n, rng)
    assert x.shape == (n, 1)
    assert (x < 0).mean() == pytest.approx(0.3, abs=0.02)
    assert x[x > 0].mean() == pytest.approx(0.5, abs=0.02)
    assert x[x > 0.5].std() == pytest.approx(0.2 * np.sqrt(1 - 2 / np.pi), abs=0.01)  # half of a normal
    x = toy.draw("ramp", n, rng)
    assert x.shape == (n, 1)
    assert (x < 0.5).mean() == pytest.approx(0.75, abs=0.02)  # P(min(u, v) < a) = 1 - (1 - a)^2
    x = toy.draw("spiral", n, rng)
    assert x.shape == (n, 2)
    rho = np.hypot(*x.T)
    assert 0.25 <= rho.min() < 0.3
    assert 1.0 < rho.max() <= 1.05
    turned = np.arctan2(x[:, 1], x[:, 0])[rho < 0.3]  # u < 1/13 here, so theta < 0.73
    assert turned.min() >= 0
    assert turned.max() < 0.73


def test_training_helps(toy):
    torch.set_num_threads(1)
    x0 = toy.draw("mixture", 500, np.random.default_rng(0))
    x0 = ((x0 - x0.mean()) / x0.std()).astype(np.float32)
    some, more = (energy_distance(toy.generate(x0, 500, 200, steps, seed=0, batch=128), x0) for steps in (20, 300))
    assert more < 0.03
    assert more < some / 2


def test_files_and_figures(toy, tmp_path, capsys):
    assert toy.main(["--out", str(tmp_path / "out"), "--steps", "8", "--samples", "64"]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    names = ["real", "kernel density", "T = 200, 8 steps"]
    found = report["energy_distance"]
    assert {name: list(kinds) for name, kinds in found.items()} == {
        "mixture": names,
        "ramp": names,
        "spiral": [*names[:2], "T = 200, 1 steps", "T = 200, 8 steps", "T = 1000, 1 steps", "T = 1000, 8 steps"],
    }
    assert report["settings"]["steps"] == 8
    assert report["seconds"] > 0
    for name, kinds in found.items():
        assert all(distance > 0 for distance in kinds.values()), name
        assert kinds["real"] < 0.2, name
    assert found["spiral"]["T = 200, 8 steps"] > 10 * found["spiral"]["real"]  # 8 steps teach nothing
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("spiral, in units of the energy distance of two real samples")
    ratio = found["spiral"]["T = 1000, 8 steps"] / found["spiral"]["real"]
    assert printed[-1].endswith(f"T = 1000, 8 steps {ratio:.1f}")
    for picture in ("forward.png", "lines.png", "spiral.png"):
        content = (tmp_path / "out" / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert 5_000 < len(content) < 200_000


@pytest.mark.parametrize("name", ["mixture", "ramp", "spiral"])
def test_what_is_measured(toy, name, monkeypatch):
    """Real samples in place of generated ones are as far as real ones; one point many times is not."""
    figures = []
    for generate in (lambda x0, n, *rest: x0[:n], lambda x0, n, *rest: np.zeros_like(x0[:n])):
        monkeypatch.setattr(toy, "generate", generate)
        kinds = toy.study(name, [(200, 8)], Namespace(seed=0, samples=1000))
        figures.append(kinds["T = 200, 8 steps"][1] / kinds["real"][1])
    assert figures[0] < 5
    assert figures[1] > 50


def test_the_seed_decides(toy):
    figures = []
    for seed in (0, 0, 1):
        kinds = toy.study("ramp", [(200, 8)], Namespace(seed=seed, samples=50))
        figures.append({kind: distance for kind, (_, distance) in kinds.items()})
    assert figures[0] == figures[1] != figures[2]


def test_half_a_training_is_no_result(toy, monkeypatch):
    monkeypatch.setattr(ddpm_fast.Trainer, "train", lambda trainer: setattr(trainer, "stopped", "SIGTERM"))
    with pytest.raises(SystemExit, match="stopped by SIGTERM"):
        toy.generate(np.zeros((4, 1), np.float32), 4, 200, 8, seed=0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--steps", "7"], "--steps must be at least 8, got 7"),
        (["--samples", "9"], "--samples must be at least 10, got 9"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--out", str(PATH)], "--out must be a folder that can be written"),
    ],
)
def test_bad_input(toy, option, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        toy.main(option)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as exit_:
        load()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        "toy.py draws with matplotlib, which is not installed: pip install ddpm_fast[train]\n"
    )
