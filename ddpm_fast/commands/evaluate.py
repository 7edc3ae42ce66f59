"""`ddpm-fast eval`: how good the samples of a model are, beside what real images reach; its bits per dimension."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .errors import CommandError

EXAMPLES = """examples:
  ddpm-fast eval runs/fashion                                       5000 samples of the run, against its own data
  ddpm-fast eval runs/fashion --dry-run                             what that would cost
  ddpm-fast eval runs/fashion --num 2000 --method ddim --steps 50   fewer and faster samples
  ddpm-fast eval runs/fashion --metrics bits --bits-steps all       the whole variational bound
  ddpm-fast eval samples --data fashion-mnist                       images that ddpm-fast sample drew
  ddpm-fast eval samples.npz --data pictures --features inception   with torch-fidelity's Inception
  torchrun --nproc-per-node 2 $(which ddpm-fast) eval runs/fashion  in two processes, with the same result
"""
METRICS = ("frechet", "kid", "precision-recall", "bits")
FEATURES = ("auto", "inception", "classifier", "pixels")


def add_arguments(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "eval",
        description="Measures samples of a trained model against real images, and the same figures of real images "
        "against real images beside them: the floor. What it costs is printed first. Exit code 0: done; 2: it could "
        "not be done.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a run, a checkpoint, a diffusers folder; or samples: a folder of images, .npz")
    parser.add_argument("--metrics", default="frechet,kid,precision-recall", metavar="A,B", help=_metrics_help())
    # -n, for torchrun takes --num of the script that it is to run for its own --numa-binding.
    parser.add_argument("-n", "--num", type=int, default=5000, metavar="N", help="samples; default: 5000, or all")
    parser.add_argument("--out", type=Path, metavar="JSON", help="a file for the figures")
    parser.add_argument("--dry-run", action="store_true", help="print what it would cost, and end")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--quiet", action="store_true", help="print the figures only")

    data = parser.add_argument_group("real images")
    data.add_argument("--data", metavar="NAME|PATH", help="as of ddpm-fast train; default: what the run was trained on")
    data.add_argument("--data-path", metavar="DIR", help="where the files of a named data set are")
    data.add_argument("--against", choices=("train", "test"), default="train", help="part to compare with")
    data.add_argument("--split", choices=("train", "test"), default="test", help="part whose bits are counted")
    data.add_argument("--features", choices=FEATURES, default="auto", help="auto: Inception if it is there")
    data.add_argument("--inception", type=Path, metavar="FILE", help="weights; default: where torch-fidelity has them")

    how = parser.add_argument_group("drawing, as of ddpm-fast sample")
    how.add_argument("--seed", type=int, default=0, help="of samples, subsets and timesteps; default: 0")
    how.add_argument("--no-ema", action="store_true", help="the weights as trained instead of their average")
    how.add_argument("--method", choices=("ddpm", "ddim", "dpmsolver++"), help="default: ddpm")
    how.add_argument("--steps", type=int, help="default: all T for ddpm, 50 for ddim, 20 for dpmsolver++")
    how.add_argument("--eta", type=float, help="of ddim: 0 deterministic (default), 1 as noisy as ddpm")
    how.add_argument("--variance", choices=("fixed_small", "fixed_large"), help="default: fixed_large")
    how.add_argument("--spacing", help="how fewer steps are spread: trailing (default), leading, linspace, ...")
    how.add_argument("--clip", type=float, metavar="X", help="bound of |x0|; default: 1 for images")
    how.add_argument("--no-clip", dest="clip", action="store_const", const=False, help="no bound")
    how.add_argument("--like", choices=("tutorial", "diffusers", "lucidrains", "openai"), help="that peer's choices")
    how.add_argument("--labels", metavar="0,1,2", help="classes in turn; default: all of a conditional network")
    how.add_argument("--guidance", type=float, default=1.0, metavar="W", help="classifier-free; default: 1, none")
    how.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time; default: 64")
    how.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the network")
    how.add_argument("--no-fused", action="store_true", help="the network as it is, without a fused plan")
    how.add_argument("--deterministic", action="store_true", help="the same samples for any number of processes")

    bits = parser.add_argument_group("bits per dimension: the variational bound of all T steps of ddpm")
    bits.add_argument("--bits-num", type=int, default=256, metavar="N", help="images; default: 256")
    bits.add_argument("--bits-steps", default="20", metavar="K", help="timesteps an image, or all; default: 20")


def _metrics_help() -> str:
    return f"some of {', '.join(METRICS)}; default: all but bits"


def run(arguments: argparse.Namespace) -> int:
    """0 when the figures are printed."""
    arguments.metrics = _checked(arguments)
    from .evaluate_job import Job  # torch, and what comes with it

    Job(arguments).run()
    return 0


def _checked(arguments: argparse.Namespace) -> tuple[str, ...]:
    """The metrics asked for; CommandError for what can be seen without looking at the model."""
    metrics = tuple(dict.fromkeys(word.strip() for word in arguments.metrics.split(",") if word.strip()))
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise CommandError(f"--metrics must be some of {', '.join(METRICS)}, got {arguments.metrics!r}")
    for name, least in (("num", 4), ("batch_size", 1), ("bits_num", 1)):
        if (value := getattr(arguments, name)) < least:
            raise CommandError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if arguments.steps is not None and arguments.steps < 1:
        raise CommandError(f"--steps must be at least 1, got {arguments.steps}")
    if not 0 <= arguments.seed < 2**64:
        raise CommandError(f"--seed must lie in 0..2^64 - 1, got {arguments.seed}")
    if arguments.bits_steps != "all" and not (arguments.bits_steps.isdecimal() and int(arguments.bits_steps) >= 1):
        raise CommandError(f'--bits-steps must be a number of at least 1, or "all", got {arguments.bits_steps!r}')
    if arguments.inception is not None and arguments.features not in ("auto", "inception"):
        raise CommandError(f"--inception and --features {arguments.features} exclude each other")
    if arguments.out is not None and not (arguments.out.parent.is_dir() and not arguments.out.is_dir()):
        raise CommandError(f"--out {arguments.out}: a file in a folder that exists was expected")
    return metrics
