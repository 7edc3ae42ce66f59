"""Sentences of letters that a latent diffusion model draws: a VAE, a DDPM of T = 50 steps in its latent space, guidance.

    python examples/letters.py
    python examples/letters.py --sentence "HELLO WORLD" --no-counter --data FOLDER_OF_EMNIST

Writes into out/letters: sentence.gif (all letters denoise together), sentence.png, letters.png (generated beside real),
report.json. About 3 minutes on 2 cores. The letters are rendered from matplotlib's fonts, or with --data EMNIST's.
"""

import argparse
import json
import re
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import viz
from ddpm_fast.metrics import trained_classifier
from ddpm_fast.nn import MLP
from ddpm_fast.training import open_data

T, LATENT, FPS, HELD = 50, 24, 12, 20  # HELD: frames for which the finished sentence stays


class VAE(nn.Module):
    """28 x 28 pixels <-> 24 numbers that are roughly N(0, 1) (Kingma and Welling 2014)."""

    def __init__(self) -> None:
        super().__init__()
        narrow = (nn.Flatten(), nn.Linear(784, 512), nn.SiLU(), nn.Linear(512, 256), nn.SiLU())
        self.encoder = nn.Sequential(*narrow, nn.Linear(256, 2 * LATENT))  # mean and log variance
        widen = (nn.Linear(LATENT, 256), nn.SiLU(), nn.Linear(256, 512), nn.SiLU())
        self.decoder = nn.Sequential(*widen, nn.Linear(512, 784), nn.Unflatten(1, (1, 28, 28)))

    def loss(self, pixels: Tensor, kl_weight: float = 0.5) -> Tensor:
        """Of pixels in [0, 1]: cross entropy of the reconstruction + kl_weight * KL(q(z | x) || N(0, I))."""
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        decoded = self.decoder(mean + torch.randn_like(mean) * (logvar / 2).exp())
        kl = (mean**2 + logvar.exp() - 1 - logvar).sum() / 2
        return (F.binary_cross_entropy_with_logits(decoded, pixels, reduction="sum") + kl_weight * kl) / len(pixels)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.encoder(part)[:, :LATENT] for part in pixels.split(1000)])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images in model range [-1, 1]."""
        return self.decoder(latents).sigmoid() * 2 - 1


def train_vae(data: ddpm_fast.training.Data, images: int, batch_size: int = 128) -> VAE:
    vae = VAE()
    steps = max(1, images // batch_size)
    optimizer = torch.optim.Adam(vae.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        vae.loss(data.batch(torch.randint(len(data), (batch_size,))) / 255).backward()
        optimizer.step()
        rate.step()
    return vae


def draw_sentence(args: argparse.Namespace, sampler: ddpm_fast.Sampler, decode: Callable[[Tensor], Tensor]) -> None:
    """sentence.gif and sentence.png: lines of letters, a blank being a black picture."""
    lines = textwrap.wrap(args.sentence, args.columns)
    text = "".join(line.center(args.columns) for line in lines)
    letters = [i for i, character in enumerate(text) if character != " "]
    labels = [ord(text[i]) - ord("A") for i in letters]
    frames = []
    for step in sampler.stream(len(labels), labels=labels, guidance=args.guidance, seed=args.seed):
        tiles = torch.full((len(text), 1, 28, 28), -1.0)
        tiles[letters] = decode(step.x)
        frame = viz.grid(tiles, args.columns, scale=2, padding=4, background=0, resample="lanczos")
        frames.append(viz.corner_text(frame, f"{step.row + 1}/{T}") if args.counter else frame)
    viz.save_gif(args.out / "sentence.gif", frames, fps=FPS, hold=HELD / FPS, levels=16)
    viz.save_png(args.out / "sentence.png", frame)


def run(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    source = "letters" if args.data is None else "emnist-letters"
    real, test = (open_data(source, path=args.data, split=split) for split in ("train", "test"))
    args.out.mkdir(parents=True, exist_ok=True)

    vae = train_vae(real, int(300_000 * args.effort))
    latents = vae.encode(real.images / 255)
    mean, std = latents.mean(0), latents.std(0)
    # Betas up to 0.4: in 50 steps the usual 0.02 would keep 3/4 of x0 in x_T, where sampling begins with pure noise.
    schedule = ddpm_fast.Schedule.linear(T, scale_betas=True)
    model = MLP(LATENT, num_timesteps=T, width=512, depth=4, num_classes=26, residual=True)
    settings = {"images": int(1_500_000 * args.effort), "batch_size": 512, "lr": 1e-3, "lr_schedule": "cosine"}
    data = ((latents - mean) / std, real.labels)
    trainer = ddpm_fast.Trainer(model, schedule, data, label_dropout=0.1, seed=args.seed, **settings)
    trainer.train()

    def decode(x: Tensor) -> Tensor:
        return vae.decode(x * std + mean)

    sampler = trainer.sampler()
    draw_sentence(args, sampler, decode)
    labels = torch.arange(26).repeat(40)
    generated = decode(sampler.sample(len(labels), labels=labels, guidance=args.guidance, seed=args.seed + 1))
    beside = torch.stack([test.images[test.labels == label][:4] / 127.5 - 1 for label in range(26)], dim=1)
    rows = torch.cat([beside.flatten(0, 1), generated[: 8 * 26]])
    viz.save_png(args.out / "letters.png", viz.grid(rows, 26, row_labels=["real"] * 4 + ["generated"] * 8))

    reader = trained_classifier(real, images=int(60_000 * args.effort), seed=args.seed, cache=args.out)
    reconstructed = vae.decode(vae.encode(test.images / 255))
    shares = {
        "real letters it never saw": (reader.predict(test.images), test.labels),
        "the same through the VAE": (reader.predict(reconstructed), test.labels),
        "generated letters": (reader.predict(generated), labels),
    }
    report = {name: round((read == asked).double().mean().item(), 4) for name, (read, asked) in shares.items()}
    for name, share in report.items():
        print(f"a classifier reads {100 * share:5.1f} % of {name} as {'asked' if 'gen' in name else 'labelled'}")
    chosen = {name: str(value) for name, value in vars(args).items()}
    seconds = round(time.perf_counter() - began, 1)
    (args.out / "report.json").write_text(
        json.dumps({"read": report, "seconds": seconds, "settings": chosen}, indent=1)
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentence", type=str.upper, default="noise turns into letters", help="A to Z and blanks")
    parser.add_argument("--columns", type=int, default=12, help="letters a line")
    parser.add_argument("--counter", action=argparse.BooleanOptionalAction, default=True, help="step in the corner")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--data", type=Path, help="folder of EMNIST's letters; without it they are rendered")
    parser.add_argument("--out", type=Path, default=Path("out/letters"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effort", type=float, default=1.0, help="share of the training to do")
    args = parser.parse_args(argv)
    try:
        words = args.sentence.split()
        if not words or not re.fullmatch("[A-Z ]+", args.sentence) or max(map(len, words)) > args.columns:
            raise ValueError(f"--sentence must be words of A to Z, {args.columns} at most, got {args.sentence!r}")
        run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"letters.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
