"""Many samples as one of several processes: which are whose, and in which blocks they are drawn.

Sample g of a seed is a function of (seed, g), with `Sampler(deterministic=True)` to the bit. So processes need no word
with each other: each takes its share of the indices, leaves out what exists already and draws the rest.
"""

from __future__ import annotations

import bisect
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from ..sampler import Sampler

RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"


@dataclasses.dataclass(frozen=True)
class Place:
    """Process `rank` of `size`; `local_rank` of `local_size` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Place:
        """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, which torchrun and accelerate set; without them one
        process. ValueError for values that make no sense.
        """
        rank, size = _number(environment, RANK, 0), _number(environment, WORLD_SIZE, 1)
        if not 0 <= rank < size:
            raise ValueError(f"{RANK} must lie in 0..{WORLD_SIZE}-1, got {RANK}={rank} and {WORLD_SIZE}={size}")
        local_rank = _number(environment, LOCAL_RANK, rank)
        return cls(rank, size, local_rank, max(1, _number(environment, LOCAL_WORLD_SIZE, size)))

    def share(self, indices: range) -> range:
        """This process's part of consecutive indices: the shares are contiguous, differ by one at most, and tile it."""
        n = len(indices)
        return indices[self.rank * n // self.size : (self.rank + 1) * n // self.size]


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text.strip():
        return default
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be a whole number, got {text!r}") from None


def blocks(missing: Sequence[int], share: range, size: int, chunk: int | None = None) -> list[range]:
    """Consecutive indices to draw at a time, so that every missing one is drawn once.

    missing: ascending indices within `share`. size: the most that a block may hold.
    chunk: None makes all blocks equally long, because a fused plan is tried anew for every batch size: they may hold a
        few indices that are not missing, or draw some of the block before again. A number (of a deterministic sampler,
        which always runs so many places) makes them end on multiples of it, and no longer than what is missing.
    """
    result: list[range] = []
    if not missing:
        return result
    if chunk is None:
        size = -(-len(missing) // -(-len(missing) // size))
    i = 0
    while i < len(missing):
        first = missing[i]
        if chunk is None:
            first = max(share.start, min(first, share.stop - size))
            last = first + size
        else:
            last = (first // chunk + max(1, size // chunk)) * chunk
            last = missing[bisect.bisect_left(missing, last, lo=i) - 1] + 1
        result.append(range(first, last))
        i = bisect.bisect_left(missing, last, lo=i)
    return result


def draw(
    sampler: Sampler,
    todo: Sequence[range],
    shape: Sequence[int] | None = None,
    *,
    seed: int,
    labels: Callable[[range], Tensor] | None = None,
    guidance: float = 1.0,
    output: str | None = None,
    progress: bool | None = False,
) -> Iterator[tuple[range, Tensor]]:
    """The samples of each block in turn, as (indices, what `Sampler.sample` returns for them).

    labels: gives the int64 labels of consecutive indices. The rest is as in `Sampler.sample`.
    """
    for block in todo:
        rows = None if labels is None else labels(block)
        yield (
            block,
            sampler.sample(
                len(block),
                shape,
                seed=seed,
                first_sample=block.start,
                labels=rows,
                guidance=guidance,
                output=output,
                progress=progress,
            ),
        )
