"""Pictures and small diffusion models of denoising_diffusion_pytorch, real and ours, for the tests of Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SIZE = 8


def pictures(folder: Path, count: int, size: int = SIZE) -> Path:
    """So many PNG files of coloured blobs."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    at = np.arange(size)
    for i in range(count):
        x, y = rng.uniform(0, size, 2)
        blob = np.exp(-((at[None] - x) ** 2 + (at[:, None] - y) ** 2) / size)
        pixels = 255 * blob[..., None] * rng.uniform(0.3, 1, 3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i:04}.png")
    return folder


def small_diffusion(package: Any, seed: int = 0, **options: Any) -> Any:
    """A GaussianDiffusion of `package` (the real one or ours) for 8x8 images, the same for the same seed."""
    torch.manual_seed(seed)
    net = package.Unet(dim=8, dim_mults=(1, 2), attn_heads=1, attn_dim_head=8, channels=options.pop("channels", 3))
    return package.GaussianDiffusion(net, **{"image_size": SIZE, "timesteps": 10, "sampling_timesteps": 3, **options})


def fixed_batches(count: int, batch: int = 4) -> Iterator[Tensor]:
    """Always the same."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        yield torch.rand(batch, 3, SIZE, SIZE, generator=generator)


class Diffusion(torch.nn.Module):
    """The least that Trainer asks for; `at` maps calls of forward to what happens there."""

    def __init__(self, at: dict[int, Callable[[Tensor], Tensor]] | None = None, channels: int = 3) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.channels, self.image_size, self.is_ddim_sampling, self.num_timesteps = channels, SIZE, False, 50
        self.at, self.calls = at or {}, 0

    def forward(self, images: Tensor) -> Tensor:
        assert self.training
        self.calls += 1
        loss = ((images.mean(dim=(0, 2, 3)) - self.weight) ** 2).mean()
        return self.at[self.calls](loss) if self.calls in self.at else loss

    def sample(self, batch_size: int) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.weight.detach().view(1, 3, 1, 1).expand(batch_size, 3, SIZE, SIZE)


def train(trainer: Any, until: int, batches: Iterator[Tensor] | None = None) -> list[float]:
    """To step `until`, on the same batches and with the same noise whoever trains; the loss of every batch."""
    seen: list[float] = []
    handle = trainer.model.register_forward_hook(lambda model, arguments, loss: seen.append(loss.item()))
    if batches is not None:
        trainer.dl = batches
    trainer.train_num_steps = until
    torch.manual_seed(3)
    trainer.train()
    handle.remove()
    return seen
