"""The time embeddings of all blocks: for every timestep of a schedule beforehand, for other t in one product."""

from __future__ import annotations

import torch
from torch import Tensor

from .network import TimeTable


def table(time: TimeTable, timesteps: Tensor) -> Tensor:
    """temb of each of timesteps [rows]: float32 [rows, columns]; multiplied in float64 and rounded once."""
    features = time.features(timesteps.to(time.weight.device)).double()
    return torch.addmm(time.bias.double(), features, time.weight.double().T).float().contiguous()


def embed(time: TimeTable, t: Tensor, out: Tensor) -> None:
    """temb of t (N,), into out, float32 [N, columns]."""
    torch.addmm(time.bias, time.features(t).float(), time.weight.T, out=out)
