"""Training end to end on Fashion-MNIST: `ddpm-fast train`, killed and resumed, against a plain loop of as many images.

    python benchmarks/fashion_mnist.py --out OUT [--images N] [--kills 2] [--samples 5000] [--seeds 3]

1. `ddpm-fast train` for N images; SIGKILL at moments spread over it; the same command again until it has ended.
2. The same network by a plain eager loop (benchmarks/plain_training.py), the same hyperparameters, as many images.
3. Samples of both: ours by `ddpm-fast sample` in two processes without communication, the plain network's by one.
4. Frechet distance, KID, precision and recall of both to the test images, by the features of one small classifier, and
   of real training images to the test images as a floor.
5. The distance moves with the seed of a training run. So both are trained with further seeds (in one piece, one thread
   each, two runs at a time; samples by the bfloat16 plan), and the report has every one of them and the means.

Everything lies below OUT and is not done again when it is there; results/<machine>-fashion-mnist.json is the summary.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from plain_training import train_plainly
from torch import Tensor

from ddpm_fast import Sampler, Schedule, UNet, metrics
from ddpm_fast.metrics.features import classifier
from ddpm_fast.training.checkpoints import load_network
from ddpm_fast.training.data import open_data

ROOT = Path(__file__).resolve().parent.parent
WIDTH, DEPTH, TIME_DIM, TIMESTEPS, CLASSES = 32, 2, 128, 1000, 10
BATCH, LR, WARMUP, LABEL_DROPOUT, EMA = 64, 2e-3, 3200, 0.1, 0.999
SAMPLING = {"method": "ddim", "steps": 50, "clip": 1.0, "spacing": "trailing"}
NEIGHBOURS = 5000  # images that precision and recall are of
SMOOTHED = 2000  # images over which the losses of the plot are averaged


def command(*arguments: str, processes: int = 1) -> list[str]:
    """A line of ddpm-fast, by torchrun where there are several processes."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}"] if processes > 1 else []
    return [sys.executable, *launcher, "-m", "ddpm_fast.cli", *arguments]


def train_ours(run: Path, images: int, kills: int, seed: int = 0) -> dict[str, Any]:
    """Trains, killing the process at `kills` moments; seconds are those of the processes' whole lives."""
    first = command(
        *("train", "--data", "fashion-mnist", "--out", str(run), "--images", str(images), "--seed", str(seed)),
        *("--model", "unet", "--model-options", f"width={WIDTH}", f"depth={DEPTH}", f"time_dim={TIME_DIM}"),
        *("--batch-size", str(BATCH), "--lr", str(LR), "--warmup", str(WARMUP), "--lr-schedule", "cosine"),
        *("--label-dropout", str(LABEL_DROPOUT), "--ema", str(EMA), "--precision", "bf16"),
        *("--save-every", str(images // 12 // BATCH * BATCH), "--sample-every", str(images // 5 // BATCH * BATCH)),
    )
    again = command("train", "--out", str(run))
    moments = random.Random(0)
    lives: list[dict[str, Any]] = []
    for life in range(kills + 1):
        before = newest(run)
        began = time.perf_counter()
        process = subprocess.Popen(again if life else first, cwd=ROOT)
        if life < kills:
            # Somewhere in the middle of this life's share of the images: half-way between two saves or during one.
            goal = images * (life + 1) / (kills + 1) * moments.uniform(0.85, 1.0)
            while process.poll() is None and newest(run) < goal:
                time.sleep(0.2)
            time.sleep(moments.uniform(0.0, 10.0))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        code = process.wait()
        seconds = time.perf_counter() - began
        lives.append({"from": before, "saved": newest(run), "seconds": seconds, "exit": code})
        print(f"life {life + 1}: from {before:,} to at least {newest(run):,} images in {seconds:.0f} s, exit {code}")
    if lives[-1]["exit"] != 0 or newest(run) < images:
        raise SystemExit(f"training did not end well: {lives[-1]}")
    return {"lives": lives, "seconds": sum(life["seconds"] for life in lives), "images": newest(run)}


def train_theirs(data: Any, images: int, seed: int = 0) -> dict[str, Any]:
    """The plain loop on as many images; the network begins as one of ours would, from a seed of its own."""
    torch.manual_seed(seed)
    return train_plainly(
        UNet(1, TIME_DIM, width=WIDTH, depth=DEPTH, num_classes=CLASSES),
        Schedule.linear(TIMESTEPS),
        data.batch(torch.arange(len(data))),
        data.labels,
        images=images,
        batch=BATCH,
        lr=LR,
        warmup=WARMUP,
        label_dropout=LABEL_DROPOUT,
        ema=EMA,
        seed=seed,
        precision=torch.bfloat16,
    )


def newest(run: Path) -> int:
    """Images seen by the newest whole checkpoint, 0 without one; by name, which a look every 0.2 s can afford."""
    names = (re.fullmatch(r"checkpoint-(\d+)\.safetensors", path.name) for path in run.glob("checkpoints/*"))
    return max((int(name[1]) for name in names if name), default=0)


def draw_ours(run: Path, out: Path, count: int) -> float:
    """Seconds that two processes take for the samples, each on its share, without a word between them."""
    options = [f"--{name}={value}" for name, value in SAMPLING.items()]
    line = command("sample", str(run), "-n", str(count), "--out", str(out), "--npz", "--gif", *options, processes=2)
    began = time.perf_counter()
    subprocess.run(line, cwd=ROOT, check=True)
    return time.perf_counter() - began


def draw_from(net: UNet, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 (count, 1, 28, 28) of a network in memory, by the sampler, noise and labels of the command."""
    schedule = Schedule.linear(TIMESTEPS)
    sampler = Sampler(net.eval(), schedule, fused=True, chunk=64, dtype=dtype, **SAMPLING)  # type: ignore[arg-type]
    labels = torch.arange(count) % CLASSES
    images: Tensor = sampler.sample(count, (1, 28, 28), seed=0, labels=labels, output="uint8", progress=False)
    return images


def another_seed(who: str, seed: int, out: Path, images: int, count: int) -> Tensor:
    """Samples of a network trained with `seed` on one thread; run in a process of its own, beside another."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes started from here
    torch.set_num_threads(1)

    def trained() -> UNet:
        if who == "plain eager loop":
            data = open_data("fashion-mnist")
            average: UNet = cached(out / f"plain{seed}.pt", lambda: train_theirs(data, images, seed))["average"]
            return average
        run = out / f"run{seed}"
        if newest(run) < images:
            train_ours(run, images, 0, seed)
        return load_network(run).network  # type: ignore[return-value]

    file = out / f"{who.split()[0]}-samples{seed}.pt"
    samples: Tensor = cached(file, lambda: draw_from(trained(), count, torch.bfloat16))
    return samples


def other_seeds(seeds: range, out: Path, images: int, count: int) -> dict[str, Tensor]:
    """By "who, seed N", the samples of both loops' networks for further seeds, two processes at a time."""
    pairs = [(who, seed) for seed in seeds for who in ("ddpm-fast train", "plain eager loop")]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = {f"{who}, seed {seed}": pool.submit(another_seed, who, seed, out, images, count) for who, seed in pairs}
        return {name: job.result() for name, job in jobs.items()}


def means(table: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Mean and values of the Frechet distance over the seeds, of both loops, and the ratio of the means."""
    of = {
        who: [row["frechet"] for name, row in table.items() if name.startswith(who)]
        for who in ("ddpm-fast train", "plain eager loop")
    }
    mean = {who: float(np.mean(values)) for who, values in of.items()}
    ratio = mean["ddpm-fast train"] / mean["plain eager loop"]
    return {"frechet by seed": of, "mean": mean, "ratio of the means": ratio}


def quality(sets: dict[str, Tensor], real: Tensor, features: Callable[[Tensor], Tensor]) -> dict[str, dict[str, float]]:
    """By name, the distances of uint8 images to `real`, all by one set of features."""

    def of(images: Tensor) -> Tensor:
        return torch.cat([features(part) for part in images.split(256)])

    there = of(real)
    truth = metrics.FeatureStatistics()
    truth.update(there)
    table = {}
    for name, images in sets.items():
        here, statistics = of(images), metrics.FeatureStatistics()
        statistics.update(here)
        some = metrics.precision_recall(here[:NEIGHBOURS], there[:NEIGHBOURS])
        table[name] = {
            "images": len(images),
            "frechet": metrics.frechet_distance(
                statistics.mean, statistics.covariance, truth.mean, truth.covariance
            ),
            "kernel_distance": metrics.kernel_distance(here, there),
            "precision": some.precision,
            "recall": some.recall,
        }  # fmt: skip
        print(name, table[name])
    return table


def curve(run: Path, plain: dict[str, Any], ours: dict[str, Any], file: Path) -> None:
    """Both losses against the images seen, and where the process was killed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    with open(run / "log.csv", encoding="utf-8", newline="") as lines:
        rows = [(int(row["images_seen"]), float(row["loss"])) for row in csv.DictReader(lines)]
    for (seen, losses), name, colour in (
        (tuple(zip(*rows, strict=True)), "ddpm-fast train", "#0b6e4f"),
        ((range(BATCH, plain["images"] + 1, BATCH), plain["losses"]), "plain eager loop", "#bf812d"),
    ):
        width = max(1, round(SMOOTHED / (seen[1] - seen[0])))
        mean = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(np.array(seen[width - 1 :]) / 1000, mean, color=colour, label=name, linewidth=1.4)
    for i, life in enumerate(ours["lives"][1:]):
        label = "killed, and gone on from here" if i == 0 else None
        axes.axvline(life["from"] / 1000, color="#636363", linestyle=":", linewidth=1.2, label=label)
    axes.set(xlabel="thousand images seen", ylabel=f"loss, mean over {SMOOTHED:,} images", yscale="log")
    axes.set_title("Fashion-MNIST, the same network and hyperparameters")
    axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def cached(file: Path, work: Callable[[], Any]) -> Any:
    """What `work` gives, kept in a file of torch's."""
    if not file.exists():
        torch.save(work(), file)
    return torch.load(file, weights_only=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="everything is kept here")
    parser.add_argument("--images", type=int, default=220_000, help="to train on; default: 220000")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--samples", type=int, default=5000, help="of each network; default: 5000")
    parser.add_argument("--seeds", type=int, default=1, help="of both loops, 0, 1, ...; default: 1")
    asked = parser.parse_args()
    out: Path = asked.out
    out.mkdir(parents=True, exist_ok=True)
    run, samples = out / "run", out / "samples"
    images = -(-asked.images // BATCH) * BATCH
    data, test = open_data("fashion-mnist"), open_data("fashion-mnist", split="test")
    assert data.labels is not None

    ours = cached(out / "ours.pt", lambda: train_ours(run, images, asked.kills))
    plain = cached(out / "plain.pt", lambda: train_theirs(data, images))
    seconds = cached(out / "drawn.pt", lambda: draw_ours(run, samples, asked.samples))
    theirs = cached(out / "plain_samples.pt", lambda: draw_from(plain["average"], asked.samples))

    drawn = torch.from_numpy(np.load(samples / "samples.npz")["arr_0"]).permute(0, 3, 1, 2).contiguous()
    sets = {
        "ddpm-fast train": drawn,
        "plain eager loop": theirs,
        "real training images": data.batch(torch.arange(asked.samples)),
        **other_seeds(range(1, asked.seeds), out, images, asked.samples),
    }
    table = quality(sets, test.batch(torch.arange(len(test))), classifier(data, cache=out))
    report = {
        "machine": machine.facts(torch.device("cpu")),
        "network": plain["average"].config,
        "parameters": sum(p.numel() for p in plain["average"].parameters()),
        "images": images,
        "training": {
            "ours": ours,
            "plain loop's loss over the last 10000 images": float(np.mean(plain["losses"][-10000 // BATCH :])),
        },
        "sampling": {
            "images": asked.samples,
            "seconds of 2 processes": seconds,
            **SAMPLING,
        },
        "quality": table,
        "seeds": means(table),
        "features": "of a small classifier trained on the same data: not comparable with published FID",
    }
    results = ROOT / "benchmarks" / "results"
    name = f"{machine.slug(report['machine'])}-fashion-mnist"
    (results / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    curve(run, plain, ours, results / f"{name}-loss.png")
    print(json.dumps({"quality": table, "seeds": report["seeds"]}, indent=1))


if __name__ == "__main__":
    main()
