"""denoising_diffusion_pytorch's Trainer: its signature, attributes and files over `ddpm_fast.training`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__, viz
from ..training import EMA, ImageFolder, Loop, files, loader
from ..training.images import endless
from ..training.loop import check_precision, uninterrupted
from ._lucidrains_checks import (
    check_count,
    check_fits,
    check_folder,
    check_model,
    check_numbers,
    check_step,
    device_of,
    mode_of,
)
from ._lucidrains_fid import Features, Fid, groups, inception

PARTS = ("step", "model", "opt", "ema")  # of a checkpoint; "scaler" and "version" may be missing


class Trainer:
    """Trains a diffusion model on a folder of images, with Adam, a clipped gradient and an average of the weights.

    The signature, the defaults and the files are those of denoising_diffusion_pytorch 2.3, but for `calculate_fid`,
    which is off; `device`, `fit`, `num_workers` and `fid_features` are ours. Every `save_and_sample_every` steps
    `model-N.pt` and `sample-N.png` are written to `results_folder`, N = 1, 2, ...; the real Trainer reads such files
    of ours, and this one reads its.

    Args:
        diffusion_model: a module with diffusion_model(images in [0, 1]) -> loss, `sample(batch_size=)`, `channels` (1,
            3 or 4), `image_size` and `is_ddim_sampling`: our `GaussianDiffusion`, or the real package's.
        folder: images, see `ddpm_fast.training.ImageFolder`; at least one batch of them, from 100 on without a warning.
        train_batch_size, gradient_accumulate_every: a step's gradient is that of their product; below 16 a warning.
        augment_horizontal_flip: every other image is mirrored.
        train_lr, adam_betas, max_grad_norm: of Adam, and the norm to which its gradient is scaled down.
        train_num_steps: where `train` ends, steps of a loaded checkpoint included.
        ema_update_every, ema_decay: of `ddpm_fast.training.EMA`, whose model is the one that samples are drawn with.
        save_and_sample_every, num_samples, results_folder: see above; `num_samples` is a square.
        amp, mixed_precision_type: amp=True trains in "bf16", or in "fp16" with a scaled loss (CUDA only).
        split_batches: accepted; one process has nothing to split. Started as several, it raises.
        convert_image_to: mode of Pillow with `channels` channels; None: "L", "RGB" or "RGBA".
        calculate_fid: FID at every milestone; needs pytorch_fid, and says first what it costs.
        inception_block_idx: features of 64, 192, 768 or 2048 dimensions.
        num_fid_samples: how many samples the FID is of.
        save_best_and_latest_only: `model-latest.pt`, and `model-best.pt` of the lowest FID, instead of `model-N.pt`.
        device: where to train; None: where the model is, or where that is a CPU but there is CUDA, the current GPU.
        fit: "stretch" images to the size, as the real one does, or "crop" the middle of them.
        num_workers: processes that read images; None: none for a small folder, else up to 8.
        fid_features: images (N, 3, H, W) in [0, 1] -> features (N, D), instead of Inception's.

    Attributes: model, ema, opt, ds, dl (endless iterator over batches), step, device, channels, image_size, batch_size
    and the arguments of the same names; and `losses`, ours: the loss of each step that this Trainer has taken.

    Raises ValueError and TypeError for bad arguments, FileNotFoundError for a missing folder, ImportError for a missing
    package, all before anything is written.
    """

    def __init__(
        self,
        diffusion_model: nn.Module,
        folder: str | os.PathLike[str],
        *,
        train_batch_size: int = 16,
        gradient_accumulate_every: int = 1,
        augment_horizontal_flip: bool = True,
        train_lr: float = 1e-4,
        train_num_steps: int = 100000,
        ema_update_every: int = 10,
        ema_decay: float = 0.995,
        adam_betas: tuple[float, float] = (0.9, 0.99),
        save_and_sample_every: int = 1000,
        num_samples: int = 25,
        results_folder: str | os.PathLike[str] = "./results",
        amp: bool = False,
        mixed_precision_type: str = "fp16",
        split_batches: bool = True,
        convert_image_to: str | None = None,
        calculate_fid: bool = False,
        inception_block_idx: int = 2048,
        max_grad_norm: float = 1.0,
        num_fid_samples: int = 50000,
        save_best_and_latest_only: bool = False,
        device: str | torch.device | None = None,
        fit: str = "stretch",
        num_workers: int | None = None,
        fid_features: Features | None = None,
    ) -> None:
        self.image_size = check_model(diffusion_model)
        self.channels: int = diffusion_model.channels  # type: ignore[assignment]
        self.batch_size, self.gradient_accumulate_every = train_batch_size, gradient_accumulate_every
        self.train_num_steps, self.max_grad_norm = train_num_steps, max_grad_norm
        self.save_and_sample_every, self.num_samples = save_and_sample_every, num_samples
        check_numbers(self)
        if save_best_and_latest_only and not calculate_fid:
            raise ValueError("save_best_and_latest_only=True needs calculate_fid=True, by which the best is known")
        precision = mixed_precision_type if amp else None
        self.device = device_of(diffusion_model, device)
        check_precision(precision, self.device)

        mode = mode_of(convert_image_to, self.channels)
        self.ds = ImageFolder(folder, self.image_size, horizontal_flip=augment_horizontal_flip, mode=mode, fit=fit)
        check_count(self.ds, self.batch_size)
        self.results_folder = check_folder(results_folder)
        self.calculate_fid, self.save_best_and_latest_only = calculate_fid, save_best_and_latest_only
        self.best_fid = math.inf
        if calculate_fid:
            if self.channels not in (1, 3):
                raise ValueError(f"calculate_fid is of images with 1 or 3 channels, got {self.channels}")
            _print_cost(diffusion_model, num_fid_samples, self.save_and_sample_every)
            plain = ImageFolder(folder, self.image_size, mode=mode, fit=fit)
            features = fid_features or inception(inception_block_idx, self.device)
            self.fid_scorer = Fid(plain, features, samples=num_fid_samples, batch=self.batch_size, device=self.device)
        self.model = diffusion_model.to(self.device)
        self.dl: Iterator[Tensor] = endless(loader(self.ds, self.batch_size, workers=num_workers))
        self.opt = torch.optim.Adam(self.model.parameters(), lr=train_lr, betas=adam_betas)
        self.ema = EMA(self.model, beta=ema_decay, update_every=ema_update_every)
        self._loop = Loop(
            self.model,
            self.opt,
            device=self.device,
            ema=self.ema,
            accumulate=self.gradient_accumulate_every,
            max_grad_norm=max_grad_norm,
            precision=precision,
        )
        self.step = 0
        self.losses: list[float] = []
        self.results_folder.mkdir(parents=True, exist_ok=True)

    def train(self) -> None:
        """Steps until `train_num_steps`, with a milestone every `save_and_sample_every`; a tqdm bar where it is there.

        Ctrl-C takes effect between two steps (a second one at once): weights, optimiser, average and `step` then belong
        together, so that `save` and `train` go on from there. FloatingPointError names the step whose loss or gradient
        was not finite; the weights are still those before it.
        """
        with _bar(self.step, self.train_num_steps) as bar:
            while self.step < self.train_num_steps:
                with uninterrupted():
                    loss = self._one_step()
                    self.losses.append(loss)
                    self.step += 1
                bar.set_description(f"loss: {loss:.4f}", refresh=False)
                if self.step % self.save_and_sample_every == 0:
                    self._milestone(self.step // self.save_and_sample_every)
                bar.update(1)
        self.ds.report_broken()
        print("training complete")

    def _one_step(self) -> float:
        try:
            return self._loop.step(self.dl)
        except FloatingPointError as error:
            written = sorted(self.results_folder.glob("model-*.pt"), key=lambda path: path.stat().st_mtime)
            last = f"the last checkpoint is {written[-1]}" if written else "there is no checkpoint yet"
            raise FloatingPointError(
                f"training stopped at step {self.step + 1}: {error}; the weights are those of step {self.step}, "
                f"{last}. Try a lower train_lr, and bf16 or amp=False instead of fp16"
            ) from None

    def _milestone(self, milestone: int) -> None:
        """The weights first: drawing takes long, and may be interrupted."""
        self.save("latest" if self.save_best_and_latest_only else milestone)
        self.ema.ema_model.eval()
        with torch.no_grad():
            images = torch.cat(
                [self.ema.ema_model.sample(batch_size=n) for n in groups(self.num_samples, self.batch_size)]  # type: ignore[operator]
            )
        picture = viz.grid(_opaque(images.float()) * 2 - 1, math.isqrt(self.num_samples), background=0)
        viz.save_png(self.results_folder / f"sample-{milestone}.png", picture)
        self.ds.report_broken()
        if not self.calculate_fid:
            return
        score = self.fid_scorer.score(self.ema.ema_model)
        print(f"fid_score: {score}")
        if score < self.best_fid:
            self.best_fid = score
            if self.save_best_and_latest_only:
                self.save("best")
                self.save("latest")  # again: what a resumed run has to beat is in it

    def _path(self, milestone: int | str) -> Path:
        return self.results_folder / f"model-{milestone}.pt"

    def save(self, milestone: int | str) -> None:
        """Writes `model-{milestone}.pt`, whole or not at all."""
        scaler = self._loop.scaler
        content = {
            "step": self.step,
            "model": self.model.state_dict(),
            "opt": self.opt.state_dict(),
            "ema": self.ema.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "version": f"ddpm_fast {__version__}",
        }
        if self.calculate_fid:
            content["best_fid"] = self.best_fid
        files.write(self._path(milestone), content)

    def load(self, milestone: int | str) -> None:
        """Goes back to what `model-{milestone}.pt` holds: weights, average, Adam's state and its learning rate, the
        loss scale, `step`. FileNotFoundError if there is none, ValueError, before anything is changed, if it is another
        kind of file or of another model.
        """
        path = self._path(milestone)
        if not path.is_file():
            others = ", ".join(sorted(other.name for other in self.results_folder.glob("model-*.pt"))) or "none"
            raise FileNotFoundError(f"no {path}; there are: {others}")
        content = files.read(path, self.device)
        if not isinstance(content, Mapping) or any(part not in content for part in PARTS):
            holds = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
            raise ValueError(f"{path} is not a Trainer's checkpoint: expected {', '.join(PARTS)}, got {holds}")
        check_fits(content["model"], self.model, f"{path}: model")
        check_fits(content["ema"], self.ema, f"{path}: ema")
        step = check_step(content["step"], f"{path}: step")
        try:
            self.opt.load_state_dict(content["opt"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: opt does not fit: {error}") from None
        self.model.load_state_dict(content["model"])
        self.ema.load_state_dict(content["ema"])
        self.step = step
        self.best_fid = content.get("best_fid", math.inf)
        if self._loop.scaler is not None and content.get("scaler"):
            self._loop.scaler.load_state_dict(content["scaler"])
        if "version" in content:
            print(f"loading from version {content['version']}")


def _print_cost(diffusion: nn.Module, samples: int, every: int) -> None:
    steps = getattr(diffusion, "sampling_timesteps", None) or getattr(diffusion, "num_timesteps", None)
    each = f"{samples:,} samples" if steps is None else f"{samples:,} samples of {steps} network steps each"
    hint = "" if diffusion.is_ddim_sampling else "; DDIM sampling (sampling_timesteps=) would take less"
    print(f"calculate_fid: every {every} steps {each} are drawn{hint}")


def _opaque(images: Tensor) -> Tensor:
    """RGBA images (N, 4, H, W) in [0, 1] on white, as RGB; others as they are."""
    if images.shape[1] != 4:
        return images
    color, alpha = images[:, :3], images[:, 3:]
    return color * alpha + (1 - alpha)


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def set_description(self, text: str, refresh: bool) -> None:
        pass

    def update(self, steps: int) -> None:
        pass


def _bar(done: int, total: int) -> Any:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return _NoBar()
    return tqdm(initial=done, total=total)
