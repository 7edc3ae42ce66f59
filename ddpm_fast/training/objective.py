"""The training objective: from a batch of images to the loss of one forward pass (Ho et al. 2020, Algorithm 1).

    t ~ uniform;  x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) eps;  L = mean_n w(t_n) mean_e loss(model(x_t, t) - target)

Everything drawn is keyed by (seed, position of the image), see `streams`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..noise import STREAM_FLIP, STREAM_LABEL_DROPOUT
from ..sampling.model import prediction as checked_output
from ..schedule import Schedule
from . import streams

PREDICTIONS = ("eps", "x0", "v")
LOSSES = ("mse", "l1", "huber")


class Objective:
    """`objective(model, images, labels, rng, told)` is the mean loss of a batch, a scalar.

    Args:
        schedule: the noising.
        prediction: what the network gives, "eps", "x0" or "v" = sqrt(ab) eps - sqrt(1 - ab) x0.
        loss, huber_delta, offset_noise: as in `ops.noise_mse` and `ops.q_sample`.
        weights: [T] by timestep (`weights.loss_weights`), or None.
        label_dropout, null_label: with this probability a label becomes the null label.
        self_condition: the network is called with `x_self_cond=`: zeros, or if `told`, the x0 that it itself estimates
            from zeros, without a gradient (Chen et al. 2022, arXiv 2208.04202).
        clip: that estimate is clipped to [-1, 1].
        flip: every other image is mirrored.
        dtype: what the network is fed.
        stored: whether q_sample writes the target beside x_t, for the loss to read; otherwise the loss draws the noise
            a second time, which is less memory and slower on a CPU. The loss has the same bits. None: on a CPU.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        prediction: str = "eps",
        loss: str = "mse",
        huber_delta: float = 1.0,
        offset_noise: float = 0.0,
        weights: Tensor | None = None,
        label_dropout: float = 0.0,
        null_label: Any = None,
        self_condition: bool = False,
        clip: bool = True,
        flip: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        stored: bool | None = None,
    ) -> None:
        self.schedule, self.prediction, self.dtype = schedule, prediction, dtype
        self.label_dropout, self.null_label = label_dropout, null_label
        self.self_condition, self.clip, self.flip = self_condition, clip, flip
        self._noise: dict[str, Any] = {"offset_noise": float(offset_noise)}
        self._loss: dict[str, Any] = {"loss": loss, "huber_delta": huber_delta}
        self._table = schedule.noising_table(device)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self._weights = None if weights is None else weights.to(device, wide)
        if stored is None:
            stored = torch.device(device).type == "cpu"
        # A target that is rounded when it is stored would be another one; x0 is there already.
        self._stored = stored and dtype in (torch.float32, torch.float64) and prediction != "x0"

    def __call__(
        self, model: Callable[..., Any], images: Tensor, labels: Tensor | None, rng: Tensor, told: bool = False
    ) -> Tensor:
        """The mean over the batch of the weighted loss, float32 (float64 for float64 networks).

        images: (N, ...), uint8 or float32 in the model's range. labels: int64 (N,) or None. rng: int64[2] (seed,
        position of the first image). told: whether a self-conditioned network is told its own estimate.
        """
        n = images.shape[0]
        if self.flip:
            mirrored = streams.coins(rng, n, STREAM_FLIP, 0.5)
            images = torch.where(mirrored.view(n, *[1] * (images.dim() - 1)), images.flip(-1), images)
        if labels is not None and self.label_dropout > 0:
            dropped = streams.coins(rng, n, STREAM_LABEL_DROPOUT, self.label_dropout)
            labels = labels.masked_fill(dropped, self.null_label)
        t = streams.timesteps(rng, n, self.schedule.num_timesteps)
        x0 = _float64(images) if self.dtype == torch.float64 else images
        x_t, against = self._noised(x0, t, rng)
        m = self.predict(model, x_t, t, labels, told)
        weight = None if self._weights is None else self._weights[t]
        return ops.noise_mse(m, **against, **self._loss, weight=weight)

    def _noised(self, x0: Tensor, t: Tensor, rng: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """x_t, and what the loss is against."""
        if self._stored:
            kind: Any = self.prediction
            x_t, target = ops.q_sample(
                x0, t, self._table, rng=rng, target=kind, dtype=self.dtype, **self._noise
            )  # fmt: skip
            return x_t, {"target": "x0", "x0": target}
        x_t = ops.q_sample(x0, t, self._table, rng=rng, dtype=self.dtype, **self._noise)
        return x_t, {"target": self.prediction, "x0": x0, "t": t, "table": self._table, "rng": rng, **self._noise}

    def predict(
        self, model: Callable[..., Any], x_t: Tensor, t: Tensor, labels: Tensor | None, told: bool = False
    ) -> Tensor:
        """What the network makes of x_t, after its own estimate of x0 where it is `told` that."""
        given = (x_t, t) if labels is None else (x_t, t, labels)
        if not self.self_condition:
            return _output(model(*given), x_t)
        estimate = torch.zeros_like(x_t)
        if told:
            with torch.no_grad():
                estimate = self._estimate(_output(model(*given, x_self_cond=estimate), x_t), x_t, t)
            torch.clear_autocast_cache()  # of weights that were cast without a gradient
        return _output(model(*given, x_self_cond=estimate), x_t)

    def _estimate(self, m: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that a prediction means, in float32, then in the dtype that the network is fed."""
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        m, x = m.to(wide), x_t.to(wide)
        signal, noise = self._table.to(wide)[t].view(len(t), 2, *[1] * (x.dim() - 1)).unbind(1)
        if self.prediction == "eps":
            m = (x - noise * m) / signal
        elif self.prediction == "v":
            m = signal * x - noise * m
        return (m.clamp(-1, 1) if self.clip else m).to(x_t.dtype)


def _float64(images: Tensor) -> Tensor:
    """float64 networks are for checks: no kernel reads bytes into float64."""
    return images.double() / 127.5 - 1 if images.dtype == torch.uint8 else images.double()


def _output(output: Any, x_t: Tensor) -> Tensor:
    """What the network returned, as a tensor like x_t."""
    m = checked_output(output, x_t)
    return output if isinstance(output, Tensor) else m
