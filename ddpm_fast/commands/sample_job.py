"""One run of `ddpm-fast sample`: what is there, what is missing, drawing it, and putting it together."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sampling.model import attribute
from ..sampling.shards import Place, blocks, draw
from .errors import CommandError
from .sample_choices import classes_of, device_of, share_the_cores
from .sample_pictures import (
    GIF,
    GRID,
    NPZ,
    SAFETENSORS,
    gif_layout,
    grid_layout,
    labels_of,
    write_gif,
    write_grid,
    write_npz,
    write_safetensors,
)
from .sample_progress import Bar
from .sample_source import Source, described_choices, open_source
from .sample_store import Array, ArrayStore, PngStore, Store, claim

FORMAT = "ddpm_fast.sample"


class Job:
    """`prepare`, then `run`; `progress` and `say_stopped` say how far it is."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.out = arguments, Path(arguments.out)
        self.place = Place.from_environment()
        self.indices = range(arguments.first, arguments.first + arguments.num)
        self.share = self.place.share(self.indices)
        self.store: Store | None = None
        self.source: Source

    # -- what it says -------------------------------------------------------------------------------------------------

    def say(self, text: str, every_process: bool = False) -> None:
        """A line on stdout, of the first process unless every one has something to say."""
        if self._shown or (every_process and not self.arguments.quiet):
            who = f"[{self.place.rank}/{self.place.size}] " if every_process and self.place.size > 1 else ""
            print(who + text, flush=True)

    def progress(self) -> str:
        """How many samples of all are there."""
        there = 0 if self.store is None else len(self.indices) - len(self.store.missing(self.indices))
        return f"{there:,} of {len(self.indices):,} samples are in {self.out}"

    def say_stopped(self, why: str) -> None:
        """After a signal: one line on stderr."""
        print(f"ddpm-fast sample: {why}; {self.progress()}, the same command goes on", file=sys.stderr)

    # -- what it does -------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Loads and checks; writes nothing. CommandError, ValueError, ... for arguments that cannot be served."""
        device = device_of(self.arguments.device, self.place)
        share_the_cores(self.place, device)
        self.source = source = open_source(self.arguments, device)
        self.labels = classes_of(self.arguments, source)
        self._choose_files()
        rows = None if self.labels is None else torch.zeros(0, dtype=torch.int64)
        source.sampler.sample(0, source.shape, labels=rows, guidance=self.arguments.guidance)  # checks, runs nothing
        self.store = self._store()

    def run(self) -> None:
        """Draws what is missing of this process's share, and puts together what all drew if nothing is missing."""
        store = self.store
        assert store is not None
        self.out.mkdir(parents=True, exist_ok=True)
        claim(self.out, self._identity())
        store.make()
        missing = store.missing(self.share)
        self._announce(len(missing))
        if missing:
            self._draw(store, missing)
        if self.gif and self.place.rank == 0 and len(self.share):
            self._film()
        self._put_together(store)

    def _choose_files(self) -> None:
        arguments, pictures = self.arguments, self.source.pictures
        shape = "x".join(map(str, self.source.shape))
        for flag in ("png", "grid", "gif"):
            if getattr(arguments, flag) and not pictures:
                raise CommandError(
                    f"--{flag} is for images of 1 or 3 channels; these samples are {shape}: use --npz or --safetensors"
                )
        self.floats = arguments.float32 or not pictures
        self.png = not self.floats if arguments.png is None else arguments.png
        self.grid = pictures if arguments.grid is None else arguments.grid
        self.gif, self.safetensors = arguments.gif, arguments.safetensors
        self.npz = arguments.npz or not (self.png or self.safetensors)

    def _store(self) -> Store:
        shape = self.source.shape
        threads = max(1, min(2, torch.get_num_threads()))
        if self.png:
            return PngStore(self.out, shape, threads)
        return ArrayStore(self.out, shape, np.float32 if self.floats else np.uint8, threads)

    def _identity(self) -> dict[str, Any]:
        """Everything that decides what image g is. How many there are and how they are cut up does not."""
        return {
            "format": FORMAT,
            "version": 1,
            **self.source.identity,
            "shape": list(self.source.shape),
            "stored": "png" if self.png else "float32" if self.floats else "uint8",
            "seed": self.arguments.seed,
            "labels": None if self.labels is None else list(self.labels),
            "guidance": self.arguments.guidance,
            **described_choices(self.source.sampler),
        }

    def _announce(self, missing: int) -> None:
        sampler = self.source.sampler
        self.say(self.source.described)
        fused = "fused plan" if sampler.fused else f"no fused plan ({sampler.not_fused_because})"
        guided = f", guidance {self.arguments.guidance:g}" if self.arguments.guidance != 1 else ""
        self.say(f"{sampler.choices}, {self.arguments.dtype}, {fused}{guided}, seed {self.arguments.seed}")
        there = len(self.share) - missing
        already = f", {there:,} of them there already" if there else ""
        of = f" of {len(self.indices):,}" if self.place.size > 1 else ""
        self.say(f"drawing {len(self.share):,}{of} samples into {self.out}{already}", self.place.size > 1)

    def _draw(self, store: Store, missing: list[int]) -> None:
        sampler = self.source.sampler
        todo = blocks(missing, self.share, self.arguments.batch_size, sampler.chunk if sampler.deterministic else None)
        wanted = iter(missing)
        upcoming = next(wanted, None)
        began = time.perf_counter()
        with store, Bar(len(missing), len(todo), self._shown, self.say) as bar:
            for block, samples in draw(
                sampler,
                todo,
                self.source.shape,
                seed=self.arguments.seed,
                labels=None if self.labels is None else self._rows,
                guidance=self.arguments.guidance,
                output="model" if self.floats else "uint8",
                progress=bar.of_steps,
            ):
                mine = []
                while upcoming is not None and upcoming < block.stop:
                    mine.append(upcoming)
                    upcoming = next(wanted, None)
                store.put(mine, block.start, samples.cpu().numpy())
                bar.advance(len(mine))
        seconds = time.perf_counter() - began
        rate = len(missing) / seconds
        self.say(f"drew {len(missing):,} samples in {seconds:.1f} s, {rate:.1f} a second", self.place.size > 1)

    def _rows(self, block: range) -> Tensor:
        assert self.labels is not None
        return labels_of(self.labels, block)

    def _film(self) -> None:
        layout = gif_layout(self.indices, self.labels, self._null)
        sampler = self.source.sampler

        def frames() -> Iterator[Array]:
            labels = None if self.labels is None else self._rows(layout.shown)
            for step in sampler.stream(
                len(layout.shown),
                self.source.shape,
                seed=self.arguments.seed,
                first_sample=layout.shown.start,
                labels=labels,
                guidance=self.arguments.guidance,
            ):
                yield step.x.cpu().numpy()

        write_gif(self.out / GIF, sampler, layout, frames())
        self.say(f"wrote {self.out / GIF}")

    def _put_together(self, store: Store) -> None:
        left = len(store.missing(self.indices))
        if left:
            self.say(f"{left:,} samples are still missing; the process that ends last puts all together", True)
            return
        wrote = [f"{store.folder}{os.sep}"]
        if self.grid:
            write_grid(self.out / GRID, store, grid_layout(self.indices, self.labels, self._null))
            wrote.append(str(self.out / GRID))
        for asked, name, write in ((self.npz, NPZ, write_npz), (self.safetensors, SAFETENSORS, write_safetensors)):
            if asked:
                write(self.out / name, store, self.indices, self.source.shape, self.labels)
                wrote.append(str(self.out / name))
        self.say(f"all {len(self.indices):,} samples are there: {', '.join(wrote)}", self.place.size > 1)

    @property
    def _shown(self) -> bool:
        return not self.arguments.quiet and self.place.rank == 0

    @property
    def _null(self) -> Any:
        return attribute(self.source.sampler.model, "null_label")
