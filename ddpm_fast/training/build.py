"""What a `Trainer` makes of its arguments, and whether model, schedule and data go together."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

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
        return _asked(asked)
    if own.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device(own.type) if launched() > 1 else own


def _asked(device: torch.device | str) -> torch.device:
    """ValueError for a device that is not there, or that holds no values."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f'device must be as "cpu", "cuda" or "cuda:1", got {device!r}') from None
    count = torch.cuda.device_count() if found.type == "cuda" else 1
    if found.type == "meta" or (found.index or 0) >= count:
        have = f"{torch.cuda.device_count()} CUDA devices" if found.type == "cuda" else "no values on it"
        raise ValueError(f"device {str(found)!r} cannot be trained on: there are {have} here")
    return found


def optimizer_of(
    parameters: list[nn.Parameter],
    settings: Settings,
    make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None,
) -> torch.optim.Optimizer:
    """AdamW, or what `make` makes. ValueError and TypeError for something else than an optimiser of these."""
    if make is None:
        return adamw(parameters, settings)
    wanted = "optimizer must be a function from parameters to an optimizer, as lambda p: torch.optim.Adam(p)"
    if not callable(make):
        raise TypeError(f"{wanted}, got {type(make).__name__}")
    made = make(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise TypeError(f"{wanted}; it gave {type(made).__name__}")
    known = {id(parameter) for parameter in parameters}
    if not all(id(parameter) in known for group in made.param_groups for parameter in group["params"]):
        raise ValueError("optimizer must be of the parameters that it is given; it has others than the model's")
    return made


def adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Fused where torch has it for these parameters. Its fused kernels walk through memory without looking at strides:
    of a parameter that is a part of a larger tensor they change the rest.
    """
    options: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "weight_decay": settings.weight_decay}
    if all(parameter.is_floating_point() and _is_dense(parameter) for parameter in parameters):
        with contextlib.suppress(RuntimeError):
            return torch.optim.AdamW(parameters, fused=True, **options)
    return torch.optim.AdamW(parameters, **options)


def _is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie side by side, in whatever order."""
    return (
        tensor.numel() == 0
        or 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        == tensor.numel()
    )


def check_values(model: nn.Module) -> None:
    """ValueError for a model whose parameters are not there yet, or cannot be trained as they are."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers):
        raise ValueError(
            f"model must be the network itself, got it in a {type(model).__name__}: give model.module (several GPUs "
            "are a matter of torchrun)"
        )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        wrong = None
        if nn.parameter.is_lazy(tensor):
            wrong = "has no shape yet: call the model once on one image, lazy layers learn it from that"
        elif tensor.is_meta:
            wrong = "is on the meta device and has no values: make the model on a real one, or load its weights"
        elif tensor.is_inference():
            wrong = "was made under torch.inference_mode and cannot be trained: make the model outside it"
        elif tensor.requires_grad and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            wrong = "is expanded, so that its elements share memory: make it contiguous"
        if wrong is not None:
            raise ValueError(f"model cannot be trained: {name} {wrong}")


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
