"""What a `Trainer` makes of its arguments, and whether model, schedule and data go together."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

from ..sampling.model import attribute, device_of, dtype_of, eval_mode
from ..schedule import Schedule
from .data import Data
from .ema import EMA
from .generators import lent
from .objective import Objective
from .processes import launched
from .settings import Settings
from .weights import loss_weights


def device_for(model: nn.Module, asked: torch.device | str | None) -> torch.device:
    """As asked, else where the model is, else CUDA where there is any. A model that several processes have made on one
    GPU says only that it is to be a GPU: which one is a matter of their ranks.
    """
    own = device_of(model) or torch.device("cpu")
    if asked is not None:
        return torch.device(asked)
    if own.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device(own.type) if launched() > 1 else own


def adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Fused where torch has it for these parameters."""
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    with contextlib.suppress(RuntimeError):
        return torch.optim.AdamW(parameters, fused=True, **options)
    return torch.optim.AdamW(parameters, **options)


def average(model: nn.Module, settings: Settings) -> EMA | None:
    """Updated at every step, from the first on; buffers are the model's own."""
    if settings.ema is None:
        return None
    ramp = {"min_value": settings.ema} if settings.ema_power is None else {"power": settings.ema_power}
    return EMA(model, settings.ema, update_every=1, update_after_step=0, buffers="copy", **ramp)


def objective_for(
    model: nn.Module, schedule: Schedule, data: Data, settings: Settings, device: torch.device
) -> Objective:  # fmt: skip
    told = settings.self_condition
    return Objective(
        schedule,
        prediction=settings.prediction,
        loss=settings.loss,
        huber_delta=settings.huber_delta,
        offset_noise=settings.offset_noise,
        weights=loss_weights(
            schedule,
            settings.weighting,
            settings.prediction,
            min_snr_gamma=settings.min_snr_gamma,
            p2_gamma=settings.p2_gamma,
            p2_k=settings.p2_k,
        ),
        label_dropout=settings.label_dropout,
        null_label=attribute(model, "null_label"),
        self_condition=attribute(model, "self_condition") is True if told is None else told,
        clip=data.dtype == torch.uint8,
        flip=settings.flip,
        dtype=dtype_of(model),
        device=device,
    )


def check(model: nn.Module, schedule: Schedule, data: Data, settings: Settings) -> bool:
    """Whether the model is given labels. ValueError where model, schedule and data do not go together."""
    classes = attribute(model, "num_classes")
    classes = attribute(model, "num_class_embeds") if classes is None else classes
    if classes is not None and data.labels is None:
        raise ValueError(
            f"model is class-conditional ({classes} classes), and data has no labels: pass (images, labels)"
        )
    if classes is not None and data.num_classes is not None and data.num_classes > classes:
        raise ValueError(f"data has {data.num_classes} classes, and model was built for {classes}")
    if settings.label_dropout > 0:
        if classes is None:
            raise ValueError("label_dropout is for class-conditional models, and this one has no num_classes")
        if attribute(model, "null_label") is None:
            raise ValueError("label_dropout needs a label that means none: give the model an attribute null_label")
    if settings.flip and len(data.shape) != 3:
        raise ValueError(f"flip mirrors images (C, H, W), and data has shape {data.shape}")
    if schedule.has_zero_terminal_snr and settings.prediction == "eps":
        raise ValueError('a schedule of zero terminal SNR cannot be sampled with prediction "eps"; use "v" or "x0"')
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model has no parameters that require grad: there is nothing to train")
    return classes is not None


def probe(model: nn.Module, data: Data, objective: Objective, device: torch.device, conditional: bool) -> None:
    """One image through the model in eval mode: what does not fit is said now, and not after a folder was made."""
    x = torch.zeros(1, *data.shape, dtype=objective.dtype, device=device)
    t = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad(), eval_mode(model), lent(device):
        objective.predict(model, x, t, t if conditional else None)
