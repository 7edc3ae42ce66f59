"""The baselines made of other packages: OpenVINO and diffusers. Where one is missing, `Missing` says how to get it.

OV16  OpenVINO, bfloat16 hint, static shape; its output goes into ddpm_fast's fused update
OV16t the same with the sinusoids of t inside the model, as a plain conversion has them: they are computed in bfloat16,
      which cannot tell t = 999 from 1000, so its output is wrong. OV16 finds them in a float32 table instead
OV32  as OV16 with a float32 hint
D32   diffusers' DDPMPipeline, float32, on the network of the other baselines: its own UNet2DModel for the paper's
D16   the same with bfloat16 weights, channels_last
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from candidate import Candidate, Problem
from packages import Missing, package
from plain import PeerUNet, Plain, cast
from torch import Tensor, nn

from ddpm_fast import ops
from ddpm_fast.noise import make_rng


class OpenVINO(Candidate):
    """Network in OpenVINO, then `ops.ddpm_step`: the reverse step of ours, so that the network decides."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, *, time_inside: bool = False) -> None:
        self.dtype, self.time_inside = dtype, time_inside
        self.hint = {torch.bfloat16: "bf16", torch.float32: "f32"}[dtype]
        self.id = {"bf16": "OV16", "f32": "OV32"}[self.hint] + ("t" if time_inside else "")
        self.what = f"OpenVINO {self.hint}" + (", sinusoids inside" if time_inside else "")
        self.flags = ""

    def prepare(self, problem: Problem) -> None:
        if problem.device.type != "cpu":
            raise Missing("measured on CPUs only")
        openvino = package("openvino")
        self.problem = problem
        case = problem.case
        plain = problem.plain()
        network = plain if self.time_inside else _FromSinusoids(plain)
        # What t is told as, a row per timestep: [T, 1] numbers or [T, time_dim] sinusoids.
        t = torch.arange(problem.T)
        self.told = t[:, None] if self.time_inside else plain.sinusoids(t)
        time = torch.zeros(case.n, dtype=torch.int64) if self.time_inside else self.told[:1].repeat(case.n, 1)
        example = [torch.zeros(case.n, *case.shape), time]
        if problem.labels is not None:
            example.append(problem.labels)
        with torch.no_grad(), warnings.catch_warnings():
            # What a trace holds fixed is fixed here: sizes, and checks of them.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            model = openvino.convert_model(
                network, example_input=tuple(example), input=[tuple(tensor.shape) for tensor in example]
            )
        threads = torch.get_num_threads()
        options = {
            "INFERENCE_PRECISION_HINT": self.hint,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        self.compiled = openvino.Core().compile_model(model, "CPU", options)
        served = self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.request = self.compiled.create_infer_request()
        self.inputs = example
        # Shared memory: nothing is copied on the way in or out.
        for i, tensor in enumerate(example):
            self.request.set_input_tensor(i, openvino.Tensor(tensor.numpy(), shared_memory=True))
        self.m = torch.empty(case.n, *case.shape)
        self.request.set_output_tensor(0, openvino.Tensor(self.m.numpy(), shared_memory=True))
        self.t_of_row = problem.t_of_row.int()
        self.rng = make_rng(0, 0)
        self.flags = (
            f"openvino {openvino.__version__.split('-')[0]}, convert_model of {plain.what} at a static shape"
            f"{'' if self.time_inside else ', sinusoids of t from a float32 table'}, "
            + ", ".join(f"{name}={value}" for name, value in options.items())
            + f" (computes in {served}), shared memory in and out, update by ddpm_fast.ops.ddpm_step"
        )

    def step(self, row: Tensor) -> None:
        x, t, *_ = self.inputs
        told = self.told.index_select(0, self.problem.t_of_row.index_select(0, row))
        t.copy_(told.view(-1) if self.time_inside else told)
        self.request.infer()
        ops.ddpm_step(x, self.m, self.problem.table, self.t_of_row, row, self.rng)

    def predict(self, t: int, x: Tensor | None = None) -> Tensor:
        with torch.inference_mode():
            row = self.problem.look_at(t)
            self.inputs[0].copy_(self.problem.x if x is None else x)
            self.step(row)
            return self.inputs[0].clone()

    def run(self, steps: int) -> None:
        problem = self.problem
        with torch.inference_mode():
            self.inputs[0].copy_(problem.x)
            for row in range(problem.T - steps, problem.T):
                self.step(problem.rows[row : row + 1])


class _FromSinusoids(nn.Module):
    """The network as a function of x and the sinusoids of t."""

    def __init__(self, network: Plain) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t_emb: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network.at(x, t_emb, labels)


class _Wrapped(nn.Module):
    """A network as diffusers' pipelines expect one: `config`, `dtype`, `device` and an output with `.sample`."""

    def __init__(self, network: Plain, problem: Problem, dtype: torch.dtype) -> None:
        super().__init__()
        channels, *sides = problem.case.shape
        self.network, self.labels = network, problem.labels
        self.config = package("diffusers.configuration_utils").FrozenDict(
            in_channels=channels, sample_size=tuple(sides)
        )
        self.dtype, self.device = dtype, problem.device
        self.output = package("diffusers.models.unets.unet_2d").UNet2DOutput

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        t = timestep.to(sample.device).expand(sample.shape[0])
        return self.output(sample=self.network(sample, t, self.labels))


class Diffusers(Candidate):
    """`DDPMPipeline.__call__` with as many inference steps as asked for, from x_T to images."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.id = {torch.float32: "D32", torch.bfloat16: "D16"}[dtype]
        self.what = f"diffusers DDPMPipeline, {str(dtype).removeprefix('torch.')}"
        self.flags = ""

    def prepare(self, problem: Problem) -> None:
        diffusers = package("diffusers")
        self.problem = problem
        network = cast(problem.plain(), self.dtype)
        scheduler = diffusers.DDPMScheduler(
            num_train_timesteps=problem.T, beta_schedule="linear", variance_type="fixed_large", clip_sample=False
        )
        own = isinstance(network, PeerUNet) and problem.labels is None  # its pipeline knows no labels
        self.unet = network.net if own else _Wrapped(network, problem, self.dtype).eval()
        behind = "" if own else " behind UNet2DModel's interface"
        self.pipeline = diffusers.DDPMPipeline(self.unet, scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.flags = (
            f"diffusers {diffusers.__version__} DDPMPipeline, DDPMScheduler(variance_type=fixed_large, "
            f"clip_sample=False), {network.what} in {self.dtype}{behind}, "
            "state in the same dtype, output_type=pt"
        )

    def predict(self, t: int, x: Tensor | None = None) -> Tensor:
        x = self.problem.x if x is None else x
        with torch.inference_mode():
            m: Tensor = self.unet(x.to(self.dtype), torch.tensor(t)).sample.float()
        return m

    def run(self, steps: int) -> None:
        self.pipeline(batch_size=self.problem.case.n, num_inference_steps=steps, output_type="pt")
