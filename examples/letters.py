"""Sentences from noise: a VAE compresses letters, a DDPM of T = 50 learns its latents, by label, and writes a sentence.

    python examples/letters.py [--text "HELLO FROM NOISE"] [--counter] [--data EMNIST_FOLDER] [--out out/letters]

Letters are rendered from matplotlib's fonts, or EMNIST's where its IDX files are given. Writes letters.png (real ones,
decoded ones, drawn ones), sentence.png, sentence.gif (all letters denoised together) and report.json: how many of the
drawn letters a classifier trained on real ones reads as asked. Three minutes on 2 cores.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from string import ascii_uppercase as ALPHABET

import torch
from torch import Tensor, nn

import ddpm_fast
from ddpm_fast import metrics, viz

LATENTS, T, KL = 24, 50, 0.3  # KL: weight of the VAE's prior; less is sharper, more makes latents easier to learn
# Cosine: of x0 nothing is left at the last t. Linear betas 1e-4..0.02, made for T = 1000, would leave 78 % of it. The
# network gives v, for where nothing is left of x0 an error of eps is all there is: one step makes it 30 times as large.
SCHEDULE = ddpm_fast.Schedule.cosine(T)
TRAINING = {"prediction": "v", "label_dropout": 0.1, "lr": 1e-3, "lr_schedule": "cosine", "ema": 0.999}


class VAE(nn.Module):
    """Pictures (N, 1, 28, 28), uint8, to latents (N, LATENTS) of mean 0 and variance 1, and back."""

    def __init__(self) -> None:
        super().__init__()
        down = [nn.Flatten(), nn.Linear(784, 512), nn.SiLU(), nn.Linear(512, 256), nn.SiLU()]
        up = [nn.Linear(256, 512), nn.SiLU(), nn.Linear(512, 784), nn.Unflatten(1, (1, 28, 28))]
        self.encoder = nn.Sequential(*down, nn.Linear(256, 2 * LATENTS))  # mean and log variance
        self.decoder = nn.Sequential(nn.Linear(LATENTS, 256), nn.SiLU(), *up)
        self.mean, self.std = torch.zeros(LATENTS), torch.ones(LATENTS)

    def fit(self, images: Tensor, steps: int) -> None:
        """Minimises nats an image (Kingma & Welling 2014, equation 10), the prior's share of them times KL."""
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        for _ in range(steps):
            x = images[torch.randint(len(images), (128,))].float() / 255
            mean, logvar = self.encoder(x).chunk(2, dim=1)
            logits = self.decoder(mean + (logvar / 2).exp() * torch.randn_like(mean))
            pixels = nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="sum")
            optimizer.zero_grad()
            (pixels + KL / 2 * (mean**2 + logvar.exp() - 1 - logvar).sum()).div(len(x)).backward()
            optimizer.step()
        self.std, self.mean = torch.std_mean(self.encode(images), dim=0)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return (self.encoder(images.float() / 255)[:, :LATENTS] - self.mean) / self.std

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        return (255 * self.decoder(x * self.std + self.mean).sigmoid()).round().to(torch.uint8)


def run(args: argparse.Namespace) -> None:
    began, words = time.perf_counter(), args.text.upper().split()
    if not words or set("".join(words)) - set(ALPHABET):
        raise ValueError(f"--text must be words of the letters A to Z, got {args.text!r}")
    kind = "emnist-letters" if args.data else "letters"
    train, test = (ddpm_fast.training.open_data(kind, path=args.data, split=split) for split in ("train", "test"))
    images, real = (data.batch(torch.arange(len(data))) for data in (train, test))
    args.out.mkdir(parents=True, exist_ok=True)
    reader = metrics.trained_classifier(train, images=args.reader, seed=args.seed, cache=args.out, say=print)
    torch.manual_seed(args.seed)
    vae, net = VAE(), ddpm_fast.nn.MLP(LATENTS, num_timesteps=T, width=384, depth=5, num_classes=26, residual=True)
    vae.fit(images, args.vae)
    settings = {"images": 256 * args.ddpm, "batch_size": 256, "seed": args.seed, **TRAINING}
    trainer = ddpm_fast.Trainer(net, SCHEDULE, (vae.encode(images), train.labels), **settings)
    trainer.train()
    if trainer.stopped:
        raise SystemExit(f"letters.py: stopped by {trainer.stopped}")

    sampler, options = trainer.sampler(), {"guidance": args.guidance, "seed": args.seed}
    asked, decoded = torch.arange(26).repeat(40), vae.decode(vae.encode(real))
    drawn = vae.decode(sampler.sample(len(asked), labels=asked, **options))
    sets = {"real": (real, test.labels), "decoded": (decoded, test.labels), "drawn": (drawn, asked)}
    right = {name: (reader.predict(x) == labels).double().mean().item() for name, (x, labels) in sets.items()}
    some = [torch.stack([x[labels == letter][:3] for letter in range(26)], dim=1) for x, labels in sets.values()]
    rows, names = torch.cat(some).flatten(0, 1), [name for name in sets for _ in range(3)]
    viz.save_png(args.out / "letters.png", viz.grid(rows, 26, background=90, row_labels=names))

    labels = torch.tensor([ALPHABET.index(letter) for letter in "".join(words)])
    layout = {"columns": [len(word) for word in words], "scale": 3, "background": 0, "resample": "lanczos"}
    frames = [viz.grid(vae.decode(step.x), **layout) for step in sampler.stream(len(labels), labels=labels, **options)]
    viz.save_png(args.out / "sentence.png", frames[-1])
    if args.counter:
        frames = [viz.caption(frame, f"step {i} of {T}") for i, frame in enumerate(frames, 1)]
    viz.save_gif(args.out / "sentence.gif", frames, fps=12, hold=20 / 12, levels=16)  # the last one for 20
    report = {"read right": right, "drawn": len(asked), "seconds": time.perf_counter() - began, "settings": vars(args)}
    (args.out / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"{report['seconds']:.0f} s; letters read right: " + ", ".join(f"{k} {v:.1%}" for k, v in right.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default="HELLO FROM NOISE", help="a word a line")
    parser.add_argument("--counter", action="store_true", help="writes the number of steps done on the animation")
    parser.add_argument("--data", type=Path, help="folder of emnist-letters-train-images-idx3-ubyte.gz and so on")
    parser.add_argument("--out", type=Path, default=Path("out/letters"))
    for name, default in {"reader": 60_000, "vae": 2500, "ddpm": 4000, "guidance": 2.0, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    try:
        run(parser.parse_args(argv))
    except (ImportError, OSError, ValueError) as error:
        print(f"letters.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
