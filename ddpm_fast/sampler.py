"""`Sampler`: the reverse process of a diffusion model, one table row per step, nothing of it waiting for the host.

x_T ~ N(0, I); for each row: m = model(x, t); x = ddpm_step(x, m, row).  (Ho et al. 2020, Algorithm 2, and its kin.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import inference
from .sampling.choices import choose
from .sampling.generator import Generators, drawing
from .sampling.graphs import Loops
from .sampling.inputs import (
    Labels,
    Noise,
    given_noise,
    guidance_of,
    history_of,
    labels_of,
    seed_of,
    start_state,
    whole,
)
from .sampling.loop import Layout, Plan, Start
from .sampling.model import FED_DTYPES, Model, attribute, device_of, dtype_of, eval_mode, sample_shape
from .sampling.outputs import check_output, to_output
from .sampling.progress import Progress
from .sampling.run import Run, Step
from .schedule import Schedule
from .tables.timesteps import Steps

DEFAULT_CHUNK = 16

S = TypeVar("S", bound="Sampler")


class Sampler:
    """Draws samples from a diffusion model.

    model: any callable `model(x, t)` or `model(x, t, labels)`. x is (n, *shape) in `dtype`, t int64 (n,), labels int64
        (n,). It returns a tensor like x, an object with `.sample` (diffusers), or a tuple that starts with the tensor.
        A Module runs in eval mode and is given back as it was. It must not write to x.
    schedule: a `Schedule`.
    steps, spacing, steps_offset, method, eta, prediction, variance, clip, rederive_eps, set_alpha_to_one, solver_order:
        as in `Schedule.step_table`. variance "learned" or "learned_range" says that the model returns 2C channels, the
        prediction and then the log variance or v; method "ddpm" uses these (under guidance the labelled half's),
        "ddim" and "dpmsolver++" do not.
    thresholding: dynamic thresholding in place of clip: True, a ratio, or (ratio, max_value); per sample, x0 is clipped
        to the ratio-quantile of |x0| (within [1, max_value]) and divided by it.
    like: "tutorial", "diffusers", "lucidrains" or "openai": that peer's choices wherever an argument is None. Without
        it None means DDPM over all T steps (spacing "trailing" for fewer, "linspace_open" for method "dpmsolver++"),
        eps, fixed_large, no clip, eta 0.
    time_scale: "index" tells the model t as it is, "rescaled" t * 1000 / T in float32.
    null_label: the label that means "none" for guidance; default model.null_label.
    self_condition: call `model(x, t[, labels], x_self_cond=...)` with the x0 of the row before, clipped as that row
        clipped it, zeros at the first (Chen et al. 2022, arXiv 2208.04202); default model.self_condition, else False.
    shape: the shape of one sample, (C, H, W) or (D,); default from the model where it says so.
    dtype: what the model is fed: float32, bfloat16, float16, float64; default the dtype of its parameters. The state
        stays float32.
    device: default the device of the model's parameters.
    deterministic: run the network on exactly `chunk` samples at a time (default 16), sample g of a seed always in place
        g % chunk, the rest padding; then it has the same bits for any n, split or restart on one kind of device.
    chunk: on its own, bounds how many samples the network sees at a time.
    cuda_graph: on CUDA, None captures the step in a graph and warns and runs eagerly where that fails; True raises
        instead; False never captures. A captured model's Python runs once and its kernels every step, so a model whose
        Python decides something from step to step needs False. Weights are read in place: new values loaded into them
        are seen, and weights that move are noticed. At most 4 graphs are kept; `clear_graphs` frees them.
    fused: run a network that `ddpm_fast.inference` knows (our U-Nets, diffusers' `UNet2DModel`, lucidrains' `Unet`) by
        its fused plan: `dtype` is then what the plan computes in (float32, bfloat16, float16), and the network is fed
        the float32 state. The first run of a batch and image size spends seconds on a trial. Any other model runs as it
        is: the property `fused` says whether there is a plan, `not_fused_because` why not. Weights that changed are
        read again at every run.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        *,
        steps: Steps = None,
        spacing: str | None = None,
        steps_offset: int = 0,
        method: str | None = None,
        eta: float | None = None,
        prediction: str | None = None,
        variance: str | None = None,
        clip: float | bool | None = None,
        thresholding: bool | float | tuple[float, float] | None = None,
        rederive_eps: bool | None = None,
        set_alpha_to_one: bool = True,
        solver_order: int = 2,
        like: str | None = None,
        time_scale: str | None = None,
        null_label: int | Tensor | None = None,
        self_condition: bool | None = None,
        shape: int | Sequence[int] | None = None,
        fused: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        deterministic: bool = False,
        chunk: int | None = None,
        cuda_graph: bool | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model must be callable as model(x, t), got {type(model).__name__}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule must be a ddpm_fast.Schedule, got {type(schedule).__name__}")
        if dtype is not None and dtype not in FED_DTYPES:
            known = ", ".join(str(known) for known in FED_DTYPES)
            raise ValueError(f"dtype must be one of {known}, got {dtype}")
        self._model, self.schedule, self.like = model, schedule, like
        self.choices = choose(
            schedule,
            like=like,
            steps=steps,
            spacing=spacing,
            steps_offset=steps_offset,
            method=method,
            eta=eta,
            prediction=prediction,
            variance=variance,
            clip=clip,
            thresholding=thresholding,
            rederive_eps=rederive_eps,
            set_alpha_to_one=set_alpha_to_one,
            solver_order=solver_order,
            time_scale=time_scale,
        )
        self.null_label, self.shape, self.dtype, self.deterministic = null_label, shape, dtype, deterministic
        if self_condition is None:
            self_condition = attribute(model, "self_condition") is True
        if not isinstance(self_condition, bool):
            raise TypeError(f"self_condition must be True, False or None, got {self_condition!r}")
        self.self_condition = self_condition
        self.device = None if device is None else _indexed(torch.device(device))
        if chunk is None and deterministic:
            chunk = DEFAULT_CHUNK
        self.chunk = None if chunk is None else whole("chunk", chunk, 1)
        self.last_seed: int | None = None
        self._not_fused = inference.unknown_reason(model) if fused else "fused=True was not asked for"
        if self.fused and self._dtype() not in inference.DTYPES:
            known = ", ".join(str(known) for known in inference.DTYPES)
            raise ValueError(f"fused=True computes in {known}, got dtype {self._dtype()}")
        self._plans: dict[tuple[torch.device, torch.dtype], Plan] = {}
        self._loops = Loops(cuda_graph)

    @classmethod
    def from_pretrained(
        cls: type[S],
        folder: str | os.PathLike[str],
        *,
        variant: str | None = None,
        fused: bool | None = None,
        **overrides: Any,
    ) -> S:
        """A sampler of a `DDPMUNet` from the folder of a saved diffusers pipeline, with that pipeline's choices.

        folder: what `DDPMPipeline.save_pretrained` writes, or config.json, weights and scheduler_config.json side by
            side. A name on the Hub is to be downloaded first. variant: as "fp16" in diffusion_pytorch_model.fp16.*.
        fused: None is True where `dtype` allows it; as in `Sampler`, a network without a fused plan runs as it is.
        overrides: any argument of `Sampler`; they win over what the scheduler's config says. With another `method` the
            config is read as the scheduler of that method would read it.
        steps: default all T, 50 for a DDIMPipeline, 20 for DPM-Solver++. dtype: default float32, whatever the file has.
            like: default "diffusers", so images come out in [0, 1] unless `sample(output=)` says otherwise.
        Covered schedulers: DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler (dpmsolver++, order 1 or 2,
        midpoint). Raises FileNotFoundError or ValueError naming the file, and the key or block, that cannot be served.
        """
        from .interop._folders import sampler_of  # only those who load a folder need it

        return sampler_of(cls, folder, variant, fused, overrides)

    # -- what is asked for ----------------------------------------------------------------------------------------

    @property
    def model(self) -> Model:
        """The network, as it was given."""
        return self._model

    @property
    def fused(self) -> bool:
        """Whether a fused plan runs in place of the model."""
        return self._not_fused is None

    @property
    def not_fused_because(self) -> str | None:
        """Why the model runs as it is; None when a fused plan runs."""
        return self._not_fused

    @property
    def compiled(self) -> inference.Compiled | None:
        """The fused plan, with its `describe`; None without one, and before the first run."""
        return next((plan.fused for plan in reversed(self._plans.values())), None)

    @property
    def timesteps(self) -> list[int]:
        """The timestep that each row leaves, highest first."""
        return [int(t) for t in self.choices.steps.timesteps]

    def __len__(self) -> int:
        """The number of reverse steps."""
        return len(self.choices.steps)

    def __repr__(self) -> str:
        like = f", like={self.like!r}" if self.like else ""
        return f"Sampler({type(self.model).__name__}, {self.schedule!r}, {self.choices}{like})"

    def clear_graphs(self) -> None:
        """Free the CUDA graphs of earlier calls and their memory."""
        self._loops.clear()

    def sample(
        self,
        n: int,
        shape: int | Sequence[int] | None = None,
        *,
        seed: int | None = None,
        first_sample: int = 0,
        labels: Labels | None = None,
        guidance: float = 1.0,
        x: Tensor | None = None,
        start: int = 0,
        noise: Noise | None = None,
        x0_prev: Tensor | None = None,
        generator: Generators | None = None,
        output: str | None = None,
        progress: bool | None = None,
    ) -> Any:
        """n samples, (n, *shape) float32 in the model's range unless `output` says otherwise.

        n, shape: how many, and the shape of one: (C, H, W), (D,), ..., or an image side for a model with in_channels.
        seed, first_sample: the noise of sample i is a function of (seed, first_sample + i) and of nothing else, so rank
            r of R can draw its own share with first_sample. None draws a seed from torch's generator. The seed used is
            in `last_seed`, None with generator.
        labels: an int, n ints, or a tensor (n,); guidance w: m = m_none + w (m_labels - m_none), in one pass over 2n.
        x, start: the state to start from, and how many rows it has behind it: x alone is x_T; both resume a run.
        x0_prev: the x0 of row start - 1, which method "dpmsolver++" and a self-conditioned model need too; see
            `Step.state`.
        noise: the steps' normals instead of the seed's: a tensor (len(sampler), n, *shape) or, from row `start` on,
            (len(sampler) - start, n, *shape); or a function (row, t) -> tensor (n, *shape). The last row uses none.
        generator: a torch.Generator, or a list of n, instead of seed and noise: x_T and then the noise of each row that
            adds any are torch.randn of it, in the dtype of the model, as diffusers' pipelines draw them.
        output: "model" (float32, unclamped; the default without `like`), "unit" ((x + 1)/2 in [0, 1]),
            "unit_unclamped", "uint8" (rounded half to even), "pil" (a list of Pillow images).
        progress: a tqdm bar; None shows one in a terminal.
        Raises ValueError or TypeError before anything runs for arguments that cannot be served, in the first step for a
        model that returns the wrong thing, and RuntimeError naming the row when a value stops being finite.
        """
        run = self._prepare(n, shape, seed, first_sample, labels, guidance, x, start, noise, x0_prev, generator)
        output = self.choices.output if output is None else output
        check_output(output, run.layout.shape)
        if n:
            with run.open(), run.running(), Progress(len(self) - start, progress, run.check) as bar:
                for row, rows in run.portions(bar.shown):
                    run.advance(row, rows)
                    bar.advance()  # only a bar that is shown counts, and then it is one row
                run.check()
                result = run.x()
        else:
            result = torch.zeros(0, *run.layout.shape, dtype=torch.float32, device=run.plan.device)
        with torch.inference_mode(False):
            return to_output(result, output)

    def stream(
        self,
        n: int,
        shape: int | Sequence[int] | None = None,
        *,
        seed: int | None = None,
        first_sample: int = 0,
        labels: Labels | None = None,
        guidance: float = 1.0,
        x: Tensor | None = None,
        start: int = 0,
        noise: Noise | None = None,
        x0_prev: Tensor | None = None,
        generator: Generators | None = None,
    ) -> Iterator[Step]:
        """The same run, row by row: yields a `Step` after each. Arguments as in `sample`; bad ones raise at once."""
        given = (labels, guidance, x, start, noise, x0_prev, generator)
        return self._prepare(n, shape, seed, first_sample, *given, x0=True).stream()

    # -- how it is done -------------------------------------------------------------------------------------------

    def _prepare(
        self,
        n: int,
        shape: int | Sequence[int] | None,
        seed: int | None,
        first_sample: int,
        labels: Labels | None,
        guidance: float,
        x: Tensor | None,
        start: int,
        noise: Noise | None,
        x0_prev: Tensor | None = None,
        generator: Generators | None = None,
        x0: bool = False,
    ) -> Run:
        """Every argument checked and put where it will be used; nothing has run yet."""
        n = whole("n", n, 0)
        first_sample = whole("first_sample", first_sample, 0, 2**63 - 1 - n)
        start = whole("start", start, 0, len(self))
        if shape is None and self.shape is None and isinstance(x, Tensor) and x.dim() > 1:
            sizes = tuple(x.shape[1:])
        else:
            sizes = sample_shape(self.model, self.shape if shape is None else shape)
        device = self._device(x)
        self._loops.check(device)
        state = start_state(x, start, n, sizes, device)
        history = history_of(x0_prev, self.choices.steps, self.self_condition, start, n, sizes, device)
        source, draw = given_noise(noise, start, len(self), n, sizes, device), None
        if generator is not None:
            if seed is not None or noise is not None or first_sample:
                raise ValueError("generator draws all noise: it excludes seed, first_sample and noise; pass it alone")
            draw = drawing(generator, n, sizes, dtype_of(self.model) if self.fused else self._dtype(), device)
        null_label = attribute(self.model, "null_label") if self.null_label is None else self.null_label
        rows = labels_of(labels, n, device, attribute(self.model, "num_classes"), null_label is not None)
        null = guidance_of(guidance, rows, null_label)
        self.last_seed = None if draw is not None else seed_of(seed)
        chunk = max(n, 1) if self.chunk is None else self.chunk if self.deterministic else min(self.chunk, max(n, 1))
        layout = Layout(
            n=n,
            shape=sizes,
            label=None if rows is None else (tuple(rows.shape[1:]), rows.dtype),
            guided=null is not None,
            noise=source is not None or draw is not None,
            x0=x0,
            chunk=chunk,
            offset=first_sample % chunk if self.deterministic else 0,
        )
        begin = Start(self.last_seed or 0, first_sample, start, state, history, rows, null, float(guidance))
        return Run(self._plan(device), layout, begin, source, draw, self._loops, self.deterministic)

    def _device(self, x: Tensor | None) -> torch.device:
        of_model = device_of(self.model)
        if self.device is not None:
            if of_model is not None and of_model != self.device:
                raise ValueError(f"device={self.device}, but the model is on {of_model}; move it there with model.to()")
            return self.device
        if of_model is not None:
            return of_model
        return x.device if isinstance(x, Tensor) else _indexed(torch.get_default_device())

    def _dtype(self) -> torch.dtype:
        return dtype_of(self.model) if self.dtype is None else self.dtype

    def _plan(self, device: torch.device) -> Plan:
        key = (device, self._dtype())
        if key in self._plans:
            plan = self._plans[key]
            if plan.fused is not None:
                with eval_mode(self.model):
                    plan.fused.refresh_if_changed()
            return plan
        t_model = torch.tensor(self.choices.steps.timesteps, device="cpu")
        if self.choices.time_scale == "rescaled":
            t_model = t_model.float() * (1000.0 / self.schedule.num_timesteps)
        with torch.inference_mode(False), eval_mode(self.model):
            steps = self.choices.steps.to(device)
            t_model = t_model.to(device)
            dtype, compiled = self._dtype(), None
            if self.fused and isinstance(self.model, nn.Module):
                compiled = inference.compile(
                    self.model, dtype=dtype, timesteps=t_model, deterministic=self.deterministic
                )
                dtype = torch.float32
            variance = self.choices.variance if self.choices.twice_the_channels else None
            asked = (self.choices.thresholding, compiled, variance, self.choices.method, self.self_condition)
            self._plans[key] = Plan(self.model, steps, t_model, dtype, *asked)
        return self._plans[key]


def _indexed(device: torch.device) -> torch.device:
    """Device cuda as cuda:0, or whichever is current, so that devices can be compared."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
