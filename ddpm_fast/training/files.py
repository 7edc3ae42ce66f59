"""Checkpoint files: written whole or not at all, read as data only."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch


def write(path: Path, content: Any) -> None:
    """torch.save that replaces `path` in one step, after the new file has reached the disk."""
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read(path: Path, device: torch.device) -> Any:
    """What `torch.save` wrote, tensors on `device`. ValueError for a file that is cut off or holds code."""
    with open(path, "rb") as file:  # what is wrong with the file system is an OSError
        try:
            return torch.load(file, map_location=device, weights_only=True)
        except Exception as error:  # rubbish makes the restricted unpickler raise almost anything, OSError too
            raise ValueError(f"{path} is cut off or no checkpoint: {reason(error)}") from None


def reason(error: BaseException) -> str:
    """What a failed load says, in one line; of torch's advice on running the code in a file, what it found there."""
    found = re.search(r"WeightsUnpickler error: (.+?)(?:\. |\n|$)", str(error))
    return found[1] if found else (str(error).strip() or type(error).__name__).splitlines()[0]
