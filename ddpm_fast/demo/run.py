"""The main job, start to end: data, training, pictures, quality, seconds, report."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import __version__, viz
from ..nn import UNet
from ..sampler import Sampler
from ..schedule import Schedule
from . import digits as digits_module
from .digits import Digits, Reader
from .measure import compare_speed, energy, verdicts
from .report import machine_facts, speed_table
from .settings import Settings
from .train import train

SHAPE = (1, digits_module.SIZE, digits_module.SIZE)
CHUNK = 100  # images that the network sees at once: more fall out of the caches of a small CPU
UNGUIDED_FIRST = 1 << 20  # first_sample of the unguided images, clear of the grid's
COMPARED_FIRST = 1 << 21


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Does the main job, writes its four files and returns what report.json holds.

    `report["missed"]` names the quality bars that were not reached. Raises DemoError before any
    work if the settings cannot work.
    """
    device = settings.check()
    threads = torch.get_num_threads()
    try:
        return _run(settings, device, say)
    finally:
        torch.set_num_threads(threads)  # the training leaves as many as paid


def _run(settings: Settings, device: torch.device, say: Callable[[str], None]) -> dict[str, Any]:
    began = time.perf_counter()
    demo = _Demo(settings, device, say)
    digits, reader = demo.load()
    net = demo.train(digits)
    demo.save_model(net)
    images = demo.pictures(net)
    demo.quality(net, digits, reader, images)
    left = settings.aim_seconds - (time.perf_counter() - began)
    demo.speed(net, min(settings.compare_seconds, max(0.0, left)))
    demo.report["total_seconds"] = time.perf_counter() - began
    text = json.dumps(demo.report, indent=2) + "\n"
    (settings.out / "report.json").write_text(text, encoding="utf-8")
    files = ", ".join(("samples.png", "reverse.gif", "model.safetensors", "report.json"))
    say(f"wrote {files} to {settings.out}; {demo.report['total_seconds']:.0f} s in all")
    return demo.report


class _Demo:
    """The parts of one run; they share the settings, the progress bars and the report."""

    def __init__(self, settings: Settings, device: torch.device, say: Callable[[str], None]) -> None:
        self.settings, self.device, self.say = settings, device, say
        self.schedule = Schedule.linear(settings.timesteps)
        self._sampler: Sampler | None = None
        self.report: dict[str, Any] = {
            "ddpm_fast": __version__,
            "seed": settings.seed,
            "machine": machine_facts(device),
        }

    def bar(self, name: str, total: float, **options: Any) -> Any:
        from tqdm import tqdm

        off = not self.settings.progress
        return tqdm(desc=name, total=total, leave=False, disable=off, dynamic_ncols=True, **options)

    def load(self) -> tuple[Digits, Reader]:
        digits = digits_module.load()
        reader = Reader(digits, seed=self.settings.seed % 2**32)
        self.report["data"] = {
            "images": len(digits),
            "reader_fitted_on": reader.fitted,
            "reader_held_out": reader.held_out,
            "reader_accuracy_on_held_out": reader.accuracy,
        }
        self.say(
            f"data: {len(digits):,} handwritten digits of scikit-learn, 8x8 resized to 16x16; "
            f"an SVM fitted on {reader.fitted:,} of them reads {100 * reader.accuracy:.1f} % of "
            f"the other {reader.held_out}"
        )
        return digits, reader

    def train(self, digits: Digits) -> UNet:
        s, recipe = self.settings, self.settings.recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            net = UNet(1, s.time_dim, "cpu", width=s.width, depth=s.depth, num_classes=10)
        net = net.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parameters = sum(p.numel() for p in net.parameters())
        form = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
        with self.bar("training", 100, bar_format=form) as bar:
            average, log = train(net, digits, self.schedule, recipe, seed=s.seed, bar=bar)
        self.report["training"] = {
            "unet": net.config,
            "parameters": parameters,
            "recipe": dataclasses.asdict(recipe),
            "steps": log.steps,
            "images_drawn": log.images,
            "seconds": log.seconds,
            "torch_threads": log.threads,
            "final_loss": log.final_loss,
            "losses": log.losses,
        }
        self.say(
            f"training: UNet(width={s.width}, depth={s.depth}), {parameters / 1e6:.2f} M weights, "
            f"{log.steps} steps of {recipe.batch} images in {log.seconds:.0f} s "
            f"({log.threads} CPU threads), loss {log.final_loss:.4f}"
        )
        return average

    def save_model(self, net: UNet) -> None:
        """Writes the averaged weights and reads them back."""
        from safetensors import safe_open
        from safetensors.torch import save

        path = self.settings.out / "model.safetensors"
        metadata = {
            "architecture": "ddpm_fast.UNet",
            "config": json.dumps(net.config),
            "schedule": json.dumps({"name": "linear", "T": self.settings.timesteps}),
            "prediction": "eps",
        }
        # Not save_file, whose file only its owner may read.
        path.write_bytes(save({k: v.contiguous() for k, v in net.state_dict().items()}, metadata))
        with safe_open(path, framework="pt") as file:
            again = UNet(device="cpu", **json.loads(file.metadata()["config"]))
            keys = file.keys()
            again.load_state_dict({key: file.get_tensor(key) for key in keys})
        ours, theirs = net.state_dict(), again.state_dict()
        if not all(torch.equal(ours[key].cpu(), theirs[key]) for key in ours):
            raise RuntimeError(f"{path} does not give back the weights that were written to it")

    def sampler(self, net: UNet) -> Sampler:
        """DDPM on some of the timesteps, with x0 clipped to the range of the data; one for a network."""
        if self._sampler is None or self._sampler.model is not net:
            self._sampler = Sampler(
                net,
                self.schedule,
                steps=self.settings.steps,
                variance="fixed_small",
                clip=1.0,
                chunk=CHUNK,
                fused=True,
            )
        return self._sampler

    def asked(self, n: int) -> Tensor:
        """Labels 0..9, 0..9, ...: one row of the grid after the other."""
        return torch.arange(n, device=self.device) % 10

    def pictures(self, net: UNet) -> Tensor:
        """Writes samples.png and, from the same sampling, reverse.gif; returns the images."""
        s = self.settings
        n = 10 * s.rows
        rarely, often = max(1, s.steps // 25), max(1, s.steps // 50)  # the first half is noise
        frames, images = [], torch.empty(0)
        with self.bar("grid", s.steps, unit=" steps") as bar:
            for step in self.sampler(net).stream(n, SHAPE, seed=s.seed, labels=self.asked(n), guidance=s.guidance):
                images = step.x
                every = rarely if step.row < s.steps // 2 else often
                if step.row % every == 0 or step.row == s.steps - 1:
                    frames.append(self.picture(images, scale=2))
                bar.update()
        viz.save_gif(s.out / "reverse.gif", frames, fps=12, hold=3.0, levels=16)
        viz.save_png(s.out / "samples.png", self.picture(images, scale=4))
        return images

    @staticmethod
    def picture(images: Tensor, scale: int) -> viz.UInt8Array:
        """Ten columns, one a digit, dark ink on white."""
        names = [str(digit) for digit in range(10)]
        return viz.grid(-images, 10, scale=scale, padding=3 * scale, column_labels=names)

    def sample(self, net: UNet, labels: Tensor, first: int, guidance: float) -> Tensor:
        """Images first, first + 1, ... of the seed, one for each label."""
        images: Tensor = self.sampler(net).sample(
            len(labels),
            SHAPE,
            seed=self.settings.seed,
            first_sample=first,
            labels=labels,
            guidance=guidance,
            progress=self.settings.progress,
        )
        return images

    def quality(self, net: UNet, digits: Digits, reader: Reader, images: Tensor) -> None:
        """Guided samples are read by the SVM, unguided ones compared with the data as a whole."""
        s = self.settings
        asked = self.asked(max(s.guided, len(images)))
        more = asked[len(images) :]
        if len(more):
            more_images = self.sample(net, more, len(images), s.guidance)
            images = torch.cat([images, more_images])
        recognised = reader.share_right(images, asked)

        # Labels in the data's own proportions: with them, samples follow the data as a whole.
        some = torch.randperm(len(digits), generator=torch.Generator().manual_seed(s.seed))
        labels = digits.labels[some[: s.unguided]].to(self.device)
        unguided = self.sample(net, labels, UNGUIDED_FIRST, 1.0)
        self.report["quality"] = {
            "method": f"ddpm, {s.steps} of {s.timesteps} steps, fixed_small, x0 clipped to [-1, 1]",
            "guided_samples": len(images),
            "guidance": s.guidance,
            "recognised": recognised,
            "unguided_samples": len(unguided),
            **energy(unguided, digits.images),
        }
        self.report["missed"] = verdicts(self.report["quality"], self.say)

    def speed(self, net: UNet, seconds: float) -> None:
        with self.bar("comparing", 100, bar_format="{l_bar}{bar}| {elapsed}") as bar:
            self.report["speed"] = compare_speed(
                net,
                self.schedule,
                SHAPE,
                seed=self.settings.seed,
                first_sample=COMPARED_FIRST,
                seconds=seconds,
                bar=bar,
            )
        self.say(speed_table(self.report["speed"]))
