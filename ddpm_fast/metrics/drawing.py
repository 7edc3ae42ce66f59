"""Samples to be measured: drawn in blocks, and how long that will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..sampler import Sampler
from ..sampling.shards import blocks, draw

_TIMED_ROWS = 3


def drawn(
    sampler: Sampler,
    share: range,
    shape: tuple[int, ...],
    *,
    seed: int,
    classes: tuple[int, ...] | None = None,
    guidance: float = 1.0,
    batch_size: int = 64,
) -> Iterator[Tensor]:
    """Samples of the indices in `share`, in order, a batch at a time: uint8 of pictures, else float32 (model range).

    classes: sample g has the label classes[g mod their number]; None for an unconditional network.
    """
    output = "uint8" if is_picture(shape) else "model"
    chunk = sampler.chunk if sampler.deterministic else None
    done = share.start
    for block, samples in draw(
        sampler,
        blocks(list(share), share, batch_size, chunk),
        shape,
        seed=seed,
        labels=None if classes is None else lambda block: labels_in_turn(classes, block),
        guidance=guidance,
        output=output,
        progress=False,
    ):
        yield samples[done - block.start :]  # blocks are equally long, so one may begin before the last one's end
        done = block.stop


def is_picture(shape: tuple[int, ...]) -> bool:
    """Whether a sample is a picture, grey or in colour."""
    return len(shape) == 3 and shape[0] in (1, 3)


def labels_in_turn(classes: tuple[int, ...], block: range) -> Tensor:
    """int64 labels of samples with these indices."""
    return torch.tensor(classes)[torch.arange(block.start, block.stop) % len(classes)]


def seconds_per_step(
    sampler: Sampler,
    shape: tuple[int, ...],
    *,
    batch_size: int,
    classes: tuple[int, ...] | None = None,
    guidance: float = 1.0,
) -> float:
    """How long one reverse step of a batch takes here: of the last few rows, after a first run that makes plans."""
    rows = min(_TIMED_ROWS, len(sampler))
    labels = None if classes is None else labels_in_turn(classes, range(batch_size))
    device = sampler.sample(0, shape, labels=None if labels is None else labels[:0]).device

    def run() -> None:
        x = torch.zeros(batch_size, *shape, device=device)
        begin = len(sampler) - rows
        history = torch.zeros_like(x) if begin and (sampler.self_condition or _looks_back(sampler)) else None
        sampler.sample(
            batch_size, shape, seed=0, labels=labels, guidance=guidance, x=x, x0_prev=history, start=begin,
            output="model", progress=False,
        )  # fmt: skip

    run()
    return timed(run, device) / rows


def timed(work: Callable[[], object], device: torch.device | None = None) -> float:
    """Seconds of one call, on a GPU until it is idle."""
    began = time.perf_counter()
    work()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _looks_back(sampler: Sampler) -> bool:
    return sampler.choices.steps.needs_history
