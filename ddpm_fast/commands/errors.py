"""What a command says when it cannot do what it was asked for."""

from __future__ import annotations

USAGE = 2
"""Exit code for bad input and unusable state."""


class CommandError(Exception):
    """One line for stderr: what was wrong, what was expected, what to do; `code` is the process's exit code."""

    def __init__(self, message: str, code: int = USAGE) -> None:
        super().__init__(message)
        self.code = code


def one_line(error: BaseException) -> str:
    """An exception's message with its line breaks folded; its class where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
