"""The configuration of a training run: what there is to choose, with its defaults, in six sections.

The same fields are read from TOML (`[training] lr = 1e-4`) and from flags (`--lr 1e-4`); flags win. A flag is the
field's name with dashes; the first field of `data`, `model` and `schedule` has the section's own name: `--data digits`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

AUTO = "auto"
MODELS = ("unet", "ddpm", "rms")
SOURCES = ("fashion-mnist", "mnist", "cifar10", "digits", "letters", "emnist-letters", "folder", "npz", "idx")
"""Named kinds of data; anything else is a path."""


def _facts(
    text: str,
    *,
    flag: str | None = None,
    choices: tuple[str, ...] | None = None,
    least: float | None = None,
    most: float | None = None,
    may_change: bool = False,
    path: bool = False,
) -> dict[str, Any]:
    """Of a field: what it is for, the words it takes, its bounds (both included), whether a saved run may change it."""
    return {
        "text": text,
        "flag": flag,
        "choices": choices,
        "least": least,
        "most": most,
        "may_change": may_change,
        "path": path,
    }


def _option(default: Any, text: str, **facts: Any) -> Any:
    return dataclasses.field(default=default, metadata=_facts(text, **facts))


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned."""

    source: str | None = _option(
        None,
        "fashion-mnist, mnist, cifar10, digits, letters, emnist-letters, or the path of a folder of images, an .npz or "
        "an IDX file",
        flag="data",
        path=True,
    )
    data_path: str | None = _option(None, "where the files of a named data set are", path=True)
    image_size: int | None = _option(None, "height and width to bring images to, pixels", least=1)
    channels: int | None = _option(None, "1 grey, 3 colour; none: what the images have", least=1)
    fit: str = _option(
        "crop", "how an image of another shape is brought to the size", choices=("crop", "stretch", "pad")
    )
    split: str = _option("train", "part of the data set", choices=("train", "test"))
    labels: bool | str = _option(AUTO, "class-conditional; auto: where data and model have classes", choices=(AUTO,))
    flip: bool = _option(False, "mirror every other image, left to right")
    workers: int | None = _option(None, "processes that read images; none: as many as help", least=0, may_change=True)


@dataclasses.dataclass(frozen=True)
class Model:
    """What learns it."""

    kind: str = _option(
        "unet", "unet (the tutorial's), ddpm (the paper's) or rms (lucidrains')", flag="model", choices=MODELS
    )
    options: dict[str, Any] = dataclasses.field(
        default_factory=dict,
        metadata=_facts("of its class, as width=32 depth=3 or dim_mults=[1,2,4]", flag="model-options"),
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How noise is added."""

    name: str = _option("linear", "of the betas: linear, cosine, sigmoid_alphas_cumprod, ...", flag="schedule")
    timesteps: int = _option(1000, "T", least=1)
    zero_terminal_snr: bool = _option(False, "leave no signal at the last timestep; needs prediction v or x0")
    options: dict[str, Any] = dataclasses.field(
        default_factory=dict, metadata=_facts("as beta_end=0.01", flag="schedule-options")
    )


@dataclasses.dataclass(frozen=True)
class Training:
    """How it is learned; the arguments of `ddpm_fast.Trainer`."""

    images: int = _option(100_000, "to train on in all, repetitions counted", least=1, may_change=True)
    batch_size: int = _option(128, "images a step, over all processes", least=1)
    prediction: str = _option("eps", "what the model predicts", choices=("eps", "x0", "v"))
    loss: str = _option("mse", "of the prediction", choices=("mse", "l1", "huber"))
    huber_delta: float = _option(1.0, "where the huber loss turns linear")
    weighting: str | None = _option(None, "of the loss over timesteps", choices=("min-snr", "p2"))
    min_snr_gamma: float = _option(5.0, "of weighting min-snr")
    p2_gamma: float = _option(1.0, "of weighting p2")
    p2_k: float = _option(1.0, "of weighting p2")
    offset_noise: float = _option(0.0, "strength of noise that is constant over a channel", least=0)
    label_dropout: float = _option(0.1, "share of labels left out, which guidance needs", least=0, most=1)
    self_condition: bool | None = _option(None, "feed predictions back in; none: if the model asks for it")
    lr: float = _option(2e-4, "learning rate")
    betas: tuple[float, float] = _option((0.9, 0.999), "of AdamW")
    weight_decay: float = _option(0.0, "of AdamW", least=0)
    warmup: int = _option(0, "images over which the learning rate rises", least=0)
    lr_schedule: str = _option("constant", "of the learning rate", choices=("constant", "cosine"))
    accumulate: int = _option(1, "parts that a batch is cut into to save memory", least=1, may_change=True)
    max_grad_norm: float | None = _option(1.0, "gradients are scaled down to this norm")
    precision: str | None = _option(
        AUTO, "auto: bf16 where the hardware multiplies it; none: float32", choices=(AUTO, "bf16", "fp16")
    )
    ema: float | None = _option(
        0.9999, "decay of the average of the weights that samples are drawn from", least=0, most=1
    )
    ema_power: float | None = _option(0.75, "how fast that decay is reached; none: at once")
    channels_last: bool = _option(True, "memory format of the images", may_change=True)
    compile: bool = _option(False, "torch.compile the model", may_change=True)
    sync_batchnorm: bool = _option(False, "BatchNorm over the whole batch and all processes")
    seed: int = _option(0, "of everything drawn", least=0, most=2**63 - 1)
    device: str = _option(AUTO, "auto (CUDA if there is one), cpu, cuda or cuda:N", may_change=True)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What is drawn on the way, always from the same noise."""

    sample_every: int | str | None = _option(
        AUTO, "images between two grids; auto: a tenth of all", choices=(AUTO,), least=1, may_change=True
    )
    sample_rows: int = _option(4, "of a grid", least=1, most=64, may_change=True)
    sample_steps: int = _option(50, "DDIM steps", least=1, may_change=True)
    sample_guidance: float = _option(1.0, "of class-conditional models", may_change=True)
    eval_every: int | None = _option(
        None, "images between two Frechet distances; what they cost is printed first", least=1, may_change=True
    )
    eval_samples: int = _option(1000, "of a Frechet distance, in sample_steps steps each", least=4, may_change=True)


@dataclasses.dataclass(frozen=True)
class Output:
    """Where results go."""

    out: str | None = _option(None, "folder of the run; one that holds a run is gone on with", may_change=True)
    save_every: int | None = _option(
        None, "images between two checkpoints; none: every ten minutes", least=1, may_change=True
    )
    keep: int = _option(3, "checkpoints that stay", least=1, may_change=True)
    log_every: int | str = _option(
        AUTO, "images between two rows of log.csv; auto: a thousandth of all", choices=(AUTO,), least=1, may_change=True
    )
    plot: bool = _option(True, "draw loss.png", may_change=True)
    tensorboard: bool = _option(False, "write a TensorBoard log too", may_change=True)


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    data: Data = dataclasses.field(default_factory=Data)
    model: Model = dataclasses.field(default_factory=Model)
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    training: Training = dataclasses.field(default_factory=Training)
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    output: Output = dataclasses.field(default_factory=Output)

    def sections(self) -> dict[str, dict[str, Any]]:
        """{section: {field: value}}, what TOML holds."""
        return {section.name: vars(getattr(self, section.name)).copy() for section in dataclasses.fields(self)}

    def replaced(self, changes: dict[str, dict[str, Any]]) -> Config:
        """A copy with other values of some fields; tables of options are merged."""
        sections = {}
        for name, values in changes.items():
            section = getattr(self, name)
            merged = {k: {**getattr(section, k), **v} if isinstance(v, dict) else v for k, v in values.items()}
            sections[name] = dataclasses.replace(section, **merged)
        return dataclasses.replace(self, **sections)
