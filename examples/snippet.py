"""The article's starter code for denoising_diffusion_pytorch, with `ddpm_fast.interop.lucidrains` imported instead.

    python examples/snippet.py                   # renders coloured shapes and trains a small network on them
    python examples/snippet.py FOLDER --small    # the same small network on pictures of your own
    python examples/snippet.py FOLDER            # the article's sizes: for a GPU, and hours

Writes the Trainer's results/, samples.png, loss.png and report.json to out/snippet (--out). Measured is the energy
distance of samples to real images, in units of that of as many real ones. Small, it takes five minutes on 2 cores.
"""

import argparse
import colorsys
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

from ddpm_fast import viz
from ddpm_fast.interop.lucidrains import GaussianDiffusion, Trainer, Unet
from ddpm_fast.metrics import energy_ratio

ARTICLE = {"dim": 64, "dim_mults": (1, 2, 4, 8), "image_size": 128, "sampling_timesteps": 250}
ARTICLE |= {"train_lr": 8e-5, "train_num_steps": 10_000, "ema_update_every": 10}
SMALL = {"dim": 24, "dim_mults": (1, 2, 4), "image_size": 16, "sampling_timesteps": 50}
SMALL |= {"train_lr": 1e-3, "train_num_steps": 1500, "ema_update_every": 1}
RENDERED, SAMPLES = 2000, 256  # images, where no folder is given; samples that are measured


def render(folder: Path, size: int, seed: int) -> None:
    """Writes discs, squares and triangles of random colour, place and size on a light ground."""
    from PIL import Image, ImageDraw

    rng, big = np.random.default_rng(seed), 4 * size  # drawn larger and averaged down, for smooth edges
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(RENDERED):
        image = Image.new("RGB", (big, big), "#f2efe6")
        radius = rng.uniform(0.28, 0.4) * big
        x, y = rng.uniform(radius, big - radius, 2)
        ink = tuple(round(255 * part) for part in colorsys.hsv_to_rgb(rng.random(), 0.8, 0.75))
        if i % 3 == 0:
            ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), ink)
        else:
            ImageDraw.Draw(image).regular_polygon((x, y, radius), 4 if i % 3 == 1 else 3, fill=ink)
        image.resize((size, size), Image.Resampling.BOX).save(folder / f"{i:04}.png")


def article(folder: Path, results: Path, size: argparse.Namespace) -> Trainer:
    """The article's lines, all but the last: trainer.train()."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Unet(dim=size.dim, dim_mults=size.dim_mults).to(device)
    diffusion = GaussianDiffusion(
        model, image_size=size.image_size, timesteps=1000, sampling_timesteps=size.sampling_timesteps, loss_type="l1"
    ).to(device)
    return Trainer(
        diffusion,
        folder,
        train_batch_size=8,
        train_lr=size.train_lr,
        train_num_steps=size.train_num_steps,
        gradient_accumulate_every=2,
        ema_decay=0.995,
        ema_update_every=size.ema_update_every,
        amp=False,
        results_folder=results,
    )


def run(args: argparse.Namespace) -> None:
    folder = args.folder or args.out / "images"
    if args.folder is None:
        print(f"no folder given: {RENDERED} rendered shapes in {folder}, and the small setting")
        render(folder, args.image_size, args.seed)
    torch.manual_seed(args.seed)
    trainer, began = article(folder, args.out / "results", args), time.perf_counter()
    trainer.train()
    real = torch.stack([trainer.ds[i] for i in range(min(len(trainer.ds), 4 * SAMPLES))]).mul(255).round().byte()
    sampler = trainer.ema.ema_model.sampler(deterministic=True)  # the fused plan, by DDIM
    samples = sampler.sample(min(SAMPLES, len(real) // 2), seed=args.seed, output="uint8").cpu()

    figure, panels = viz.figure(2, size=(8, 4.4))
    for axes, title, images in zip(panels, ("real images", "samples"), (real, samples), strict=True):
        axes.imshow(viz.grid(images[:64], 8, scale=max(1, 48 // args.image_size)))
        axes.set(title=title, xticks=[], yticks=[])
    figure.savefig(args.out / "samples.png")
    figure, (axes,) = viz.figure(size=(8, 3.2))
    window = max(1, len(trainer.losses) // 40)
    axes.plot(np.convolve(trainer.losses, np.full(window, 1 / window), mode="valid"), color="#0b6e4f")
    axes.set(xlabel="training step", ylabel=f"l1 loss of v, mean of {window} steps", yscale="log")
    figure.savefig(args.out / "loss.png")
    report = {"energy_ratio": energy_ratio(samples, real), "samples": len(samples), "real_images": len(real)}
    report |= {"last_loss": float(np.mean(trainer.losses[-100:])), "seconds": time.perf_counter() - began}
    (args.out / "report.json").write_text(json.dumps({**report, "settings": vars(args)}, indent=2, default=str) + "\n")
    print(f"{report['seconds']:.0f} s; energy distance {report['energy_ratio']:.2f} times that of as many real images")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/snippet"))
    parser.add_argument("--seed", type=int, default=0)
    for name in ARTICLE.keys() - {"dim_mults"}:  # each size is an option, too
        parser.add_argument("--" + name.replace("_", "-"), type=type(ARTICLE[name]), default=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    try:
        run(argparse.Namespace(**{**(SMALL if given.small or given.folder is None else ARTICLE), **vars(given)}))
    except (ImportError, OSError, ValueError) as error:
        advice = "any folder of pictures will do; without one, shapes are rendered"
        advice = "pip install ddpm_fast[train]" if isinstance(error, ImportError) else advice
        print(f"snippet.py: {error}; {advice}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
