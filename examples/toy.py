"""Diffusion in one and two dimensions: a Gaussian mixture, a ramp and a spiral, each learnt by a small MLP.

    python examples/toy.py [--out out/toy] [--seed 0] [--steps 8000] [--samples 10000]

T = 200 with betas 1e-4..0.2, and T = 1000 for the spiral; a short and a long training of it. Writes forward.png (data
becoming noise), lines.png (mixture and ramp), spiral.png and report.json. What is measured is the energy distance to
held-out real samples: of generated ones, of other real ones, of a kernel density estimate's. Three minutes on one core.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

import ddpm_fast
from ddpm_fast.metrics import energy_distance
from ddpm_fast.nn import MLP

try:
    from matplotlib import figure, mlab
except ImportError:
    print("toy.py draws with matplotlib, which is not installed: pip install ddpm_fast[train]", file=sys.stderr)
    raise SystemExit(2) from None

REAL, OURS, KDE = "#636363", "#0b6e4f", "#bf812d"


def draw(name, n, rng):
    """n samples of a distribution, (n, 1) or (n, 2)."""
    if name == "mixture":
        return rng.normal(0, 0.2, (n, 1)) + np.where(rng.random((n, 1)) < 0.3, -0.5, 0.5)
    if name == "ramp":
        return rng.random((n, 2)).min(axis=1, keepdims=True)
    u, v = rng.random((2, n))
    rho, theta = 0.25 + 0.65 * u + 0.15 * v, 3 * np.pi * u
    return np.stack([rho * np.cos(theta), rho * np.sin(theta)], axis=1)


def generate(x0, n, T, steps, seed, batch=512):
    """Trains a network on x0 (N, D) for so many steps; n samples of it, (n, D)."""
    # Betas shrink as T grows, so that t / T means the same noise; else nothing of x0 would be left at t = 300 of 1000.
    schedule = ddpm_fast.Schedule.linear(T, 1e-4 * 200 / T, 0.2 * 200 / T)
    torch.manual_seed(seed)  # of the first weights
    settings = {"images": batch * steps, "batch_size": batch, "lr": 3e-3, "lr_schedule": "cosine", "seed": seed}
    trainer = ddpm_fast.Trainer(MLP(x0.shape[1], num_timesteps=T), schedule, x0, **settings)
    trainer.train()
    if trainer.stopped is not None:  # by SIGTERM, for one: half a training is not what was asked for
        raise SystemExit(f"toy.py: stopped by {trainer.stopped}")
    return trainer.sampler().sample(n, seed=seed).cpu().numpy()


def study(name, runs, args):
    """Of a distribution: {kind: (samples, their energy distance to real ones that were held out)}."""
    n, rng = args.samples, np.random.default_rng(args.seed)
    real = [draw(name, size, rng) for size in (10 * n, n, n, n, n)]  # to learn from, held out, and others
    mean, std = real[0].mean(axis=0), real[0].std(axis=0)
    x0, held_out, *others = [((x - mean) / std).astype(np.float32) for x in real]
    kernel = rng.multivariate_normal(np.zeros(x0.shape[1]), mlab.GaussianKDE(x0.T).covariance, n)
    samples = {"kernel density": rng.choice(x0, n) + kernel}
    samples.update((f"T = {T}, {steps} steps", generate(x0, n, T, steps, args.seed)) for T, steps in runs)
    between_real = float(np.mean([energy_distance(x, held_out) for x in others]))
    return {"real": (x0, between_real)} | {kind: (x, energy_distance(x, held_out)) for kind, x in samples.items()}


def save_pictures(found, out):
    forward, lines, plane = (figure.Figure(figsize=(9, height), layout="constrained") for height in (2, 3.6, 6.8))
    bins, table = np.linspace(-3, 3, 61), ddpm_fast.Schedule.linear(200, 1e-4, 0.2).noising_table()
    x0 = torch.as_tensor(found["mixture"]["real"][0])
    for axis, t in zip(forward.subplots(1, 6, sharey=True), (1, 5, 10, 50, 100, 200), strict=True):  # ours is t - 1
        x_t = ddpm_fast.ops.q_sample(x0, torch.full((len(x0),), t - 1), table, noise=torch.randn_like(x0))
        axis.hist(x_t.numpy()[:, 0], bins, density=True, color=REAL)
        axis.set(title=f"t = {t}", xlabel="$x_t$", ylabel="density")
        axis.label_outer()
    for axis, name in zip(lines.subplots(1, 2), ("mixture", "ramp"), strict=True):
        x0, _, generated = (samples[:, 0] for samples, _ in found[name].values())
        axis.hist(x0, bins, density=True, color=REAL, alpha=0.5, label="real")
        axis.hist(generated, bins, density=True, color=OURS, histtype="step", linewidth=2, label="generated")
        axis.plot(bins, mlab.GaussianKDE(x0)(bins), color=KDE, label="kernel density")
        axis.set(title=name, xlabel="x", ylabel="density")
        axis.legend()
    for axis, (kind, (x, distance)) in zip(plane.subplots(2, 3).T.flat, found["spiral"].items(), strict=True):
        axis.hist2d(*x.T, bins=np.linspace(-2.5, 2.5, 76))
        axis.set(title=f"{kind}\nenergy distance {distance:.5f}", xlabel="x", ylabel="y", aspect="equal")
    for drawn, name in ((forward, "forward.png"), (lines, "lines.png"), (plane, "spiral.png")):
        drawn.savefig(out / name, dpi=90)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/toy"))
    for name, default in (("seed", 0), ("steps", 8000), ("samples", 10_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args, began = parser.parse_args(argv), time.perf_counter()
    for name, least in (("seed", 0), ("steps", 8), ("samples", 10)):
        if getattr(args, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(args, name)}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder that can be written: {error}")
    torch.set_num_threads(1)  # a layer this small is done before a second thread has begun
    once, spiral = [(200, args.steps)], [(T, steps) for T in (200, 1000) for steps in (args.steps // 8, args.steps)]
    found = {name: study(name, runs, args) for name, runs in (("mixture", once), ("ramp", once), ("spiral", spiral))}
    save_pictures(found, args.out)
    distances = {name: {kind: distance for kind, (_, distance) in kinds.items()} for name, kinds in found.items()}
    report = {"energy_distance": distances, "settings": vars(args), "seconds": time.perf_counter() - began}
    (args.out / "report.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    for name, kinds in distances.items():
        print(f"{name}, in units of the energy distance of two real samples ({kinds['real']:.1e}):")
        print("    " + ", ".join(f"{kind} {distance / kinds['real']:.1f}" for kind, distance in kinds.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
