"""`ddpm-fast sample`: what it writes, and what it refuses."""

import json

import pytest

pytest.importorskip("safetensors", reason="pip install safetensors")
pytest.importorskip("PIL", reason="pip install 'ddpm_fast[images]'")

import numpy as np
import torch
from PIL import Image, ImageSequence
from safetensors.torch import load_file
from sample_runs import SCHEDULE, T, command, expected, network, pngs, saved

from ddpm_fast import Sampler
from ddpm_fast.interop._unets import save_unet
from ddpm_fast.nn import DDPMUNet

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
