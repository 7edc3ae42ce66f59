"""The "DDPM from scratch" tutorial: its U-Net, T = 1000, betas 1e-4..0.02, the weights of the best epoch, its sampling.

    python examples/tutorial.py [--data cifar-10-batches-py] [--out out/tutorial] [--width 64 --depth 4] ...

Data: CIFAR-10 where its python batches are given, else Fashion-MNIST where Debian's package dataset-fashion-mnist is
installed, else scikit-learn's digits. Writes time_embedding.png, loss.png, samples.png, best.pt (the weights, under the
tutorial's names) and report.json. Some five minutes on 2 cores, with a network of 0.5 M weights; the tutorial's
own, 31.9 M, is --width 64 --depth 4. Needs `pip install 'ddpm_fast[train]'`, for the digits scikit-learn too.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import ddpm_fast
from ddpm_fast import metrics, viz
from ddpm_fast.demo import bf16_pays, compare_speed, speed_table
from ddpm_fast.nn import TimeEmbedding
from ddpm_fast.training import BestEpoch, Data, open_data

SCHEDULE = ddpm_fast.Schedule.linear(1000, 1e-4, 0.02)
TRAINING = {"batch_size": 32, "lr": 2e-3, "lr_schedule": "cosine", "ema": None}  # the tutorial keeps no average
SAMPLING = {"like": "tutorial", "fused": True}  # all 1000 steps, sigma = sqrt(beta), clamped at the end
HALF = {**SAMPLING, "dtype": torch.bfloat16}


def load(cifar: Path | None) -> Data:
    if cifar is not None:
        return open_data("cifar10", path=cifar)
    try:
        return open_data("fashion-mnist", image_size=32, fit="pad")
    except FileNotFoundError:
        print("no Fashion-MNIST here (apt install dataset-fashion-mnist), so scikit-learn's digits")
        return open_data("digits", image_size=16, fit="pad")


def draw_time_embedding(path: Path) -> None:
    """What the network is told of t, and how alike that is for two timesteps."""
    embedding = TimeEmbedding(256)(torch.arange(1000))
    figure, (left, right) = viz.figure(2, size=(8, 3.3))
    image = left.imshow(embedding.numpy(), cmap="BrBG", aspect="auto", interpolation="antialiased")
    left.set(title="time embedding [sin(t f), cos(t f)]", xlabel="dimension", ylabel="timestep t")
    figure.colorbar(image, ax=left)
    image = right.imshow((embedding @ embedding.T / 128).numpy(), origin="lower")  # |embedding|^2 = 128 for every t
    right.set(title="cosine similarity of two timesteps", xlabel="timestep t", ylabel="timestep t'")
    figure.colorbar(image, ax=right)
    figure.savefig(path)


def draw_results(out: Path, losses: list[float], best: int, pictures: dict[str, torch.Tensor]) -> None:
    figure, (axes,) = viz.figure(size=(8, 3))
    numbers = range(1, len(losses) + 1)
    axes.plot(numbers, losses, "o-", color="#0b6e4f")
    axes.plot(numbers[best], losses[best], "o", color="#bf812d", markersize=11)
    axes.set(title=f"best, kept: {losses[best]:.4f}", xlabel="epoch", ylabel="squared error of eps", xticks=numbers)
    figure.savefig(out / "loss.png")
    figure, panels = viz.figure(len(pictures), size=(8, 4.4))
    for axes, (title, images) in zip(panels, pictures.items(), strict=True):
        axes.imshow(viz.grid(images[:36], 6, scale=2), interpolation="nearest")
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(out / "samples.png")


def run(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    data = load(args.data)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_time_embedding(args.out / "time_embedding.png")
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(args.seed))
    real, train = order.tensor_split([min(1000, len(data) // 5)])
    real, train = data.batch(real), data.batch(train[: args.train])  # uint8 (N, C, H, W)
    floor = metrics.energy_ratio(train[: args.samples], real)
    torch.manual_seed(args.seed)
    net = ddpm_fast.UNet(data.shape[0], width=args.width, depth=args.depth)
    precision = "bf16" if bf16_pays(net.device) else None
    settings = {**TRAINING, "images": args.epochs * len(train), "precision": precision, "seed": args.seed}
    trainer = ddpm_fast.Trainer(net, SCHEDULE, train, **settings)
    epochs = BestEpoch(args.out / "best.pt", say=print)
    trainer.callbacks.append(epochs)
    trainer.train()
    if trainer.stopped:
        raise SystemExit(f"tutorial.py: stopped by {trainer.stopped}")
    net.eval().load_state_dict(torch.load(epochs.path, weights_only=True))

    samples = ddpm_fast.Sampler(net, SCHEDULE, **HALF).sample(args.samples, data.shape, seed=args.seed, output="uint8")
    draw_results(args.out, epochs.losses, epochs.best, {f"real: {data.name}": real, "drawn by the U-Net": samples})
    ways = {"Sampler, fused=True": SAMPLING, "Sampler, fused=True, bfloat16": HALF}
    speed = compare_speed(net, SCHEDULE, data.shape, n=args.compare, seed=args.seed + 1, pairs=1, ways=ways)
    print(speed_table(speed))

    ratio, seconds = metrics.energy_ratio(samples, real), time.perf_counter() - began
    report = {"energy_ratio": ratio, "energy_ratio_of_real": floor, "losses": epochs.losses, "seconds": seconds}
    report |= {"data": data.name, "training": settings, "network": net.config, "samples": args.samples, "speed": speed}
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{seconds:.0f} s in all; best epoch {epochs.best + 1}, loss {min(epochs.losses):.4f}; energy distance of")
    print(f"{args.samples} samples to held-out images {ratio:.2f} (1: as of real ones; of training images {floor:.2f})")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/tutorial"))
    parser.add_argument("--data", type=Path, help="CIFAR-10: its folder or .tar.gz")
    options = {"width": 16, "depth": 3, "train": 12_000, "epochs": 6, "samples": 128, "compare": 8, "seed": 0}
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    try:
        run(parser.parse_args(argv))
    except (ImportError, OSError, ValueError) as error:
        print(f"tutorial.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
