"""Constructors that take what a peer's takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Init = TypeVar("Init", bound=Callable[..., None])


def signature_of(theirs: type, **ours: Any) -> Callable[[Init], Init]:
    """Gives a constructor the signature of a diffusers class, which its `from_config` reads, and keywords of ours."""

    def sign(init: Init) -> Init:
        shown = inspect.signature(theirs.__init__)  # type: ignore[misc]
        added = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in ours.items()]
        init.__signature__ = shown.replace(parameters=[*shown.parameters.values(), *added])  # type: ignore[attr-defined]
        return init

    return sign
