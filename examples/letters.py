"""A sentence that a latent diffusion model writes: a VAE, and a DDPM of 50 steps among its latents, told the letter.

    python examples/letters.py
    python examples/letters.py --sentence "HELLO WORLD" --no-counter --data FOLDER_OF_EMNIST

Writes sentence.gif (all letters denoise together), sentence.png, letters.png (real and generated) and report.json into
out/letters. About 3 minutes on 2 cores. The letters are rendered from matplotlib's fonts, or with --data EMNIST's.
"""

import argparse
import json
import re
import sys
import textwrap
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import viz
from ddpm_fast.metrics import trained_classifier
from ddpm_fast.nn import MLP
from ddpm_fast.training import open_data

T, LATENT, KL_WEIGHT = 50, 24, 0.5
COLUMNS, FPS, HELD, EACH = 12, 12, 20, 40  # HELD: frames that the end stays; EACH: how often a letter is tested


def train_vae(data: ddpm_fast.training.Data, images: int) -> tuple[nn.Module, nn.Module]:
    """Encoder: pixels in [0, 1] -> mean and log variance of the latent; decoder: back (Kingma and Welling 2014)."""
    into = (nn.Flatten(), nn.Linear(784, 512), nn.SiLU(), nn.Linear(512, 256), nn.SiLU(), nn.Linear(256, 2 * LATENT))
    back = (nn.Linear(LATENT, 256), nn.SiLU(), nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 784), nn.Sigmoid())
    encoder, decoder = nn.Sequential(*into), nn.Sequential(*back, nn.Unflatten(1, (1, 28, 28)))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()])
    for _ in range(0, images, 128):
        x = data.batch(torch.randint(len(data), (128,))) / 255
        mean, logvar = encoder(x).chunk(2, dim=1)
        decoded = decoder(mean + torch.randn_like(mean) * (logvar / 2).exp())
        kl = (mean**2 + logvar.exp() - 1 - logvar).sum() / 2
        optimizer.zero_grad()
        ((F.binary_cross_entropy(decoded, x, reduction="sum") + KL_WEIGHT * kl) / len(x)).backward()
        optimizer.step()
    return encoder.requires_grad_(False), decoder.requires_grad_(False)


def run(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    torch.manual_seed(args.seed)
    source = "letters" if args.data is None else "emnist-letters"
    real, test = (open_data(source, path=args.data, split=split) for split in ("train", "test"))
    args.out.mkdir(parents=True, exist_ok=True)

    encoder, decoder = train_vae(real, int(300_000 * args.effort))
    latents = encoder(real.images / 255)[:, :LATENT]
    mean, std = latents.mean(0), latents.std(0)
    # Betas up to 0.4: in 50 steps the usual 0.02 would keep 3/4 of x0 in x_T, where sampling begins with pure noise.
    schedule = ddpm_fast.Schedule.linear(T, scale_betas=True)
    model = MLP(LATENT, num_timesteps=T, width=512, depth=4, num_classes=26, residual=True)
    settings = {"images": int(1_500_000 * args.effort), "batch_size": 512, "lr": 1e-3, "seed": args.seed}
    trainer = ddpm_fast.Trainer(model, schedule, ((latents - mean) / std, real.labels), label_dropout=0.1, **settings)
    trainer.train()
    sampler = trainer.sampler()

    def decode(x: Tensor) -> Tensor:  # to model range [-1, 1]
        return decoder(x * std + mean) * 2 - 1

    # The sentence: lines of letters, a blank being a black picture.
    text = "".join(line.center(COLUMNS) for line in textwrap.wrap(args.sentence, COLUMNS))
    letters = [i for i, character in enumerate(text) if character != " "]
    labels, frames = [ord(text[i]) - ord("A") for i in letters], []
    for step in sampler.stream(len(labels), labels=labels, guidance=args.guidance, seed=args.seed):
        tiles = torch.full((len(text), 1, 28, 28), -1.0)
        tiles[letters] = decode(step.x)
        frame = viz.grid(tiles, COLUMNS, scale=2, padding=10, background=0, resample="lanczos")
        frames.append(viz.corner_text(frame, f"{step.row + 1}/{T}", size=12) if args.counter else frame)
    viz.save_gif(args.out / "sentence.gif", frames, fps=FPS, hold=HELD / FPS, levels=16)
    viz.save_png(args.out / "sentence.png", frame)

    asked = torch.arange(26).repeat(EACH)
    generated = decode(sampler.sample(len(asked), labels=asked, guidance=args.guidance, seed=args.seed + 1))
    some = torch.stack([test.images[test.labels == label][:4] / 127.5 - 1 for label in range(26)], dim=1)
    rows = torch.cat([some.flatten(0, 1), generated[: 8 * 26]])
    viz.save_png(args.out / "letters.png", viz.grid(rows, 26, row_labels=["real"] * 4 + ["generated"] * 8))

    # The judge never saw the VAE nor the diffusion model.
    reader = trained_classifier(real, images=int(60_000 * args.effort), seed=args.seed, cache=args.out)
    through_vae = decode((encoder(test.images / 255)[:, :LATENT] - mean) / std)
    pairs = {"real": (test.images, test.labels), "VAE": (through_vae, test.labels), "generated": (generated, asked)}
    read = {name: (reader.predict(x) == labels).double().mean().item() for name, (x, labels) in pairs.items()}
    report = {"read": read, "seconds": time.perf_counter() - began, "settings": vars(args)}
    (args.out / "report.json").write_text(json.dumps(report, indent=1, default=str))
    print("A classifier reads as asked " + ", ".join(f"{share:.1%} ({name})" for name, share in read.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentence", type=str.upper, default="NOISE TURNS INTO LETTERS", help="A to Z and blanks")
    parser.add_argument("--counter", action=argparse.BooleanOptionalAction, default=True, help="step in the corner")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--data", type=Path, help="folder of EMNIST's letters; without it they are rendered")
    parser.add_argument("--out", type=Path, default=Path("out/letters"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effort", type=float, default=1.0, help="share of the training to do")
    args = parser.parse_args(argv)
    try:
        if not re.fullmatch(rf" *([A-Z]{{1,{COLUMNS}}}( +|$))+", args.sentence):
            raise ValueError(f"--sentence must be words of 1 to {COLUMNS} letters A to Z, got {args.sentence!r}")
        run(args)
    except (ImportError, OSError, ValueError) as error:
        print(f"letters.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
