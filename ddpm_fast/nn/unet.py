"""The tutorial U-Net: the module of the "DDPM from scratch" tutorials, with `add_bias_temb` inside.

State-dict keys, construction order (so equal torch seeds give equal weights) and the positional
arguments are those of the tutorial; weights trained there load here and the other way round.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .convolution import conv3x3, conv_transpose2x2
from .labels import check_labels

Device = torch.device | str | int | None


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep: [sin(t f_i), cos(t f_i)], f_i = 10000^(-i / (h - 1)), i = 0..h-1.

    h = time_dim / 2; t is (N,), any real dtype; the result is fp32 (N, time_dim). No parameters and
    no buffers: casting a module to bf16 must not round the frequencies.
    """

    def __init__(self, time_dim: int) -> None:
        super().__init__()
        if time_dim < 4 or time_dim % 2:
            raise ValueError(f"time_dim must be an even number of at least 4, got {time_dim}")
        self.time_dim = time_dim

    def forward(self, t: Tensor) -> Tensor:
        half = self.time_dim // 2
        rate = -(math.log(10000) / (half - 1))
        frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * rate)
        angles = t.unsqueeze(-1).float() * frequencies
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)


class ConvBlock(nn.Module):
    """h = SiLU(BN(conv1(x))) + W t_emb + b;  y = SiLU(BN(conv2(h))); 3x3 convolutions.

    x (N, in_channels, H, W), t_emb (N, time_dim) -> (N, out_channels, H, W), all of one dtype.
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, device: Device = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, device=device)
        self.norm1 = nn.BatchNorm2d(out_channels, device=device)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, device=device)
        self.norm2 = nn.BatchNorm2d(out_channels, device=device)
        self.time_mlp = nn.Linear(time_dim, out_channels, device=device)

    def forward(self, x: Tensor, t_emb: Tensor) -> Tensor:
        temb = self.time_mlp(t_emb)
        h = _norm_silu(conv3x3(x, self.conv1), self.norm1, temb)
        return _norm_silu(conv3x3(h, self.conv2), self.norm2)


def _norm_silu(h: Tensor, norm: nn.BatchNorm2d, temb: Tensor | None = None) -> Tensor:
    """SiLU(norm(h)) + temb; one op where the norm takes the statistics of the batch, and is as it was made.

    On a CPU, that is: on a GPU the op has not been measured against cuDNN's norm yet.
    """
    batch = norm.training or norm.running_mean is None
    hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks, norm._backward_pre_hooks)
    if h.device.type != "cpu" or not batch or type(norm) is not nn.BatchNorm2d or norm.momentum is None or any(hooks):
        h = norm(h)
        return F.silu(h) if temb is None else ops.add_bias_temb(h, None, temb, act="silu")
    if norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    running = (norm.running_mean, norm.running_var) if norm.track_running_stats else (None, None)
    return ops.batch_norm_silu(h, norm.weight, norm.bias, *running, temb=temb, momentum=norm.momentum, eps=norm.eps)


class UNet(nn.Module):
    """The tutorial's noise predictor: `depth` halvings, `width * 2**i` channels at level i.

    Args:
        in_channels: channels C of the images, in and out.
        time_dim: length of the time embedding, even and at least 4.
        device: where to make the parameters; None is torch's default device.
        width: channels of the first level; 64 is the tutorial's.
        depth: number of halvings; 4 is the tutorial's. H and W must be multiples of 2**depth.
        num_classes: K makes the network class-conditional. `label_embedding` has K + 1 rows, the
            last one (`null_label`) for "no label"; its rows are added to the time embedding.

    Raises ValueError for sizes that cannot work, here and in `forward`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        time_dim: int = 256,
        device: Device = None,
        *,
        width: int = 64,
        depth: int = 4,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "width": width, "depth": depth}
        if num_classes is not None:
            sizes["num_classes"] = num_classes
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_channels, self.time_dim = in_channels, time_dim
        self.width, self.depth, self.num_classes = width, depth, num_classes

        self.time_embedding = TimeEmbedding(time_dim)
        channels = [width << level for level in range(depth)]
        for i, c in enumerate(channels, start=1):
            before = in_channels if i == 1 else c // 2
            self.add_module(f"down{i}", ConvBlock(before, c, time_dim, device))
        self.pool = nn.MaxPool2d(2)
        self.bottleneck = ConvBlock(channels[-1], 2 * channels[-1], time_dim, device)
        for i, c in reversed(list(enumerate(channels, start=1))):
            self.add_module(f"up{i}", nn.ConvTranspose2d(2 * c, c, 2, stride=2, device=device))
            self.add_module(f"conv_up{i}", ConvBlock(2 * c, c, time_dim, device))
        self.output = nn.Conv2d(width, in_channels, 1, device=device)
        if num_classes is not None:
            self.label_embedding = nn.Embedding(num_classes + 1, time_dim, device=device)

    @property
    def null_label(self) -> int | None:
        """The label that means "no label" (K of rows 0..K); None for an unconditional network."""
        return self.num_classes

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.output.weight.device

    @property
    def config(self) -> dict[str, int | None]:
        """Keyword arguments that build this architecture again: `UNet(**unet.config)`."""
        names = ("in_channels", "time_dim", "width", "depth", "num_classes")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicts the noise in x.

        Args:
            x: (N, in_channels, H, W), the dtype of the parameters, H and W multiples of 2**depth.
            t: (N,), integer or floating timesteps (the embedding is computed in fp32).
            labels: (N,) int64 or int32 in 0..num_classes, num_classes being "no label"; None is
                "no label" for all. Labels out of range are named on the CPU; CUDA has its own
                assertion, because looking would wait for the device.

        Returns:
            Tensor like x.
        """
        self._check(x, t, labels)
        t_emb = self.time_embedding(t)
        if self.num_classes is not None:
            if labels is None:
                labels = torch.full_like(t, self.num_classes, dtype=torch.int64)
            t_emb = t_emb + self.label_embedding(labels).float()
        t_emb = t_emb.to(self.output.weight.dtype)

        skips = []
        for i in range(1, self.depth + 1):
            skips.append(self.get_submodule(f"down{i}")(x, t_emb))
            x = self.pool(skips[-1])
        x = self.bottleneck(x, t_emb)
        for i in range(self.depth, 0, -1):
            x = torch.cat([conv_transpose2x2(x, getattr(self, f"up{i}")), skips.pop()], dim=1)
            x = self.get_submodule(f"conv_up{i}")(x, t_emb)
        y: Tensor = self.output(x)
        return y

    def _check(self, x: Tensor, t: Tensor, labels: Tensor | None) -> None:
        """Everything the host can see without waiting for a device."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            shape = f"(N, {self.in_channels}, H, W)"
            raise ValueError(f"x must have shape {shape}, got {tuple(x.shape)}")
        m = 1 << self.depth
        h, w = x.shape[2:]
        if h % m or w % m or not h or not w:
            fit = tuple(max(-(-size // m), 1) * m for size in (h, w))
            raise ValueError(
                f"height and width of x must be multiples of {m} (depth {self.depth}: {self.depth} "
                f"halvings), got ({h}, {w}); pad or resize to the next valid size {fit}"
            )
        if t.shape != x.shape[:1]:
            shape = f"({x.shape[0]},)"
            raise ValueError(f"t must have shape {shape}, one per image, got {tuple(t.shape)}")
        if t.dtype == torch.bool or t.is_complex():
            raise ValueError(f"t must be an integer or floating tensor, got {t.dtype}")
        if labels is not None:
            check_labels(labels, x.shape[0], self.num_classes, "UNet")
