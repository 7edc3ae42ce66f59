"""The command `ddpm-fast`: finds the command's module in `commands/`, runs it, turns errors into one line."""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from .commands.errors import USAGE, CommandError, one_line

COMMANDS = {
    "train": "train a diffusion model on images; kill it anywhere, resume anywhere",
    "sample": "draw images from a trained model: PNGs, a grid, .npz, a GIF of the reverse process",
    "eval": "measure a trained model: Frechet distance, KID, precision and recall",
    "info": "what works on this machine; or what a run or a checkpoint holds",
    "bench": "measure ops and sampling steps against eager PyTorch, torch.compile, OpenVINO and diffusers",
    "demo": "train on real handwritten digits, sample a labelled grid, measure quality and speed",
}
TRACEBACK_VARIABLE = "DDPM_FAST_TRACEBACK"
INTERRUPTED = 130  # what shells report for Ctrl-C: 128 + SIGINT

EXAMPLES = f"""examples:
  ddpm-fast demo                                              train, sample and measure in about 3 minutes
  ddpm-fast train --data fashion-mnist --out runs/fashion     train; the same line goes on with a run that was stopped
  ddpm-fast sample runs/fashion --num 64 --out samples        images of the trained model
  ddpm-fast eval runs/fashion                                 how good they are
  ddpm-fast info runs/fashion                                 what the run holds
  ddpm-fast bench --quick                                     sampling steps and ops against every baseline

`ddpm-fast COMMAND --help` has the options and more examples. {TRACEBACK_VARIABLE}=1 shows where an error came from.
"""


class _Parser(argparse.ArgumentParser):
    """Errors as one line, without the usage in front; no abbreviated options, which a new option would change."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser(argv: Sequence[str]) -> _Parser:
    """Knows the options of the command in front of the line, and of the others only what they are for."""
    parser = _Parser(
        prog="ddpm-fast",
        description="Fast training and sampling of denoising diffusion models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choices = f"{{{','.join(COMMANDS)}}}"
    subparsers = parser.add_subparsers(dest="command", metavar=choices, required=True)
    for name, text in COMMANDS.items():
        if argv and argv[0] == name:
            module = importlib.import_module(f".commands.{_module(name)}", __package__)
            module.add_arguments(subparsers)
            parser.set_defaults(run=module.run)
        else:
            subparsers.add_parser(name, help=text)
    return parser


def _module(command: str) -> str:
    return "evaluate" if command == "eval" else command


def _warn(command: str, message: Warning | str, category: type[Warning], *place: Any) -> None:
    """A warning as one line, without the line of code that it came from; of several processes the first one's."""
    if _process() == "":
        print(f"ddpm-fast {command}: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _process() -> str:
    """Which of several processes this is, as the end of a line; nothing for the first and for the only one."""
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" [process {rank}]"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line (default: the process's own) and returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = _parser(argv).parse_args(argv)
    except SystemExit as stop:  # argparse ends the process itself; a caller wants the code
        return stop.code if isinstance(stop.code, int) else USAGE
    try:
        with warnings.catch_warnings():
            warnings.showwarning = functools.partial(_warn, arguments.command)
            return int(arguments.run(arguments))
    except BrokenPipeError:  # whoever read our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CommandError, ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"ddpm-fast {arguments.command}: error: {one_line(error)}{_process()}", file=sys.stderr)
        return error.code if isinstance(error, CommandError) else USAGE
    except KeyboardInterrupt:
        print(f"ddpm-fast {arguments.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
