"""What each difference between the peers does to a sample, measured: results/differences.json, a picture, tables.

    python benchmarks/differences.py                 # 3 minutes on 2 cores; then see docs/differences.md
    python benchmarks/differences.py --page-only     # the tables of the page and the picture anew, from the JSON

Most rows have data whose best possible network is a formula (mixture.py), so that what is wrong with the samples is
the sampler's doing; some have a small network trained on real digits. Every run has the same noise. Needs scikit-learn;
rows that run diffusers itself need diffusers, the picture matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import differences_page as figures
import mixture as problem
import torch
from packages import Missing, package
from small_network import Small, digits, train
from torch import Tensor

import ddpm_fast
from ddpm_fast import Sampler, Schedule, metrics, ops
from ddpm_fast.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "differences.json"
PAGE = ROOT / "docs" / "differences.md"
SEED = 7
Row = dict[str, Any]
Density = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Size:
    """n: samples of a run, held_out of one with the trained network. T: of most schedules. few: numbers of steps;
    short, long: other T. train_steps: batches. components: of the mixture. draws: sets of true draws that show what a
    perfect sampler would get."""

    n: int = 1000
    held_out: int = 500
    T: int = 1000
    few: tuple[int, ...] = (10, 50, 250)
    short: int = 100
    long: int = 4000
    train_steps: int = 2000
    components: int = 100
    draws: int = 12


class Yardstick:
    """How far samples are from data: from `real`, in units of how far other true draws are."""

    def __init__(self, real: Tensor, draws: list[Tensor], log_density: Density | None = None) -> None:
        self.real, self.log_density = real, log_density
        distances = [metrics.energy_distance(draw, real) for draw in draws]
        self.unit = sum(distances) / len(distances)
        self.total = float(torch.cat(draws).double().var(0).sum())
        self.entropy = 0.0
        if log_density is not None:
            self.entropy = float(torch.cat([log_density(draw) for draw in draws]).mean())
        # What nothing but chance does to the figures.
        self.draws = [self.measure(draw) for draw in draws]

    def measure(self, x: Tensor) -> Row:
        """energy: the energy distance to real draws, 1 being what other real draws have on average. nats: log density
        per pixel less that of real draws; below 0 too noisy, above too smooth. spread: standard deviation, real 1."""
        spread = (float(x.double().var(0).sum()) / self.total) ** 0.5
        row = {"energy": metrics.energy_distance(x, self.real) / self.unit, "spread": spread}
        if self.log_density is not None:
            row["nats"] = (float(self.log_density(x).mean()) - self.entropy) / x[0].numel()
        return row

    def range(self) -> dict[str, list[float]]:
        """Lowest and highest of each figure over the true draws."""
        return {name: [f(row[name] for row in self.draws) for f in (min, max)] for name in self.draws[0]}


class Measurement:
    """All groups of rows; each method named in GROUPS yields the rows of one."""

    def __init__(self, size: Size, say: Callable[[str], None] = print) -> None:
        self.size, self.say = size, say
        self.mixture = problem.Mixture.of_digits(size.components)
        draws = [self.mixture.draw(size.n, 100 + i) for i in range(size.draws)]
        self.yardstick = Yardstick(self.mixture.draw(size.n, 1), draws, self.mixture.log_density)
        self.linear = Schedule.linear(size.T)
        self.net = problem.exact(self.mixture, self.linear)
        self.all_steps = (*size.few, size.T)
        held, seen = digits().split([size.held_out, 1797 - size.held_out])
        self.small = train(seen, self.linear, size.train_steps)
        generator = torch.Generator().manual_seed(2)
        orders = [torch.randperm(len(seen), generator=generator)[: size.held_out] for _ in range(size.draws)]
        self.of_digits = Yardstick(held, [seen[order] for order in orders])
        self.pictures: dict[str, Tensor] = {}

    def run(self, net: Any = None, schedule: Schedule | None = None, n: int | None = None, **choices: Any) -> Tensor:
        """(n, 64): the samples of SEED. Exact networks compute in float64."""
        net = self.net if net is None else net
        trained = isinstance(net, Small)
        n = n or (self.size.held_out if trained else self.size.n)
        dtype = torch.float32 if trained else torch.float64
        sampler = Sampler(net, schedule or self.linear, dtype=dtype, device="cpu", **choices)
        x: Tensor = sampler.sample(n, (64,), seed=SEED, output="model", progress=False)
        return x

    def row(self, name: str, steps: int, x: Tensor, net: Any = None, **more: Any) -> Row:
        yardstick = self.of_digits if isinstance(net, Small) else self.yardstick
        return {"name": name, "steps": steps, **yardstick.measure(x), **more}

    def steps_rows(self, named: dict[str, dict[str, Any]], counts: tuple[int, ...], net: Any = None) -> Iterator[Row]:
        for name, choices in named.items():
            for steps in counts:
                yield self.row(name, steps, self.run(net, steps=steps, **choices))

    # -- the groups ---------------------------------------------------------------------------------------------------

    def variance(self) -> Iterator[Row]:
        """Variances of a DDPM step."""
        named = {name: {"variance": name} for name in ("fixed_small", "fixed_large")}
        yield from self.steps_rows(named, self.all_steps)
        both = problem.exact_with_variance(self.mixture, self.linear)
        yield from self.steps_rows({"learned_range": {"variance": "learned_range"}}, self.all_steps, both)

    def method(self) -> Iterator[Row]:
        """DDIM from eta 0 to 1, and DPM-Solver++."""
        named = {f"ddim, eta {eta:g}": {"method": "ddim", "eta": eta} for eta in (0.0, 0.5, 1.0)}
        yield from self.steps_rows(named, self.size.few)
        yield from self.steps_rows({"dpmsolver++": {"method": "dpmsolver++"}}, self.size.few)

    def spacing(self) -> Iterator[Row]:
        """Lists of timesteps."""
        for name in ("trailing", "trailing_floor", "leading", "linspace", "sections"):
            named = {
                f"{name}, ddim": {"spacing": name, "method": "ddim"},
                f"{name}, ddpm": {"spacing": name, "variance": "fixed_large"},
            }
            yield from self.steps_rows(named, self.size.few[:2])

    def clip(self) -> Iterator[Row]:
        """x0 clipped or not, and what eps is afterwards."""
        T, half = self.size.T, problem.exact(self.mixture, self.linear, dtype=torch.bfloat16)
        nets = {"exact": self.net, "exact, rounded to bfloat16": half, "trained": self.small}
        ddim = {"method": "ddim", "steps": self.size.few[1]}
        ways: dict[str, dict[str, Any]] = {
            "ddpm, not clipped": {"variance": "fixed_large"},
            "ddpm, clipped": {"variance": "fixed_large", "clip": 1.0},
            "ddim, not clipped": {**ddim},
            "ddim, clipped, eps rederived": {**ddim, "clip": 1.0},
            "ddim, clipped, eps kept": {**ddim, "clip": 1.0, "rederive_eps": False},
        }
        for kind, net in nets.items():
            for way, choices in ways.items():
                x = self.run(net, **choices)
                outside = float((x.abs() > 1).double().mean())
                yield self.row(f"{kind}: {way}", choices.get("steps", T), x, net, outside=outside)

    def prediction(self) -> Iterator[Row]:
        """A network read as one that predicts something else."""
        for says in ("eps", "x0", "v"):
            for read in ("eps", "x0", "v"):
                net = problem.exact(self.mixture, self.linear, says)
                x = self.run(net, steps=self.size.few[1], method="ddim", clip=1.0, prediction=read)
                yield self.row(f"{says} read as {read}", self.size.few[1], x)

    def schedule(self) -> Iterator[Row]:
        """Named schedules."""
        for name in ("linear", "scaled_linear", "cosine", "sigmoid_alphas_cumprod", "sigmoid_betas"):
            schedule = Schedule.named(name, self.size.T)
            net, left = problem.exact(self.mixture, schedule), float(schedule.alphas_cumprod[-1])
            for steps in (self.size.few[1], self.size.T):
                x = self.run(net, schedule, steps=steps, variance="fixed_large")
                yield self.row(name, steps, x, signal_left=left)

    def other_T(self) -> Iterator[Row]:
        """Linear betas for another T, multiplied by 1000 / T or not."""
        for T in (self.size.short, self.size.long):
            for scaled in (True, False):
                schedule = Schedule.linear(T, scale_betas=scaled)
                steps = min(T, self.size.few[-1])
                x = self.run(problem.exact(self.mixture, schedule), schedule, steps=steps, variance="fixed_large")
                name = f"T = {T}, {'scaled' if scaled else 'not scaled'}"
                yield self.row(name, steps, x, signal_left=float(schedule.alphas_cumprod[-1]))

    def time(self) -> Iterator[Row]:
        """The trained network, which was told t = 0..T-1, in a process of another T."""
        for T in (self.size.short, self.size.long):
            schedule, steps = Schedule.linear(T, scale_betas=True), min(T, self.size.few[1])
            for told in ("rescaled", "index"):
                x = self.run(self.small, schedule, steps=steps, method="ddim", clip=1.0, time_scale=told)
                yield self.row(f"T = {T}, {told}", steps, x, self.small)

    def tables(self) -> Iterator[Row]:
        """float32 tables: diffusers' own scheduler beside the same steps from float64 ones."""
        schedulers = package("diffusers")
        n = min(self.size.n, 200)
        for variance in ("fixed_small", "fixed_large"):
            scheduler = schedulers.DDPMScheduler(self.size.T, variance_type=variance)
            theirs = self.by_scheduler(scheduler, n, self.size.T)
            apart = (theirs - self.run(n=n, clip=1.0, variance=variance)).abs()
            yield {"name": variance, "steps": self.size.T, "largest": float(apart.max()), "mean": float(apart.mean())}

    def by_scheduler(self, scheduler: Any, n: int, steps: int) -> Tensor:
        """A loop over diffusers' scheduler with the exact network and Sampler's noise."""
        scheduler.set_timesteps(steps)
        x = ops.normal(n, (64,), seed=SEED)
        for t in scheduler.timesteps.tolist():
            m = self.net(x, torch.tensor([t])).float()
            given = _Noise(n, t)
            if hasattr(scheduler, "_get_variance") and "variance_type" in scheduler.config:
                with given:
                    x = scheduler.step(m, t, x).prev_sample
            else:
                x = scheduler.step(m, t, x).prev_sample
        return x

    def ddim_stride(self) -> Iterator[Row]:
        """diffusers' DDIMScheduler, whose steps over an uneven list arrive beside the next timestep; ours do not."""
        schedulers = package("diffusers")
        for spacing in ("linspace", "trailing"):
            for steps in (10, 30) if self.size.T > 100 else (3,):
                options = {"timestep_spacing": spacing, "clip_sample": False}
                theirs = self.by_scheduler(schedulers.DDIMScheduler(self.size.T, **options), self.size.n, steps)
                yield self.row(f"{spacing}, diffusers", steps, theirs)
                yield self.row(f"{spacing}, ours", steps, self.run(steps=steps, spacing=spacing, method="ddim"))

    def low_precision(self) -> Iterator[Row]:
        """The best networks for images noised as diffusers does it in a low precision."""
        ways: dict[str, Any] = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
        for name, dtype in ways.items():
            net = self.net if dtype is None else problem.trained_in(self.mixture, self.linear, dtype)
            yield self.row(f"{name}, ddpm", self.size.T, self.run(net, variance="fixed_large"))
            steps = self.size.few[1]
            yield self.row(f"{name}, ddim", steps, self.run(net, steps=steps, method="ddim", spacing="leading"))

    def interpolate(self) -> Iterator[Row]:
        """Data noised to t and denoised from t or, as lucidrains' `interpolate` does, from t - 1; and as it does it,
        with [0, 1] images put in and taken out in the network's range."""
        n, T = self.size.n, self.size.T
        x0 = self.mixture.draw(n, 3).float()
        z, table = ops.normal(n, (64,), seed=SEED), self.linear.noising_table()
        choices = {"like": "lucidrains", "prediction": "eps", "dtype": torch.float64, "device": "cpu"}
        sampler = Sampler(self.net, self.linear, **choices)
        for t in (T // 100, T // 10, T // 2):
            ways = {"from t": (T - 1 - t, x0), "from t - 1": (T - t, x0), "from t - 1, [0, 1]": (T - t, (x0 + 1) / 2)}
            for name, (start, images) in ways.items():
                x = table[t, 0] * images + table[t, 1] * z
                got = sampler.sample(n, (64,), x=x, start=start, seed=SEED + 1, output="model", progress=False)
                got = got if images is x0 else got * 2 - 1
                yield self.row(f"t = {t}, {name}", T - start, got)

    def output(self) -> Iterator[Row]:
        """Pixels cut off, as OpenAI's scripts do, or rounded; and those that a sampler leaves outside [-1, 1]."""
        x = self.run(self.small, steps=self.size.few[-1], clip=1.0)
        exact = ((x + 1) * 127.5).clamp(0, 255)
        inside = (exact > 0) & (exact < 255)
        for name, pixels in (("cut off", exact.to(torch.uint8)), ("rounded", exact.round().to(torch.uint8))):
            error = (pixels.double() - exact)[inside]
            yield {"name": name, "mean": float(error.mean()), "largest": float(error.abs().max())}

    def presets(self) -> Iterator[Row]:
        """The four presets as wholes: one network, one noise; eps and the linear schedule, which all of them can."""
        kinds = {"exact": self.net, "trained": self.small}
        for kind, net in kinds.items():
            for steps in (self.size.T, self.size.few[1]):
                first: Tensor | None = None
                for like in PRESETS:
                    # A network that is told the index; at T = 1000 a rescaled time is the same.
                    choices = {"like": like, "prediction": "eps", "time_scale": "index"}
                    x = self.run(net, steps=None if steps == self.size.T else steps, **choices)
                    first = x if first is None else first
                    apart = (x - first).abs()
                    measured = {"largest": float(apart.max()), "mean": float(apart.mean())}
                    yield self.row(f"{kind}: {like}", steps, x, net, **measured)
                    if kind == "trained":
                        self.pictures[f"{like}, {steps} steps"] = x[:12]


GROUPS = (
    "presets", "variance", "method", "spacing", "clip", "prediction", "schedule", "other_T", "time", "tables",
    "ddim_stride", "low_precision", "interpolate", "output",
)  # fmt: skip


class _Noise:
    """Puts Sampler's noise of timestep t where diffusers' DDPMScheduler draws its own."""

    def __init__(self, n: int, t: int) -> None:
        self.z = ops.normal(n, (64,), seed=SEED, stream=1 + t)

    def __enter__(self) -> None:
        self.module = sys.modules["diffusers.schedulers.scheduling_ddpm"]
        self.theirs = self.module.randn_tensor  # type: ignore[attr-defined]
        self.module.randn_tensor = lambda *_, **__: self.z  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        self.module.randn_tensor = self.theirs  # type: ignore[attr-defined]


def measure(size: Size, say: Callable[[str], None] = print) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What differences.json holds, and samples of the presets to look at."""
    began = time.perf_counter()
    measurement = Measurement(size, say)
    groups: dict[str, list[Row]] = {}
    for name in GROUPS:
        try:
            groups[name] = list(getattr(measurement, name)())
        except Missing as missing:
            say(f"{name}: {missing}")
            groups[name] = []
        say(f"{name}: {len(groups[name])} rows, {time.perf_counter() - began:.0f} s")
    versions = {"ddpm_fast": ddpm_fast.__version__, "torch": torch.__version__, "python": platform.python_version()}
    result = {
        "schema": 1,
        "size": dataclasses.asdict(size),
        "seed": SEED,
        "versions": versions,
        "real": {"mixture": measurement.yardstick.range(), "digits": measurement.of_digits.range()},
        "groups": groups,
    }
    return json.loads(json.dumps(result, allow_nan=False)), measurement.pictures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--page-only", action="store_true", help="only write the tables of the page, from the JSON")
    arguments = parser.parse_args()
    if not arguments.page_only:
        torch.set_num_threads(2)
        result, pictures = measure(Size())
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        figures.picture(result, pictures, RESULT.with_suffix(".png"))
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    PAGE.write_text(figures.filled(PAGE.read_text(encoding="utf-8"), result), encoding="utf-8")


if __name__ == "__main__":
    main()
