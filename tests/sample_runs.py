"""Runs to sample from, the command line that does, and what the Sampler itself draws."""

import numpy as np
import torch
from PIL import Image

from ddpm_fast import Sampler, Schedule, cli
from ddpm_fast.nn import UNet
from ddpm_fast.training import checkpoints

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


def command(monkeypatch, capsys):
    """(source, out, *options, place=(rank, size)) -> (exit code, stdout, stderr) of the command line."""

    def call(source, out, *options, place=None):
        named = ONE_PROCESS if place is None else {"RANK": str(place[0]), "WORLD_SIZE": str(place[1])}
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
