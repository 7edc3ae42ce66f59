"""BatchNorm over the batch of all processes, on any device: torch's own SyncBatchNorm runs on GPUs only.

With x_r the rank's part, n_r its values per channel, N = sum n_r, and the ranks' own means m_r and variances v_r:

    mean = sum n_r m_r / N                                var = sum n_r (v_r + (m_r - mean)^2) / N
    xhat = (x - mean) / sqrt(var + eps)                   y = weight xhat + bias
    dx   = weight / sqrt(var + eps) (dy - sum dy / N - xhat sum (dy xhat) / N)

sums over all ranks. The rank's statistics come from torch's BatchNorm kernel, the merge (Chan et al. 1979, no
cancellation) is in float64: as near to the exact result as one process. One all-reduce forward, one backward.
dweight and dbias stay the rank's own; DistributedDataParallel averages them like every gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .processes import World


class _Synchronised(nn.modules.batchnorm._BatchNorm):
    """The forward pass of a converted layer. In eval mode it is the layer that it was."""

    world: World

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor
        if not self.training:
            y = super().forward(input)
            return y
        self._check_input_dim(input)
        momentum = self.momentum
        if self.running_mean is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if momentum is None:  # the plain average over all batches
                momentum = 1.0 / float(self.num_batches_tracked)
        y = _batch_norm(
            input, self.weight, self.bias, self.running_mean, self.running_var, momentum, self.eps, self.world
        )
        return y


class SyncBatchNorm1d(_Synchronised, nn.BatchNorm1d):
    pass


class SyncBatchNorm2d(_Synchronised, nn.BatchNorm2d):
    pass


class SyncBatchNorm3d(_Synchronised, nn.BatchNorm3d):
    pass


CONVERTED: dict[type, Any] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
}


def convert(module: nn.Module, world: World) -> int:
    """Makes every BatchNorm1d, 2d and 3d in `module` take its statistics over all of `world`; how many there were.

    The layers stay the same objects with the same parameters, buffers, hooks and state-dict keys: only their class
    changes, to a subclass of what it was. Every process has to run the same layers in the same order. Layers of
    torch.nn.SyncBatchNorm are left alone. Raises ValueError, before anything is changed, for another class made from
    BatchNorm: its own forward pass would be lost.
    """
    layers = [
        (name, part) for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)
    ]
    for name, part in layers:
        if type(part) not in CONVERTED and not isinstance(part, (_Synchronised, nn.SyncBatchNorm)):
            where = name or "the module"
            raise ValueError(
                f"only torch's BatchNorm1d, 2d and 3d can be synchronised; {where} is a {type(part).__name__}"
            )
    found = 0
    for _, part in layers:
        if type(part) in CONVERTED:
            part.__class__ = CONVERTED[type(part)]
        if isinstance(part, _Synchronised):
            part.world = world
            found += 1
    return found


def revert(module: nn.Module) -> None:
    """Undoes `convert`."""
    for part in module.modules():
        for plain, converted in CONVERTED.items():
            if type(part) is converted:
                part.__class__ = plain
                del part.world


@torch.compiler.disable  # a compiled graph is cut here: what waits for other processes is not for it to reorder
def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float | None,
    eps: float,
    world: World,
) -> Tensor:
    with torch.no_grad():
        mean, var, count = _statistics(x, world)
        if running_mean is not None and running_var is not None and momentum is not None:
            running_mean.mul_(1 - momentum).add_(momentum * mean)
            running_var.mul_(1 - momentum).add_(momentum * var * (count / (count - 1)))  # unbiased, as torch keeps it
        dtype = _computed(x)
    y: Tensor = _Normalise.apply(x, weight, bias, mean.to(dtype), var.to(dtype), count, eps, world)
    return y


def _computed(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _statistics(x: Tensor, world: World) -> tuple[Tensor, Tensor, Tensor]:
    """float64 mean and (biased) variance of each channel over all processes, and the number of values in it."""
    zeros = torch.zeros(x.shape[1], dtype=_computed(x), device=x.device)
    mean, var = torch.batch_norm_update_stats(x, zeros, zeros.clone(), 0.0)
    count = torch.full((1,), x.numel() // x.shape[1], dtype=torch.float64, device=x.device)
    # A row for each process, of which it fills its own: the sum is a gathering, and adding zeros is exact.
    rows = torch.zeros(world.size, 2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
    rows[world.rank] = torch.cat([mean.double(), var.double(), count])
    means, variances, counts = world.sum(rows).split([x.shape[1], x.shape[1], 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    var = (counts * (variances + (means - mean) ** 2)).sum(0) / total
    return mean, var, total


class _Normalise(torch.autograd.Function):
    """y from given statistics, and the gradient of that and of the statistics in one."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        world: World,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.world, ctx.biased = eps, world, bias is not None
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        asked, dtype = x.dtype, mean.dtype
        gain = torch.ones_like(mean) if weight is None else weight.to(dtype)
        x, dy = x.to(dtype), dy.to(dtype)
        # With the statistics as constants: dx = gain / sqrt(var + eps) dy, and the rank's sums of dy xhat and dy.
        dx, dot, total = torch.ops.aten.native_batch_norm_backward(
            dy, x, gain, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            sums = torch.cat([dot, total]).double()
            dot_mean, dy_mean = (ctx.world.sum(sums) / count).to(dtype).chunk(2)
            scale = -gain * torch.rsqrt(var + ctx.eps)
            dx += F.batch_norm(x, mean, var, scale * dot_mean, scale * dy_mean, False, 0.0, ctx.eps)
        dweight = None if weight is None else dot.to(weight.dtype)
        dbias = None if not ctx.biased else total.to(gain.dtype if weight is None else weight.dtype)
        return dx.to(asked), dweight, dbias, None, None, None, None, None
