"""`ddpm-fast sample`: what it writes, that processes and restarts change nothing, and what it refuses."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file

from ddpm_fast import Sampler, Schedule, cli
from ddpm_fast.commands import sample_job, sample_store
from ddpm_fast.interop._unets import save_unet
from ddpm_fast.nn import DDPMUNet, UNet
from ddpm_fast.sampling.shards import Place, blocks
from ddpm_fast.training import checkpoints

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error"),
]

T = 6
SCHEDULE = Schedule.linear(T)
ONE_PROCESS = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), "")


def network(channels=1, classes=10, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(channels, 32, width=8, depth=1, num_classes=classes).eval()


def saved(run, net, shape=(1, 8, 8), schedule=SCHEDULE, dropout=0.1, other=None):
    """A run's folder with a checkpoint; other: the weights before averaging."""
    weights = {"ema": net, "model": other or net}
    tensors = {f"{part}.{key}": value for part, one in weights.items() for key, value in one.state_dict().items()}
    tensors["schedule.betas"] = torch.tensor(schedule.betas)
    config = {
        "network": checkpoints.network_config(net),
        "schedule": {"label": repr(schedule)},
        "training": {"prediction": "eps", "label_dropout": dropout, "self_condition": None},
        "data": {"name": "made up", "shape": list(shape), "num_classes": net.num_classes},
    }
    folder = run / "checkpoints"
    folder.mkdir(parents=True)
    checkpoints.write(folder / checkpoints.file_name(1000), tensors, {"images_seen": 1000}, config)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("runs") / "run", network())


@pytest.fixture
def sample(monkeypatch, capsys):
    """(source, out, *options, place=(rank, size)) -> (exit code, stdout, stderr) of the command line."""

    def call(source, out, *options, place=None):
        named = dict(ONE_PROCESS) if place is None else {"RANK": str(place[0]), "WORLD_SIZE": str(place[1])}
        for name, value in named.items():
            monkeypatch.setenv(name, value)
        code = cli.main(["sample", str(source), "--out", str(out), "--device", "cpu", *map(str, options)])
        return code, *capsys.readouterr()

    return call


def expected(n, first=0, seed=0, labels=None, guidance=1.0, output="uint8", net=None, **options):
    """What the Sampler itself draws, in the command's deterministic mode."""
    sampler = Sampler(net or network(), SCHEDULE, fused=True, deterministic=True, **{"clip": 1.0, **options})
    asked = torch.arange(first, first + n) % 10 if labels is None else labels
    return sampler.sample(
        n, (1, 8, 8), seed=seed, first_sample=first, labels=asked, guidance=guidance, output=output
    )  # fmt: skip


def pngs(out):
    return {path.name: np.asarray(Image.open(path)) for path in sorted((out / "images").iterdir())}


# -- what is written -------------------------------------------------------------------------------------------------


def test_pngs_grid_npz_safetensors_and_gif(run, sample, tmp_path):
    out = tmp_path / "out"
    options = ("--num", 25, "--first", 3, "--seed", 7, "--deterministic", "--npz", "--safetensors", "--gif")
    code, said, errors = sample(run, out, *options)
    assert (code, errors) == (0, "")
    assert "1,000 images" in said
    assert "all 25 samples are there" in said
    images = expected(25, 3, seed=7)
    files = pngs(out)
    assert list(files) == [f"{i:09d}.png" for i in range(3, 28)]
    assert np.array_equal(np.stack(list(files.values())), images[:, 0].numpy())

    arrays = np.load(out / "samples.npz")
    assert sorted(arrays) == ["arr_0", "arr_1"]
    assert np.array_equal(arrays["arr_0"], images.permute(0, 2, 3, 1).numpy())
    assert arrays["arr_1"].tolist() == [i % 10 for i in range(3, 28)]
    tensors = load_file(out / "samples.safetensors")
    assert torch.equal(tensors["samples"], images)
    assert tensors["labels"].tolist() == arrays["arr_1"].tolist()

    # Ten columns, one a class, beginning with that of the first image; the GIF ends with the grid's first two rows.
    grid = np.asarray(Image.open(out / "grid.png"))
    assert np.array_equal(tile(grid, 0, 0, 3), images[0, 0].numpy())
    assert np.array_equal(tile(grid, 2, 4, 3), images[24, 0].numpy())
    sampler = Sampler(network(), SCHEDULE, clip=1.0, fused=True, deterministic=True)
    labels = torch.arange(3, 23) % 10
    with Image.open(out / "reverse.gif") as film:
        frames = [np.asarray(frame.convert("L"), dtype=np.int64) for frame in ImageSequence.Iterator(film)]
    assert len(frames) == T
    for step in sampler.stream(20, (1, 8, 8), seed=7, first_sample=3, labels=labels):
        shown = tile(frames[step.row], 1, 9, 2)
        assert np.abs(shown - ((step.x[19, 0] + 1) * 127.5).clamp(0, 255).numpy()).max() < 5  # 32 levels of grey
    assert np.abs(shown - images[19, 0].numpy()).max() < 5
    assert not list(out.rglob("*.part"))


def tile(picture, row, column, rows):
    """The 8x8 image in a grid of these, each enlarged 8 times, with 16 pixels between them and labels above."""
    top = picture.shape[0] - (rows - row) * 80
    left = 16 + column * 80
    pixels = picture[top : top + 64, left : left + 64][::8, ::8]
    return pixels if pixels.ndim == 2 else pixels[..., 0]


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        (("--label", "3"), [3] * 6),
        (("--labels", "7,2"), [7, 2, 7, 2, 7, 2]),
        (("--label", "none"), [10] * 6),
        (("--labels", "5, none", "--guidance", "2"), [5, 10, 5, 10, 5, 10]),
    ],
)
def test_labels_are_those_asked_for(run, sample, tmp_path, options, labels):
    code, _, errors = sample(run, tmp_path / "out", "-n", 6, "--deterministic", "--no-grid", "--float32", *options)
    assert (code, errors) == (0, "")
    guidance = 2.0 if "--guidance" in options else 1.0
    wanted = expected(6, labels=torch.tensor(labels), guidance=guidance, output="model")
    arrays = np.load(tmp_path / "out" / "samples.npz")  # float32 has no PNGs, so this is where they are
    assert np.array_equal(arrays["arr_0"], wanted.numpy())
    assert arrays["arr_1"].tolist() == labels
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["parts", "sample.json", "samples.npz"]


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (("--method", "ddim", "--steps", "3", "--eta", "0.5"), {"method": "ddim", "steps": 3, "eta": 0.5}),
        (
            ("--method", "dpmsolver++", "--steps", "4", "--no-clip"),
            {"method": "dpmsolver++", "steps": 4, "clip": False},
        ),
        (("--variance", "fixed_small", "--clip", "1.5"), {"variance": "fixed_small", "clip": 1.5}),
        (("--like", "diffusers"), {"like": "diffusers", "clip": None}),
        (("--dtype", "bfloat16"), {"dtype": torch.bfloat16}),
        (("--dtype", "bfloat16", "--no-fused"), {"dtype": torch.bfloat16, "fused": False, "net": network().bfloat16()}),
    ],
)
def test_the_reverse_process_is_the_one_asked_for(run, sample, tmp_path, options, chosen):
    code, _, errors = sample(run, tmp_path / "out", "-n", 3, "--deterministic", "--no-grid", "--float32", *options)
    assert (code, errors) == (0, "")
    net = chosen.pop("net", None)
    fused = chosen.pop("fused", True)
    sampler = Sampler(net or network(), SCHEDULE, deterministic=True, **{"clip": 1.0, "fused": fused, **chosen})
    wanted = sampler.sample(3, (1, 8, 8), seed=0, labels=[0, 1, 2], output="model")
    assert np.array_equal(np.load(tmp_path / "out" / "samples.npz")["arr_0"], wanted.numpy())


def test_averaged_weights_unless_told_otherwise(sample, tmp_path):
    run = saved(tmp_path / "run", network(), other=network(seed=1))
    for options, seed, said in (((), 0, "averaged weights"), (("--no-ema",), 1, "not averaged")):
        out = tmp_path / said
        code, text, _ = sample(run, out, "-n", 2, "--deterministic", "--no-grid", *options)
        assert code == 0
        assert said in text
        wanted = expected(2, net=network(seed=seed))
        assert np.array_equal(np.stack(list(pngs(out).values())), wanted[:, 0].numpy())


def test_latents_are_float32_without_pictures(sample, tmp_path):
    run = saved(tmp_path / "run", network(4, None), (4, 8, 8))
    code, _, errors = sample(run, tmp_path / "a", "-n", 5, "--deterministic", "--safetensors")
    assert (code, errors) == (0, "")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["parts", "sample.json", "samples.safetensors"]
    sampler = Sampler(network(4, None), SCHEDULE, fused=True, deterministic=True)
    wanted = sampler.sample(5, (4, 8, 8), seed=0)  # latents are not clipped
    assert torch.equal(load_file(tmp_path / "a" / "samples.safetensors")["samples"], wanted)
    for flag in ("--png", "--grid", "--gif"):
        code, _, errors = sample(run, tmp_path / "b", flag)
        assert code == 2
        assert f"{flag} is for images of 1 or 3 channels; these samples are 4x8x8" in errors
    assert not (tmp_path / "b").exists()


def test_a_diffusers_folder(sample, tmp_path):
    torch.manual_seed(0)
    net = DDPMUNet(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, sample_size=8,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    save_unet(net, tmp_path / "pipe")
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 10, "beta_schedule": "linear"}
    (tmp_path / "pipe" / "scheduler_config.json").write_text(json.dumps(scheduler))
    options = ("-n", 3, "--deterministic", "--method", "ddim", "--steps", 4)
    code, said, errors = sample(tmp_path / "pipe", tmp_path / "out", *options)
    assert (code, errors) == (0, "")
    assert "DDPMUNet of a diffusers pipeline" in said
    sampler = Sampler.from_pretrained(tmp_path / "pipe", deterministic=True, method="ddim", steps=4)
    wanted = sampler.sample(3, seed=0, output="uint8").permute(0, 2, 3, 1).numpy()
    assert np.array_equal(np.stack(list(pngs(tmp_path / "out").values())), wanted)
    code, _, errors = sample(tmp_path / "pipe", tmp_path / "out", *options, "--no-ema")
    assert code == 2
    assert "--no-ema is for checkpoints of ddpm_fast" in errors


# -- processes and restarts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pixels", "float32"])
@pytest.mark.parametrize("size", [2, 3])
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


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num", 0), "--num must be at least 1, got 0"),
        (("--batch-size", 0), "--batch-size must be at least 1, got 0"),
        (("--seed", -1), "--seed must lie in 0..2^64 - 1, got -1"),
        (("--first", -1), "--first must lie in 0..2^63 - 1 - N, got -1"),
        (("--steps", 0), "--steps must be at least 1, got 0"),
        (("--steps", T + 1), f"steps must be in 1..{T}"),
        (("--eta", 0.5), 'eta=0.5 belongs to method="ddim"'),
        (("--label", 10), "--label must lie in 0..9, got 10"),
        (("--labels", "1,x"), "--labels must be classes such as 0,1,2, got '1,x'"),
        (("--label", "1,2"), "--label takes one class, got '1,2'; --labels takes several"),
        (("--label", 1, "--labels", "2"), "--label and --labels exclude each other"),
        (("--png", "--float32"), "--png and --float32 exclude each other"),
        (("--guidance", "nan"), "guidance must be finite, got nan"),
        (("--device", "tpu"), "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (("--method", "euler"), "argument --method: invalid choice"),
    ],
)
def test_options_that_cannot_be_served(run, sample, tmp_path, options, message):
    code, said, errors = sample(run, tmp_path / "out", *options)
    assert (code, said) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_sources_and_networks_that_cannot_be_served(run, sample, tmp_path, monkeypatch):
    unconditional = saved(tmp_path / "plain", network(classes=None))
    certain = saved(tmp_path / "certain", network(), dropout=0.0)
    (tmp_path / "file").write_bytes(b"x")
    for source, options, message in (
        (tmp_path / "nothing", (), f"no {tmp_path / 'nothing'}"),
        (tmp_path / "file", (), str(tmp_path / "file")),
        (unconditional, ("--label", 1), "--label needs a class-conditional network; this one is unconditional"),
        (unconditional, ("--guidance", 2), "--guidance 2 needs a class-conditional network"),
        (certain, ("--guidance", 2), "trained with label_dropout 0"),
        (run, ("--device", "cuda:99"), "--device cuda:99"),
    ):
        code, _, errors = sample(source, tmp_path / "out", *options)
        assert code == 2
        assert message in errors
        assert errors.count("\n") == 1
    code, _, errors = sample(run, tmp_path / "out", place=(2, 2))
    assert code == 2
    assert "RANK must lie in 0..WORLD_SIZE-1, got RANK=2 and WORLD_SIZE=2" in errors
    assert not (tmp_path / "out").exists()
    code, _, errors = sample(run, tmp_path / "file" / "out")
    assert code == 2
    assert f"cannot write to {tmp_path / 'file' / 'out'}: Not a directory" in errors


def test_a_folder_of_other_samples(run, sample, tmp_path):
    out = tmp_path / "out"
    assert sample(run, out, "-n", 4, "--deterministic")[0] == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    code, _, errors = sample(run, out, "-n", 9, "--seed", 1, "--label", 3)
    assert code == 2
    assert "seed 0 there, 1 now; labels [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] there, [3] now; deterministic true" in errors
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before
    (out / "sample.json").write_text("[]")
    assert "is no manifest of samples" in sample(run, out, "-n", 4)[2]
    (out / "sample.json").unlink()
    assert f"{out / 'images'} holds files, but no {out / 'sample.json'}" in sample(run, out, "-n", 4)[2]


def test_a_picture_that_was_spoiled_is_named(run, sample, tmp_path):
    out = tmp_path / "out"
    assert sample(run, out, "-n", 4, "--deterministic")[0] == 0
    (out / "images" / "000000001.png").write_bytes(b"spoiled")
    code, _, errors = sample(run, out, "-n", 4, "--deterministic", "--npz")
    assert code == 2
    assert "000000001.png is broken" in errors
    assert not (out / "samples.npz").exists()


def test_weights_that_are_nan(sample, tmp_path):
    net = network()
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    code, _, errors = sample(saved(tmp_path / "run", net), tmp_path / "out", "-n", 2, "--no-fused")
    assert code == 1
    assert "a sample stopped being finite in row 0" in errors
    assert errors.count("\n") == 1


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
