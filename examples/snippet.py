"""The article's starter code for denoising_diffusion_pytorch, with `ddpm_fast.interop.lucidrains` imported instead.

    python examples/snippet.py                   # renders coloured shapes and trains a small network on them
    python examples/snippet.py FOLDER --small    # the same small network on pictures of your own
    python examples/snippet.py FOLDER            # the article's sizes: for a GPU, and hours

Writes to out/snippet (--out): the Trainer's results/, samples.png (samples beside real images), loss.png, and
report.json. What is measured is the energy distance from samples to the folder's images, in units of that of as many
real ones (1: as close as real images are). The small setting takes about four minutes on two cores.
Needs Pillow and matplotlib: pip install ddpm_fast[train]
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

try:
    from matplotlib.figure import Figure
    from PIL import Image, ImageDraw
except ImportError as error:
    print(f"snippet.py needs Pillow and matplotlib ({error}): pip install ddpm_fast[train]", file=sys.stderr)
    raise SystemExit(2) from None

ARTICLE = {
    "dim": 64, "dim_mults": (1, 2, 4, 8), "image_size": 128, "sampling_timesteps": 250,
    "train_lr": 8e-5, "train_num_steps": 10000, "ema_update_every": 10,
}  # fmt: skip
SMALL = {
    "dim": 16, "dim_mults": (1, 2, 4), "image_size": 16, "sampling_timesteps": 50,
    "train_lr": 1e-3, "train_num_steps": 1500, "ema_update_every": 1,
}  # fmt: skip
RENDERED = 2000  # images, where no folder is given
SAMPLES = 256  # that are measured
OURS = "#0b6e4f"


def render(folder, size, seed):
    """Writes discs, squares and triangles of random colour, place and size, on grounds that fade into another colour."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    big = 4 * size  # drawn larger and averaged down, for smooth edges
    for i in range(RENDERED):
        top, bottom, ink = (
            255 * np.array(colorsys.hsv_to_rgb(rng.random(), *saturation_and_value))
            for saturation_and_value in ((0.25, 0.95), (0.25, 0.75), (0.9, rng.uniform(0.3, 0.9)))
        )
        fade = np.linspace(0, 1, big)[:, None, None]
        ground = np.broadcast_to((1 - fade) * top + fade * bottom, (big, big, 3))
        image = Image.fromarray(ground.astype(np.uint8))
        radius = rng.uniform(0.22, 0.34) * big
        x, y = rng.uniform(radius, big - radius, 2)
        draw, fill = ImageDraw.Draw(image), tuple(ink.astype(int))
        if i % 3 == 0:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
        else:
            draw.regular_polygon((x, y, radius), 4 if i % 3 == 1 else 3, fill=fill)
        image.resize((size, size), Image.Resampling.BOX).save(folder / f"{i:04}.png")


def article(folder, out, size):
    """The article's lines, all but the last: trainer.train()."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    model = Unet(
        dim=size.dim,
        dim_mults=size.dim_mults,
    ).to(device)

    diffusion = GaussianDiffusion(
        model,
        image_size=size.image_size,
        timesteps=1000,
        sampling_timesteps=size.sampling_timesteps,
        loss_type="l1",
    ).to(device)

    return Trainer(
        diffusion,
        folder,
        train_batch_size=8,
        train_lr=size.train_lr,
        train_num_steps=size.train_num_steps,  # total training steps
        gradient_accumulate_every=2,
        ema_decay=0.995,
        ema_update_every=size.ema_update_every,
        amp=False,  # turn on for mixed precision, I've found it better to keep it off
        results_folder=out / "results",
    )


def draw_pictures(out, real, samples, losses):
    """real, samples: uint8 (N, 3, H, W)."""
    scale = max(1, 48 // real.shape[-1])
    figure = Figure(figsize=(8, 4.2), dpi=120, layout="constrained")
    for axes, images, title in zip(figure.subplots(1, 2), (real, samples), ("real images", "samples"), strict=True):
        axes.imshow(viz.grid(images[:64], 8, scale=scale))
        axes.set_title(title)
        axes.axis("off")
    figure.savefig(out / "samples.png")

    window = max(1, len(losses) // 40)
    average = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    figure = Figure(figsize=(8, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(np.arange(1, len(losses) + 1), losses, color=OURS, alpha=0.25, linewidth=0.8, label="each step")
    axes.plot(np.arange(window, len(losses) + 1), average, color=OURS, label=f"mean of {window} steps")
    axes.set(xlabel="training step", ylabel="l1 loss of v", yscale="log")
    axes.legend()
    figure.savefig(out / "loss.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("out/snippet"))
    parser.add_argument("--seed", type=int, default=0)
    for name, value in ARTICLE.items():  # each size is an option, too
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    small = given.small or given.folder is None
    args = argparse.Namespace(**{**(SMALL if small else ARTICLE), **vars(given)})

    folder = args.folder
    if folder is None:
        folder = args.out / "images"
        print(f"no folder given: {RENDERED} rendered shapes in {folder}, and the small setting")
        render(folder, args.image_size, args.seed)
    torch.manual_seed(args.seed)
    try:
        trainer = article(folder, args.out, args)
    except (FileNotFoundError, ValueError) as wrong:
        print(f"snippet.py: {wrong}. Any folder of pictures will do; without one, shapes are rendered", file=sys.stderr)
        return 2
    began = time.perf_counter()
    trainer.train()
    trained = time.perf_counter()

    real = torch.stack([trainer.ds[i] for i in range(min(len(trainer.ds), 4 * SAMPLES))])
    count = min(SAMPLES, len(real) // 2)
    sampler = trainer.ema.ema_model.sampler(deterministic=True)  # the fused plan, by DDIM
    samples = sampler.sample(count, seed=args.seed, output="uint8").cpu()
    drawn = time.perf_counter()

    real = (real * 255).round().to(torch.uint8)
    ratio = energy_ratio(samples, real)
    draw_pictures(args.out, real, samples, trainer.losses)
    report = {
        "energy_ratio": ratio,
        "samples": count,
        "real_images": len(real),
        "last_loss": float(np.mean(trainer.losses[-100:])),
        "seconds": {"training": trained - began, "sampling": drawn - trained},
        "settings": vars(args),
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"{trainer.step} steps in {trained - began:.0f} s, {count} samples in {drawn - trained:.0f} s")
    print(f"energy distance of {count} samples to {len(real)} real images: {ratio:.2f} times that of as many real ones")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
