"""One run of `ddpm-fast eval`: what it costs, drawing, figures, the table and the file."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..metrics.bits import Bits, bits_per_dim, passes_for
from ..metrics.drawing import drawn, seconds_per_step, timed
from ..metrics.evaluation import Evaluation, Part, real_parts
from ..metrics.features import choose
from ..sampling.shards import Place
from ..training.data import Data, open_data
from ..training.processes import LostContact, World, share
from . import given
from .config import Config
from .errors import CommandError
from .evaluate_report import Result
from .sample_choices import classes_of, device_of, share_the_cores
from .sample_progress import Bar
from .sample_source import Source, described_choices, open_source
from .sample_store import IMAGES, MANIFEST, replacing

_FEW_STEPS, _LONG = 50, 600.0  # seconds after which a shorter way is worth a line


class Job:
    """Opens everything when it is made; `run` measures."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        place = Place.from_environment()
        self.device = device_of(arguments.device, place)
        share_the_cores(place, self.device)
        self.world = World.from_environment(self.device)
        self.figures_of = tuple(name for name in arguments.metrics if name != "bits")
        self.bits = "bits" in arguments.metrics
        path = Path(arguments.source)
        self.samples = _samples(path)
        self.source: Source | None = None if self.samples is not None else open_source(arguments, self.device)
        if self.bits and self.source is None:
            raise CommandError(f"bits are of a model, {path} holds samples; leave bits out of --metrics")
        self.classes = None
        if self.source is not None:
            arguments.label = None
            self.classes = classes_of(arguments, self.source)
        self.train = self._split("train")
        self.num = arguments.num
        if self.samples is not None:
            self.num = min(self.num, len(self.samples))
            if self.samples.shape != self.train.shape or self.samples.dtype != self.train.dtype:
                raise CommandError(
                    f"the samples are {_kind(self.samples)}, the real images {_kind(self.train)}: they must be alike"
                )
        self.share = range(*share(self.num, self.world.rank, self.world.size))

    # -- what it does ---------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Prints the cost and then the figures; CommandError for what cannot be measured."""
        try:
            self._run()
        except LostContact as error:
            raise CommandError(str(error), code=1) from error
        finally:
            self.world.close()  # whoever waits for this process gets an error

    def _run(self) -> None:
        began = time.perf_counter()
        self.say(f"{self._what()}; {_kind(self.train)} of {self.train.name}")
        evaluation, step = self._prepared(), self._seconds_per_step()
        self._say_cost(evaluation, step)
        if self.arguments.dry_run:
            return
        result = Result(self.num, evaluation)
        if evaluation is not None:
            try:
                result.figures = evaluation.of(self._batches())
            except LostContact:
                raise
            except RuntimeError as error:  # a sample that is not finite
                raise CommandError(str(error), code=1) from error
            self.say("measuring real images against real images")
            result.floor = evaluation.floor_figures()
        result.bits = self._bits() if self.bits else None
        if self.world.is_main:
            print(result.table(self.arguments.split), flush=True)
            if self.arguments.out is not None:
                self._write(result, time.perf_counter() - began)

    def _write(self, result: Result, seconds: float) -> None:
        arguments = self.arguments
        report: dict[str, Any] = {
            "format": "ddpm_fast.eval",
            "version": 1,
            "ddpm_fast": __version__,
            "source": os.fspath(arguments.source),
            "data": {"name": self.train.name, "shape": list(self.train.shape)},
            "seed": arguments.seed,
            "seconds": round(seconds, 3),
        }
        if self.source is not None:
            report["model"] = self.source.identity
            report["sampling"] = described_choices(self.source.sampler) | {
                "guidance": arguments.guidance,
                "labels": None if self.classes is None else list(self.classes),
            }
        report |= result.as_json(arguments.split)
        with replacing(arguments.out) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
        self.say(f"wrote {arguments.out}")

    def say(self, text: str) -> None:
        """A line on stdout, of the first process, unless --quiet."""
        if self.world.is_main and not self.arguments.quiet:
            print(text, flush=True)

    def _split(self, split: str) -> Data:
        """That part of the real images, in the shape of the samples."""
        arguments = self.arguments
        if arguments.data is not None:
            shape = None if self.source is None else self.source.shape
            if shape is None and self.samples is not None:
                shape = self.samples.shape
            pictures = shape is not None and len(shape) == 3 and shape[0] in (1, 3)
            size = (shape[1], shape[2]) if pictures and shape is not None else None
            channels = shape[0] if pictures and shape is not None else None
            return open_data(arguments.data, path=arguments.data_path, image_size=size, channels=channels, split=split)
        saved = Path(arguments.source) / "config.toml"
        if not saved.is_file():
            raise CommandError(f"--data is missing: {arguments.source} does not say what to compare with")
        data = Config().replaced(given.from_file(saved)).data
        return open_data(
            str(data.source),
            path=data.data_path,
            image_size=data.image_size,
            channels=data.channels,
            fit=data.fit,
            split=split,
            labels=data.labels is not False,
        )

    def _prepared(self) -> Evaluation | None:
        if not self.figures_of:
            return None
        arguments = self.arguments
        reference, floor = real_parts(self._split, arguments.against, arguments.seed)
        extractor = choose(
            arguments.features,
            self.train,
            weights=arguments.inception,
            device=self.device,
            world=self.world,
            say=self.say,
        )
        size = {"batch_size": arguments.batch_size, "seed": arguments.seed, "world": self.world}
        return Evaluation(extractor, reference, floor, metrics=self.figures_of, num=self.num, **size)

    def _batches(self) -> Iterator[Tensor]:
        """This process's share of the samples."""
        if self.samples is not None:
            own = Part(self.samples, torch.arange(len(self.samples)), "samples").some(self.num, self.arguments.seed)
            yield from own.batches(self.share.start, self.share.stop, self.arguments.batch_size)
            return
        assert self.source is not None
        shown = self.world.is_main and not self.arguments.quiet
        with Bar(len(self.share), 2, shown, self.say) as bar:
            for batch in drawn(
                self.source.sampler,
                self.share,
                self.source.shape,
                seed=self.arguments.seed,
                classes=self.classes,
                guidance=self.arguments.guidance,
                batch_size=self.arguments.batch_size,
            ):
                yield batch
                bar.advance(len(batch))

    # -- bits per dimension ---------------------------------------------------------------------------------------

    def _bits_sampler(self) -> Any:
        """The model's ddpm process over all timesteps, whatever samples are drawn by."""
        asked = vars(self.arguments) | {"method": None, "steps": None, "spacing": None, "eta": None}
        return open_source(argparse.Namespace(**asked), self.device).sampler

    def _bits(self) -> Bits:
        sampler, arguments = self._bits_sampler(), self.arguments
        data = self._split(arguments.split)
        chosen = Part(data, torch.arange(len(data)), "").some(arguments.bits_num, arguments.seed)
        first, last = share(len(chosen), self.world.rank, self.world.size)
        index = chosen.indices[first:last]
        if data.dtype != torch.uint8:
            raise CommandError(f"bits per dimension are of uint8 images, {data.name} holds {_kind(data)}")
        labels = None
        if self.classes is not None:
            if data.labels is None:
                raise CommandError(f"bits of a class-conditional network need labels, {data.name} has none")
            labels = data.labels[index]
        parts = torch.zeros(3, len(chosen), dtype=torch.float64)
        if len(index):
            found = bits_per_dim(
                sampler,
                data.batch(index),
                labels=labels,
                timesteps=self._bits_steps(),
                seed=arguments.seed,
                first_sample=first,
                batch_size=arguments.batch_size,
            )
            parts[:, first:last] = torch.from_numpy(np.stack([found.prior, found.steps, found.decoder]))
        self.world.sum(parts)
        prior, steps, decoder = parts.numpy()
        passes = passes_for(sampler, self._bits_steps())
        return Bits(prior, steps, decoder, passes, passes == len(sampler))

    def _bits_steps(self) -> int | None:
        return None if self.arguments.bits_steps == "all" else int(self.arguments.bits_steps)

    # -- what it says ---------------------------------------------------------------------------------------------

    def _what(self) -> str:
        if self.source is not None:
            return f"{self.source.described}; {self.source.sampler.choices}"
        return f"{self.arguments.source}: {self.num:,} samples"

    def _seconds_per_step(self) -> float:
        """Of a batch through the network; 0 where nothing is drawn."""
        if self.source is None:
            return 0.0
        try:
            return seconds_per_step(
                self.source.sampler,
                self.source.shape,
                batch_size=min(self.arguments.batch_size, len(self.share) or 1),
                classes=self.classes,
                guidance=self.arguments.guidance,
            )
        except RuntimeError as error:
            raise CommandError(str(error), code=1) from error

    def _say_cost(self, evaluation: Evaluation | None, step: float) -> None:
        total = 0.0
        per_image = step / min(self.arguments.batch_size, len(self.share) or 1)
        if evaluation is not None:
            if self.source is not None:
                steps = len(self.source.sampler) * (2 if self.arguments.guidance != 1 else 1)
                seconds = len(self.source.sampler) * len(self.share) * per_image
                total += seconds
                self.say(
                    f"cost: {self.num:,} samples x {steps} = {self.num * steps:,} network passes, "
                    f"about {_duration(seconds)}"
                )
            batch = next(evaluation.reference.batches(0, self.arguments.batch_size, self.arguments.batch_size))
            evaluation.extractor(batch)  # the first call costs more
            look = timed(lambda: evaluation.extractor(batch)) / len(batch)
            images = self.num + evaluation.real_images
            seconds = look * images / self.world.size
            total += seconds
            self.say(
                f"cost: features of {self.num:,} samples and {evaluation.real_images:,} real images, "
                f"about {_duration(seconds)}"
            )
        if self.bits and self.source is not None:
            T = self.source.sampler.schedule.num_timesteps
            wanted = self._bits_steps()
            passes = T if wanted is None else 1 + min(wanted, T - 1)
            count = min(self.arguments.bits_num, len(self._split(self.arguments.split)))
            seconds = per_image * passes * count / self.world.size
            total += seconds
            self.say(
                f"cost: bits of {count:,} images x {passes} = {count * passes:,} network passes, "
                f"about {_duration(seconds)}"
            )
        self.say(f"cost: about {_duration(total)} in all, from timed batches")
        steps = 0 if self.source is None or evaluation is None else len(self.source.sampler)
        if steps > _FEW_STEPS and total > _LONG:
            seconds = per_image * len(self.share) * _FEW_STEPS
            self.say(f"--method ddim --steps {_FEW_STEPS} would draw in about {_duration(seconds)}")


def _samples(path: Path) -> Data | None:
    """Samples that were drawn before; None for a model."""
    if not path.exists():
        raise FileNotFoundError(f"no {path}: a run, a checkpoint, or samples (a folder of images, .npz) were expected")
    if path.is_file():
        return None if path.suffix == ".safetensors" else open_data(path, labels=False)
    if (path / MANIFEST).is_file():  # of `ddpm-fast sample`: its grid is no sample
        if (path / IMAGES).is_dir():
            return open_data("folder", path=path / IMAGES, labels=False)
        files = sorted(path.glob("samples.*"))
        if not files:
            raise CommandError(f"{path} holds neither {IMAGES}/ nor samples.npz; let ddpm-fast sample finish first")
        return open_data(files[0], labels=False)
    has_model = (path / "checkpoints").is_dir() or any(path.glob("*.safetensors")) or (path / "config.json").is_file()
    if has_model or (path / "config.toml").is_file() or (path / "model_index.json").is_file():
        return None
    return open_data("folder", path=path, labels=False)


def _kind(data: Data) -> str:
    return f"{len(data):,} {'x'.join(map(str, data.shape))} {str(data.dtype).removeprefix('torch.')}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
