"""The denoiser for vectors: a few fully connected layers that are told the time as one more number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .labels import check_labels

Device = torch.device | str | int | None


class MLP(nn.Module):
    """Predicts the noise in vectors x_t.

        h_1 = ReLU(W_1 [x, t / (T - 1) - 1/2, label] + b_1)
        h_i = ReLU(W_i h_{i-1} + b_i),  with residual=True h_{i-1} + ReLU(W_i h_{i-1} + b_i),  i = 2..depth
        eps = W h_depth + b

    Args:
        dim: length D of a vector, in and out.
        num_timesteps: T of the schedule; it maps t = 0..T-1 to [-1/2, 1/2].
        width: units of a hidden layer.
        depth: how many hidden layers.
        num_classes: K makes the network class-conditional. `label_embedding` is a table of K + 1 vectors of length
            ceil(width / 4), the last one (`null_label`) for "no label".
        residual: hidden layers after the first add to what they are given; deeper networks train better so.
        device: where to make the parameters; None is torch's default device.

    Raises TypeError and ValueError for sizes that cannot work; `forward` for input that does not fit.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_timesteps: int,
        width: int = 128,
        depth: int = 3,
        num_classes: int | None = None,
        residual: bool = False,
        device: Device = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_timesteps": num_timesteps, "width": width, "depth": depth}
        if num_classes is not None:
            sizes["num_classes"] = num_classes
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.dim, self.num_timesteps, self.width, self.depth = dim, num_timesteps, width, depth
        self.num_classes, self.residual = num_classes, bool(residual)

        label_size = 0 if num_classes is None else -(-width // 4)
        first = dim + 1 + label_size
        sources = [first] + [width] * (depth - 1)
        self.hidden = nn.ModuleList(nn.Linear(source, width, device=device) for source in sources)
        self.output = nn.Linear(width, dim, device=device)
        if num_classes is not None:
            self.label_embedding = nn.Embedding(num_classes + 1, label_size, device=device)

    @property
    def null_label(self) -> int | None:
        """The label that means "no label" (K of rows 0..K); None for an unconditional network."""
        return self.num_classes

    @property
    def sample_shape(self) -> tuple[int]:
        """The shape of one sample, (dim,)."""
        return (self.dim,)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.output.weight.device

    @property
    def config(self) -> dict[str, int | bool | None]:
        """Keyword arguments that build this architecture again: `MLP(**mlp.config)`."""
        names = ("dim", "num_timesteps", "width", "depth", "num_classes", "residual")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Predicts the noise in x.

        Args:
            x: (N, dim), the dtype of the parameters.
            t: (N,), integer or floating timesteps in 0..T-1.
            labels: (N,) int64 or int32 in 0..num_classes, num_classes being "no label"; None is "no label" for all.

        Returns:
            Tensor like x.

        Timesteps and labels out of range are named on the CPU; on CUDA looking would wait for the device.
        """
        self._check(x, t, labels)
        time = t.float() / max(self.num_timesteps - 1, 1) - 0.5  # in float32: bfloat16 does not tell 999 from 1000
        parts = [x, time.to(x.dtype)[:, None]]
        if self.num_classes is not None:
            if labels is None:
                labels = torch.full_like(t, self.num_classes, dtype=torch.int64)
            parts.append(self.label_embedding(labels).to(x.dtype))
        h = torch.cat(parts, dim=1)
        for i, layer in enumerate(self.hidden):
            active = F.relu(layer(h))
            h = h + active if self.residual and i else active
        y: Tensor = self.output(h)
        return y

    def _check(self, x: Tensor, t: Tensor, labels: Tensor | None) -> None:
        """Everything the host can see without waiting for a device."""
        if x.dim() != 2 or x.shape[1] != self.dim:
            raise ValueError(f"x must have shape (N, {self.dim}), got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape ({x.shape[0]},), one per vector, got {tuple(t.shape)}")
        if t.dtype == torch.bool or t.is_complex():
            raise ValueError(f"t must be an integer or floating tensor, got {t.dtype}")
        if t.device.type == "cpu" and not torch.compiler.is_compiling() and t.numel():
            low, high = float(t.min()), float(t.max())
            if low < 0 or high > self.num_timesteps - 1:
                raise ValueError(
                    f"t must be in 0..{self.num_timesteps - 1} (num_timesteps={self.num_timesteps}), got "
                    f"{low:g}..{high:g}; build the MLP with the T of the schedule"
                )
        if labels is not None:
            check_labels(labels, x.shape[0], self.num_classes, "MLP")
