"""examples/letters.py at a tiny setting: its files, its figures, and what it says to bad input."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from ddpm_fast.training.data import letters

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

FILE = Path(__file__).parents[1] / "examples/letters.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("example_letters", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def few(monkeypatch, example):
    monkeypatch.setattr(example, "EACH", 8)
    monkeypatch.setattr(letters, "FACES", ("DejaVuSans",))
    monkeypatch.setattr(letters, "EACH", {"train": 40, "test": 10})


def frames_of(path):
    with Image.open(path) as gif:
        frames, times = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("L")).astype(int))
            times.append(gif.info["duration"])
    return frames, times


def test_it_writes_the_sentence_the_letters_and_the_figures(example, tmp_path, capsys, monkeypatch):
    # At this effort the reader would learn nothing: it alone is given more.
    reader = example.trained_classifier
    monkeypatch.setattr(example, "trained_classifier", lambda data, images, **more: reader(data, images=4000, **more))
    command = ["--sentence", "to be continued", "--effort", "0.03", "--seed", "3"]
    assert example.main([*command, "--out", str(tmp_path / "a")]) == 0
    report = json.loads((tmp_path / "a/report.json").read_text())
    assert set(report) == {"read", "seconds", "settings"}
    assert report["settings"]["sentence"] == "TO BE CONTINUED"
    assert report["settings"]["seed"] == 3
    assert set(report["read"]) == {"real", "VAE", "generated"}
    assert 0.5 < report["read"]["real"] <= 1
    assert 0.1 < report["read"]["generated"] < report["read"]["real"]  # guessing is 0.04
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"{report['read']['generated']:.1%} (generated)" in last

    frames, times = frames_of(tmp_path / "a/sentence.gif")
    final = np.asarray(Image.open(tmp_path / "a/sentence.png").convert("L")).astype(int)
    assert len(frames) == example.T
    assert final.shape == (2 * (56 + 10) + 10, 12 * (56 + 10) + 10)  # two lines of twelve places
    assert np.abs(frames[-1] - final)[:, :-60].max() <= 255 / 15  # the GIF keeps 16 greys, and has the counter
    assert abs(times[-1] - 1000 * example.HELD / example.FPS) <= 10
    assert max(times[:-1]) < 100
    moved = [np.abs(b - a).mean() for a, b in itertools.pairwise(frames)]
    assert np.mean(moved[:5]) > 2 * np.mean(moved[-5:]) > 0  # noise first, letters at the end
    # "   TO BE    " above " CONTINUED  ": blanks are black, letters are not.
    places = final[10:].reshape(2, 66, -1)[:, :56, 10:].reshape(2, 56, 12, 66)[:, :, :, :56].max(axis=(1, 3))
    assert "".join("x" if ink > 60 else " " for ink in places[0]) == "   xx xx    "
    assert "".join("x" if ink > 60 else " " for ink in places[1])[:10] == " xxxxxxxxx"
    assert Image.open(tmp_path / "a/letters.png").width > 26 * 30


def test_one_seed_gives_the_same_pictures_and_the_counter_can_go(example, tmp_path):
    for name, more in (("a", []), ("b", ["--no-counter"])):
        assert example.main(["--sentence", "AB", "--effort", "0.001", "--out", str(tmp_path / name), *more]) == 0
    for picture in ("sentence.png", "letters.png"):  # they have no counter
        assert (tmp_path / "a" / picture).read_bytes() == (tmp_path / "b" / picture).read_bytes()
    counted, plain = (frames_of(tmp_path / name / "sentence.gif")[0] for name in "ab")
    for with_counter, without in zip(counted, plain, strict=True):
        rows, columns = np.nonzero(with_counter != without)
        assert rows.min() > 50  # they differ in the corner alone
        assert columns.min() > 740


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sentence", "2 B OR NOT"], "--sentence must be words of 1 to 12 letters A to Z, got '2 B OR NOT'"),
        (["--sentence", " "], "got ' '"),
        (["--sentence", "INCOMPREHENSIBLE"], "words of 1 to 12 letters"),
        (["--effort", "0"], "images must be"),
        (["--data", "{tmp}/nowhere"], "no emnist-letters data found, looked in: {tmp}/nowhere"),
        (["--out", "{tmp}/file/out"], "{tmp}/file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(example, tmp_path, capsys, arguments, message):
    (tmp_path / "file").write_text("")
    arguments = [argument.format(tmp=tmp_path) for argument in ["--out", "{tmp}/out", *arguments]]
    assert example.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("letters.py: ")
    assert message.format(tmp=tmp_path) in line


def test_missing_data_says_where_to_get_it_and_what_runs_without(example, tmp_path, capsys):
    assert example.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "https://www.nist.gov/itl/products-and-services/emnist-dataset" in error
    assert '"letters" are rendered here and need no files' in error
    assert not (tmp_path / "out").exists()
