"""The time embeddings of all blocks: for every timestep of a schedule beforehand, for other t in one product."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .network import TimeTable


def table(time: TimeTable, timesteps: Tensor) -> Tensor:
    """temb of each of timesteps [rows]: float32 [rows, columns]; multiplied in float64 and rounded once.

    For a network whose labels go through the mlp's SiLU there is no such table: see `embeddings`.
    """
    e = _embedded(time, timesteps.to(time.weight.device), torch.float64)
    return torch.addmm(time.bias.double(), e, time.weight.double().T).float().contiguous()


def embed(time: TimeTable, t: Tensor, labels: Tensor | None, out: Tensor) -> None:
    """temb of t (N,) into out, float32 [N, columns]. labels (N,): where they go through the mlp's SiLU, else unused."""
    torch.addmm(time.bias, _embedded(time, t, torch.float32, labels), time.weight.T, out=out)


def embeddings(time: TimeTable, timesteps: Tensor) -> Tensor:
    """e of each of timesteps [rows], float32 [rows, time_dim]: what `finish` makes temb of."""
    assert time.mlp is not None
    return _through(time, timesteps.to(time.weight.device), torch.float64).float()


def finish(time: TimeTable, e: Tensor, labels: Tensor, out: Tensor) -> None:
    """temb of embeddings e [N, time_dim] and labels (N,), into out, float32 [N, columns]."""
    assert time.labels is not None
    torch.addmm(time.bias, F.silu(e + time.labels.index_select(0, labels)), time.weight.T, out=out)


def _through(time: TimeTable, t: Tensor, dtype: torch.dtype) -> Tensor:
    assert time.mlp is not None
    w1, b1, w2, b2 = (tensor.to(dtype) for tensor in time.mlp)
    act = F.silu if time.mlp_act == "silu" else F.gelu
    return torch.addmm(b2, act(torch.addmm(b1, time.features(t).to(dtype), w1.T)), w2.T)


def _embedded(time: TimeTable, t: Tensor, dtype: torch.dtype, labels: Tensor | None = None) -> Tensor:
    """What is multiplied by time.weight."""
    if time.mlp is None:
        return time.features(t).to(dtype)
    e = _through(time, t, dtype)
    if labels is not None and time.labels is not None:
        e = e + time.labels.index_select(0, labels).to(dtype)
    return F.silu(e)
