"""Triton's interpreter without two costs that are most of its time in small tests and change no result."""

from __future__ import annotations

import dataclasses
from typing import Any


class _Kept:
    def restore(self) -> None:
        pass


def make_faster() -> None:
    """To be called before a kernel runs; where Triton's internals are not those known here, it leaves them alone.

    The interpreter makes triton.language ready for each launch, and again for each call of a helper function: here once
    for each module with kernels, which then stays so. And it computes every sum and product of integers a second
    time in int64 for a check that it then leaves out, since its option ``debug`` is off.
    """
    from triton.runtime import interpreter

    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and not getattr(options, "debug", True):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)

    patch, done = getattr(interpreter, "_patch_lang", None), set()

    def once(fn: Any) -> _Kept:
        if fn.__module__ not in done:
            patch(fn)
            done.add(fn.__module__)
        return _Kept()

    if patch is not None:
        interpreter._patch_lang = once
