"""`ddpm-fast sample`: images of a trained model, from one process or many, again and again from where it stopped."""

from __future__ import annotations

import argparse
import contextlib
import errno
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import CommandError, one_line

EXAMPLES = """examples:
  ddpm-fast sample runs/fashion --num 64 --out samples                          PNGs and a grid
  ddpm-fast sample runs/fashion --num 64 --out fast --method ddim --steps 50    20 times fewer steps
  ddpm-fast sample runs/fashion --num 40 --out threes --label 3 --guidance 2    of one class
  ddpm-fast sample runs/fashion --num 16 --out film --gif                       the reverse process, too
  torchrun --nproc-per-node 2 $(which ddpm-fast) sample runs/fashion -n 50000 --out many --npz
                                                                                in two processes

The same line goes on where a run was stopped, with any number of processes; a larger --num adds images. After torchrun
write -n: its own parser takes --num for one of its options.
"""
TERMINATED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
_LABELS = "classes 0,1,2 in turn (image g has the (g mod 3)rd); default: all classes of a conditional network"


def add_arguments(subparsers: Any) -> None:
    """Registers the command and its options."""
    parser = subparsers.add_parser(
        "sample",
        description="Draws images from a trained model into a folder: images/000000000.png, ..., grid.png and, where "
        "asked for, samples.npz and reverse.gif. Image g is a function of the seed and g. Exit code 0: done; "
        "1: a sample stopped being finite; 2: it could not be done; 130, 143: stopped by Ctrl-C, SIGTERM.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="a run's folder, a checkpoint, or the folder of a diffusers pipeline")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where everything goes")
    parser.add_argument("-n", "--num", type=int, default=64, metavar="N", help="how many; default: 64")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn; default: 0")
    parser.add_argument("--first", type=int, default=0, metavar="G", help="index of the first image; default: 0")
    parser.add_argument("--no-ema", action="store_true", help="the weights as trained instead of their average")
    parser.add_argument("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda or cuda:N")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")

    how = parser.add_argument_group("the reverse process")
    how.add_argument("--method", choices=("ddpm", "ddim", "dpmsolver++"), help="default: ddpm")
    how.add_argument("--steps", type=int, help="default: all T for ddpm, 50 for ddim, 20 for dpmsolver++")
    how.add_argument("--eta", type=float, help="of ddim: 0 deterministic (default), 1 as noisy as ddpm")
    how.add_argument("--variance", choices=("fixed_small", "fixed_large"), help="of ddpm; default: fixed_large")
    how.add_argument("--spacing", help="how fewer steps are spread: trailing (default), leading, linspace, ...")
    how.add_argument("--clip", type=float, metavar="X", help="bound of |x0|; default: 1 for images")
    how.add_argument("--no-clip", dest="clip", action="store_const", const=False, help="no bound")
    how.add_argument("--like", choices=("tutorial", "diffusers", "lucidrains", "openai"), help="that peer's choices")

    label = parser.add_argument_group("class-conditional networks")
    label.add_argument("--labels", metavar="0,1,2", help=_LABELS)
    label.add_argument("--label", metavar="K", help='one class, or "none"')
    label.add_argument("--guidance", type=float, default=1.0, metavar="W", help="classifier-free; default: 1, none")

    speed = parser.add_argument_group("speed and sameness")
    speed.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time; default: 64")
    speed.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the network")
    speed.add_argument("--no-fused", action="store_true", help="the network as it is, without a fused plan")
    speed.add_argument(
        "--deterministic",
        action="store_true",
        help="the same bits for any number of processes and any restart, on one kind of device",
    )

    files = parser.add_argument_group("what is written")
    flag = argparse.BooleanOptionalAction
    files.add_argument("--png", action=flag, help="a PNG per image; default: where samples are images")
    files.add_argument("--float32", action="store_true", help="keep float32 in the model's range, not pixels")
    files.add_argument("--npz", action="store_true", help="samples.npz: arr_0 uint8 (N, H, W, C), arr_1 the labels")
    files.add_argument("--safetensors", action="store_true", help="samples.safetensors: samples (N, C, H, W), labels")
    files.add_argument("--grid", action=flag, help="grid.png of the first 64 or so; default: where they are images")
    files.add_argument("--gif", action="store_true", help="reverse.gif: the reverse process of the first 16 or so")


def run(arguments: argparse.Namespace) -> int:
    """0 when this process's share is drawn; what all processes drew is put together by the one that ends last."""
    from .sample_job import Job

    _check(arguments)
    job = Job(arguments)
    try:
        with _sigterm():
            job.prepare()
            with _explained(job):
                job.run()
    except KeyboardInterrupt:
        job.say_stopped("interrupted")
        return INTERRUPTED
    except _Terminated:
        job.say_stopped("stopped by SIGTERM")
        return TERMINATED
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """CommandError for what can be seen without looking at the model."""
    for name in ("num", "batch_size"):
        if (value := getattr(arguments, name)) < 1:
            raise CommandError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.steps is not None and arguments.steps < 1:
        raise CommandError(f"--steps must be at least 1, got {arguments.steps}")
    if not 0 <= arguments.first <= 2**63 - 1 - arguments.num:
        raise CommandError(f"--first must lie in 0..2^63 - 1 - N, got {arguments.first}")
    if not 0 <= arguments.seed < 2**64:
        raise CommandError(f"--seed must lie in 0..2^64 - 1, got {arguments.seed}")
    if arguments.label is not None and arguments.labels is not None:
        raise CommandError("--label and --labels exclude each other; --labels takes one class, too")
    if arguments.png and arguments.float32:
        raise CommandError("--png and --float32 exclude each other: PNGs hold pixels; use --npz or --safetensors")


class _Terminated(BaseException):
    """SIGTERM, as an exception: what is being written gets written, and no handler of errors catches it."""


@contextlib.contextmanager
def _sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _explained(job: Any) -> Iterator[None]:
    """A full disk or a folder that cannot be written to, and a sample that is NaN, as one line."""
    try:
        yield
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.errno is None:  # ours, and says it all
            raise
        what = f"cannot write to {error.filename or job.out}: {error.strerror or error}"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise CommandError(what + (f"; {job.progress()}, the same command goes on" if full else "")) from error
    except RuntimeError as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):
            raise CommandError(
                f"not enough memory for --batch-size {job.arguments.batch_size}; use a smaller one"
            ) from error
        raise CommandError(one_line(error), code=1) from error
