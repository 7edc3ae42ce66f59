"""The layers of fused plans for compiled_code.py: what a plan on a GPU would choose among, each on a few images.

A candidate is chosen for the batch of a real run and executed on fewer images: the same compiled code, for nothing in
it depends on their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_fast.inference.candidate import Candidate, Frame, Packs, Place
from ddpm_fast.inference.network import Buffer, Conv, Layer, Linear, Norm, Output, RMSNorm, Slice, Up

GPUS = {90: (132, 90), 80: (108, 80)}
"""Processors and capability of an H100 and an A100, for which the candidates are chosen."""
GUARD = 55.0
COLUMNS, FIRST = 4096, 32  # of the time table, and where a layer's begin
# Norm of the error over the norm of the result: inputs and weights are exact in the dtype, so this is one rounding of
# the result and, in float32, products of three halves of the digits.
BOUNDS = {torch.float32: 3e-6, torch.bfloat16: 2.5e-3, torch.float16: 3.2e-4}


@dataclass(frozen=True)
class LayerCase:
    """kind: temb, pooled, residual (3x3), up, doubled, linear, norm, rms, output. batch: that candidates are chosen
    for; images: executed. image: the layer reads the image itself."""

    name: str
    kind: str
    batch: int
    images: int
    side: int
    channels: int
    columns: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def layer(self) -> Layer:
        """Random weights that are exact in the dtype."""
        source = Slice(Buffer("b", self.channels, 0), 0, self.channels)
        target = Slice(Buffer("c", self.columns, 0), 0, self.columns)
        bias, weight = _randn(self.columns, seed=1), self._weight()
        match self.kind:
            case "up":
                return Up(self.name, weight, bias, source, target)
            case "linear":
                return Linear(self.name, weight, bias, source, target, residual=target)
            case "norm":
                return Norm(self.name, _randn(self.columns, seed=2), bias, source, target, 32, 1e-5, modulation=FIRST)
            case "rms":
                return RMSNorm(self.name, _randn(self.columns, seed=2), source, target, 1e-12, residual=target)
            case "output":
                return Output(self.name, weight, bias, source)
            case _:
                return Conv(
                    self.name,
                    weight,
                    bias,
                    None if self.channels < 16 else source,
                    target,
                    silu=self.kind in ("temb", "pooled"),
                    temb=FIRST if self.kind == "temb" else None,
                    pooled=target if self.kind == "pooled" else None,
                    residual=target if self.kind == "residual" else None,
                    resample="up" if self.kind == "doubled" else "none",
                )

    def _weight(self) -> Tensor:
        shapes: dict[str, tuple[int, ...]] = {"up": (self.channels, self.columns, 2, 2)}
        shapes |= {"linear": (self.columns, self.channels)}
        weight = _randn(*shapes.get(self.kind, (self.columns, self.channels, 3, 3)), seed=3)
        if self.kind == "doubled":  # so few digits that sums of four taps are exact, too
            return (weight * 4).round() / 64
        return (weight / math.sqrt(9 * self.channels)).to(self.dtype).float()

    def candidates(self, capability: int) -> list[Candidate]:
        """Those of a plan on a GPU of this capability, most promising first."""
        from ddpm_fast.inference.gpu_layers import listed

        return listed(self.layer, self.batch, self.side, self.side, self.dtype, *GPUS[capability])

    def error(self, candidate: Candidate) -> tuple[float, str | None]:
        """Executes a candidate (within `ptx.launches`): the relative error of its result against float64, and what is
        wrong, in one line, or None."""
        layer, run = self.layer, _Run(self)
        candidate.prepare(layer, run.place)(run.frame)
        expected = run.exact(layer)
        got = run.result.double()
        error = float((got - expected).norm() / expected.norm())
        bound = BOUNDS[torch.float32 if self.kind == "output" else self.dtype]
        if not error < bound:
            return error, f"relative error {error:.3g}, allowed {bound:.3g}"
        if run.pooled is not None and not torch.equal(
            run.pooled, F.max_pool2d(run.result.float(), 2).permute(0, 2, 3, 1).to(run.pooled.dtype)
        ):
            return error, "the pooled target is not the 2x2 maximum of the target"
        return error, run.beside()


class _Run:
    """The arrays of one execution: NaN beside what is read, guards beside what is written."""

    def __init__(self, case: LayerCase) -> None:
        n, side, dtype, self.case = case.images, case.side, case.dtype, case
        scale = 2 if case.kind in ("up", "doubled") else 1

        def beside(channels: int, size: int, fill: float) -> Tensor:
            return torch.full((n + 2, size, size, channels + 32), fill, dtype=dtype)[1:-1, ..., 16 : 16 + channels]

        is_image = case.channels < 16
        self.x = _randn(n, case.channels if is_image else 3, side, side, seed=4)
        self.source = self.residual = self.target = self.pooled = None
        if not is_image:
            self.source = beside(case.channels, side, math.nan).copy_(_randn(n, side, side, case.channels, seed=5))
        if case.kind in ("residual", "linear", "rms"):
            self.residual = beside(case.columns, side, math.nan).copy_(_randn(n, side, side, case.columns, seed=6))
        if case.kind != "output":
            self.target = beside(case.columns, scale * side, GUARD)
        if case.kind == "pooled":
            self.pooled = beside(case.columns, side // 2, GUARD)
        self.out = torch.full((n, case.columns, side, side), math.nan)
        rows = torch.arange(n) * 3 % 7
        table, labels = _randn(7, COLUMNS, seed=7), _randn(5, COLUMNS, seed=8)
        self.frame = Frame(self.x, self.out, table, rows, labels, (rows + 1) % 5)
        self.place = Place(
            *(n, side, side, dtype, torch.device("cpu"), self.source, self.target, self.pooled, COLUMNS, Packs()),
            self.residual,
        )

    @property
    def result(self) -> Tensor:
        """NCHW."""
        return self.out if self.target is None else self.target.permute(0, 3, 1, 2)

    def exact(self, layer: Any) -> Tensor:
        """What the layer should give, float64, NCHW."""
        seen = self.x if self.source is None else self.source.permute(0, 3, 1, 2)
        x, weight, columns = seen.double(), layer.weight.double(), self.case.columns
        temb = self.frame.temb(FIRST, 2 * columns).double()[:, :, None, None]
        if isinstance(layer, Norm):
            y = F.group_norm(x, layer.groups, weight, layer.bias.double(), layer.eps)
            y = F.silu(y * (1 + temb[:, :columns]) + temb[:, columns:])
        elif isinstance(layer, RMSNorm):
            y = F.silu(F.normalize(x, dim=1) * weight[:, None, None])
        elif isinstance(layer, Up):
            y = F.conv_transpose2d(x, weight, layer.bias.double(), stride=2)
        elif isinstance(layer, Linear):
            y = F.conv2d(x, weight[:, :, None, None], layer.bias.double())
        else:
            x = F.interpolate(x, scale_factor=2.0) if self.case.kind == "doubled" else x
            y = F.conv2d(x, weight, layer.bias.double(), padding=1)
            y = F.silu(y) if getattr(layer, "silu", False) else y
            y = y + temb[:, :columns] if self.case.kind == "temb" else y
        return y if self.residual is None else y + self.residual.double().permute(0, 3, 1, 2)

    def beside(self) -> str | None:
        """Whether anything was written beside the targets."""
        for name, view in (("target", self.target), ("pooled target", self.pooled)):
            if view is not None:
                view.fill_(GUARD)
                if not bool((torch.empty(0, dtype=view.dtype).set_(view.untyped_storage()) == GUARD).all()):
                    return f"something was written beside the {name}"
        return None


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


F32, F16 = torch.float32, torch.float16

FEW = [
    LayerCase("down1.conv1, of the image", "temb", 64, 1, 32, 3, 64),
    LayerCase("down2.conv1", "temb", 64, 1, 16, 64, 128),
    LayerCase("down2.conv2, pooled", "pooled", 64, 1, 16, 128, 128),
    LayerCase("down4.conv1 of one image, split", "temb", 1, 1, 4, 256, 512),
    LayerCase("bottleneck.conv1 at 2x2, a window", "temb", 64, 17, 2, 512, 256),
    LayerCase("up1", "up", 64, 1, 16, 128, 64),
    LayerCase("a residual", "residual", 64, 1, 16, 128, 128, F16),
    LayerCase("an upsampler", "doubled", 64, 1, 8, 128, 128),
    LayerCase("attention's output", "linear", 64, 1, 16, 256, 256),
    LayerCase("down2.conv1 in float32", "temb", 64, 1, 16, 64, 128, F32),
    LayerCase("a GroupNorm", "norm", 64, 2, 16, 128, 128),
    LayerCase("an RMSNorm", "rms", 64, 2, 16, 128, 128),
    LayerCase("conv_out", "output", 64, 2, 16, 128, 3),
]
MORE = [
    LayerCase("conv_up3.conv1", "temb", 512, 1, 8, 512, 256),
    LayerCase("conv_up1.conv1", "temb", 64, 1, 32, 128, 64, F16),
    LayerCase("bottleneck.conv2 of one image, split", "temb", 1, 1, 2, 1024, 1024),
    LayerCase("down3.conv2 of one image, pooled and split", "pooled", 1, 1, 8, 256, 256),
    LayerCase("a residual of one image, split", "residual", 1, 1, 8, 256, 256),
    LayerCase("up4 of one image, split", "up", 1, 1, 2, 1024, 512),
    LayerCase("down1.conv1 in float32", "temb", 64, 1, 32, 3, 64, F32),
    LayerCase("a window in float32", "temb", 64, 17, 2, 256, 256, F32),
    LayerCase("an upsampler in float16", "doubled", 64, 1, 8, 128, 256, F16),
    LayerCase("embeddings of 32 images a tile", "temb", 512, 33, 2, 128, 128, F16),
    LayerCase("a GroupNorm of groups of twelve", "norm", 64, 2, 16, 384, 384, F16),
    LayerCase("an RMSNorm in float32", "rms", 1, 2, 8, 384, 384, F32),
]


def executed(
    case: LayerCase, capability: int, launches: Callable[[int], Any], count: int | None
) -> list[dict[str, Any]]:
    """The first `count` candidates of a layer (None: all), executed: a row of findings each."""
    rows = []
    for candidate in case.candidates(capability)[:count]:
        with launches(capability) as done:
            error, wrong = case.error(candidate)
        hazards = [line for launch in done for line in launch.hazards]
        wrong = wrong or (hazards[0] if hazards else None)
        rows.append({"candidate": candidate.name, "error": error, "wrong": wrong, "launched": done})
    return rows
