"""`ddpm-fast sample`: the number of processes, kills, signals and a full disk change nothing in what is drawn."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("PIL", reason="pip install 'ddpm_fast[images]'")

import numpy as np
import torch
from PIL import Image
from sample_runs import command, expected, network, pngs, saved

from ddpm_fast import Sampler, Schedule, cli
from ddpm_fast.commands import sample_job, sample_store
from ddpm_fast.sampling.shards import Place, blocks

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("runs") / "run", network())


@pytest.fixture
def sample(monkeypatch, capsys):
    return command(monkeypatch, capsys)


# -- processes and restarts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), [("pixels", 2), ("pixels", 3), ("float32", 3)])
def test_any_number_of_processes_gives_the_same_bits(run, sample, tmp_path, kind, size):
    options = ["-n", 37, "--first", 5, "--deterministic", "--npz", "--guidance", "1.5", "--batch-size", 20]
    options += ["--float32"] if kind == "float32" else []
    assert sample(run, tmp_path / "one", *options)[0] == 0
    saw = []
    for rank in reversed(range(size)):
        assert not (tmp_path / "many" / "samples.npz").exists()
        code, said, errors = sample(run, tmp_path / "many", *options, place=(rank, size))
        assert (code, errors) == (0, "")
        saw.append("all 37 samples are there" in said)
    assert saw == [False] * (size - 1) + [True]
    names = ["samples.npz", "grid.png", "sample.json"]
    if kind == "pixels":
        names += [f"images/{i:09d}.png" for i in range(5, 42)]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes(), name
    wanted = expected(37, 5, guidance=1.5, output="model" if kind == "float32" else "uint8")
    found = torch.from_numpy(np.load(tmp_path / "many" / "samples.npz")["arr_0"])
    assert torch.equal(found if kind == "float32" else found.permute(0, 3, 1, 2), wanted)


def test_without_deterministic_shards_agree_within_a_tolerance(run, sample, tmp_path):
    options = ("-n", 21, "--batch-size", 8, "--float32", "--no-grid", "--no-clip")
    for rank in range(2):
        assert sample(run, tmp_path / "two", *options, place=(rank, 2))[0] == 0
    found = np.load(tmp_path / "two" / "samples.npz")["arr_0"]
    assert np.allclose(found, expected(21, output="model", clip=False).numpy(), rtol=1e-4, atol=1e-4)


def test_what_exists_is_kept_and_what_is_missing_drawn(run, sample, tmp_path):
    out = tmp_path / "out"
    options = ("--deterministic", "--batch-size", 16, "--npz", "--no-grid")
    assert sample(run, out, "-n", 40, *options)[0] == 0
    wanted = pngs(out)
    inverted = 255 - wanted["000000002.png"]
    Image.fromarray(inverted).save(out / "images" / "000000002.png")  # so that a redrawn one would show
    for index in (0, 17, 18, 39):
        (out / "images" / f"{index:09d}.png").unlink()
    (out / "images" / "000000030.png").write_bytes(b"")  # of a power failure
    (out / "images" / "000000017.png.part").write_bytes(b"half")  # of a kill
    code, said, _ = sample(run, out, "-n", 43, *options)
    assert code == 0
    assert "35 of them there already" in said
    again = pngs(out)
    assert np.array_equal(again.pop("000000002.png"), inverted)
    assert len(again) == 42
    images = expected(43)
    assert all(np.array_equal(pixels, images[int(name[:9]), 0].numpy()) for name, pixels in again.items())
    assert len(np.load(out / "samples.npz")["arr_0"]) == 43
    # Parts of arrays, in place of PNGs, may overlap and be cut differently.
    for n, size in ((30, 16), (43, 64)):
        assert sample(run, tmp_path / "parts", "-n", n, "--deterministic", "--no-png", "--batch-size", size)[0] == 0
        if n == 30:
            next((tmp_path / "parts" / "parts").glob("000000000-*")).unlink()
    assert np.array_equal(np.load(tmp_path / "parts" / "samples.npz")["arr_0"], images.permute(0, 2, 3, 1).numpy())


def test_killed_and_gone_on_with_by_other_processes(sample, tmp_path):
    run = saved(tmp_path / "run", network(), schedule=Schedule.linear(10))
    out = tmp_path / "out"
    options = ("-n", 320, "--deterministic", "--no-grid", "--npz", "--batch-size", 16)
    line = [sys.executable, "-m", "ddpm_fast.cli", "sample", str(run), "--out", str(out), *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        deadline = time.monotonic() + 60
        while not (out / "images").is_dir() or len(os.listdir(out / "images")) < 20:
            assert child.poll() is None, child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
    killed_at = len(list((out / "images").glob("*.png")))
    assert 0 < killed_at < 320
    for rank in (1, 0, 2):
        code, _, errors = sample(run, out, *options, place=(rank, 3))
        assert (code, errors) == (0, "")
    sampler = Sampler(network(), Schedule.linear(10), clip=1.0, fused=True, deterministic=True)
    wanted = sampler.sample(320, (1, 8, 8), seed=0, labels=torch.arange(320) % 10, output="uint8")
    assert np.array_equal(np.load(out / "samples.npz")["arr_0"], wanted.permute(0, 2, 3, 1).numpy())


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_between_files_and_the_same_line_goes_on(run, sample, tmp_path, monkeypatch, number, code):
    draw, out = sample_job.draw, tmp_path / "out"

    def interrupted(*arguments, **options):
        for count, one in enumerate(draw(*arguments, **options)):
            if count == 2:
                os.kill(os.getpid(), number)
                time.sleep(1)  # the handler runs at the next bytecode
            yield one

    monkeypatch.setattr(sample_job, "draw", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    options = ("-n", 64, "--batch-size", 16, "--deterministic", "--no-grid")
    stopped, _, errors = sample(run, out, *options)
    assert stopped == code
    assert f"32 of 64 samples are in {out}, the same command goes on" in errors
    assert errors.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(pngs(out)) == 32
    monkeypatch.setattr(sample_job, "draw", draw)
    assert sample(run, out, *options)[0] == 0
    assert np.array_equal(np.stack(list(pngs(out).values())), expected(64)[:, 0].numpy())


def test_a_full_disk_keeps_what_is_there(run, sample, tmp_path, monkeypatch):
    out, replace = tmp_path / "out", os.replace
    wrote = []

    def full(source, target):
        if Path(target).suffix == ".png" and len(wrote) >= 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        wrote.append(target)
        replace(source, target)

    monkeypatch.setattr(sample_store.os, "replace", full)
    options = ("-n", 64, "--batch-size", 16, "--deterministic", "--no-grid")
    code, _, errors = sample(run, out, *options)
    assert code == 2
    assert errors.count("\n") == 1
    assert "No space left on device" in errors
    assert f"{len(wrote)} of 64 samples are in {out}, the same command goes on" in errors
    assert len(pngs(out)) == len(wrote) >= 20
    assert not list(out.rglob("*.part"))
    monkeypatch.setattr(sample_store.os, "replace", replace)
    assert sample(run, out, *options)[0] == 0
    assert np.array_equal(np.stack(list(pngs(out).values())), expected(64)[:, 0].numpy())

    # A real limit, which the images keep and what is made of them does not.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        code, _, errors = sample(run, out, *options, "--npz")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2
    assert f"cannot write to {out / 'samples.npz'}: File too large; 64 of 64 samples are in {out}" in errors
    assert sorted(p.name for p in out.iterdir()) == ["images", "sample.json"]


# -- indices ---------------------------------------------------------------------------------------------------------


def test_shares_tile_the_indices():
    for n in (0, 1, 7, 64):
        for size in (1, 2, 3, 10):
            shares = [Place(rank, size).share(range(5, 5 + n)) for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(5, 5 + n))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Place.from_environment(
        {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    ) == Place(3, 8, 1, 2)
    assert Place.from_environment({}) == Place()
    with pytest.raises(ValueError, match="RANK must be a whole number, got 'x'"):
        Place.from_environment({"RANK": "x"})


def test_blocks_draw_every_missing_index_once():
    numbers = np.random.default_rng(0)
    for _ in range(300):
        first, n, size = (int(numbers.integers(*limits)) for limits in ((0, 50), (1, 60), (1, 40)))
        share = range(first, first + n)
        missing = [i for i in share if numbers.random() < numbers.choice([0.1, 0.5, 1])]
        for chunk in (None, 4, 16):
            todo = blocks(missing, share, size, chunk)
            drawn = [i for block in todo for i in block]
            assert set(missing) <= set(drawn) <= set(share)
            if chunk is None:
                assert len(set(map(len, todo))) <= 1
                assert all(len(block) <= size for block in todo)
            else:
                assert len(drawn) == len(set(drawn))
                assert all(len(block) <= max(chunk, size) for block in todo)
                assert all(block.stop % chunk == 0 or block.stop - 1 in missing for block in todo)
    assert blocks(range(100), range(100), 64) == [range(50), range(50, 100)]
    assert blocks(range(10, 100), range(100), 64, 16) == [range(10, 64), range(64, 100)]
