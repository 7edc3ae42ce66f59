"""One benchmark case per op: bytes moved, share of the copy bandwidth, eager PyTorch and torch.compile beside it.

    python benchmarks/cases.py [--device cpu] [--elements 4194304] [--dtype float32] [--only ddpm_step] [--json FILE]

Each case first checks its op against the reference backend; a case that fails its check prints no speed. Eager and
compiled baselines draw their noise with torch.randn_like, as a user's own code would; the losses find it stored.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from machine import facts
from timing import Timing, copy_bandwidth, interleaved_rounds, ratios
from torch import Tensor

import ddpm_fast
from ddpm_fast import ops
from ddpm_fast.noise import make_rng

CHANNELS, GROUPS, EDGE = 16, 4, 32  # of one sample; --elements decides how many samples
T = 1000


@dataclass
class Inputs:
    """What every case is built from."""

    x: Tensor
    y: Tensor
    noise: Tensor  # float32
    t: Tensor
    table: Tensor
    steps: Tensor
    t_of_row: Tensor
    row: Tensor
    rng: Tensor
    weight: Tensor
    bias: Tensor
    temb: Tensor

    @classmethod
    def make(cls, n: int, dtype: torch.dtype, device: torch.device) -> Inputs:
        shape = (n, CHANNELS, EDGE, EDGE)
        generator = torch.Generator(device).manual_seed(0)

        def rand(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(size, generator=generator, device=device).to(dtype)

        signal = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0).sqrt()
        return cls(
            x=rand(*shape),
            y=rand(*shape),
            noise=rand(*shape, dtype=torch.float32),
            t=(torch.arange(n, device=device) * 37) % T,
            table=torch.stack([signal, (1 - signal**2).sqrt()], 1).float().to(device),
            steps=torch.tensor([[1.2, 0.7, 0.6, 0.38, 0.0, 0.0, 0.2, 1.0]], device=device),
            t_of_row=torch.tensor([500], dtype=torch.int32, device=device),
            row=torch.zeros(1, dtype=torch.int64, device=device),
            rng=make_rng(1, 0, device),
            weight=rand(CHANNELS),
            bias=rand(CHANNELS),
            temb=rand(n, CHANNELS),
        )


@dataclass(frozen=True)
class Case:
    """An op as a user calls it, the same in eager PyTorch, and the bytes one element must move."""

    name: str
    fast: Callable[[Inputs], object]
    eager: Callable[[Inputs], object]
    bytes_per_element: Callable[[int], float]  # of the storage dtype's size
    exact: bool = True
    atol: float = 1e-7  # of the check, where the op is not exact


def _first(value: object) -> Tensor:
    result = value[0] if isinstance(value, tuple) else value
    assert isinstance(result, Tensor)
    return result


def _grads(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


def _eager_q_sample(i: Inputs, noise: Tensor | None = None) -> Tensor:
    eps = torch.randn_like(i.x) if noise is None else noise
    signal, sigma = i.table[i.t, 0].view(-1, 1, 1, 1), i.table[i.t, 1].view(-1, 1, 1, 1)
    return (signal * i.x + sigma * eps).to(i.x.dtype)


def _eager_step(i: Inputs) -> Tensor:
    a, b, c1, c2, _, _, s, bound = i.steps[0].unbind()
    x0 = (a * i.noise - b * i.y).clamp(-bound, bound)
    return c1 * x0 + c2 * i.noise + s * torch.randn_like(i.noise)


def _eager_add(i: Inputs, h: Tensor) -> Tensor:
    return F.silu(h + i.bias[None, :, None, None]) + i.temb[:, :, None, None]


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _fast_add_backward(i: Inputs) -> object:
    h, bias, temb = _leaf(i.x), _leaf(i.bias), _leaf(i.temb)
    return torch.autograd.grad(ops.add_bias_temb(h, bias, temb, act="silu"), (h, bias, temb), i.y)


def _eager_add_backward(i: Inputs) -> object:
    h, bias, temb = _leaf(i.x), _leaf(i.bias), _leaf(i.temb)
    y = F.silu(h + bias[None, :, None, None]) + temb[:, :, None, None]
    return torch.autograd.grad(y, (h, bias, temb), i.y)


def _fast_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, beta, bias, temb = leaves or (i.x, i.weight, i.bias, i.bias, i.temb)
    return ops.group_norm_silu(h, GROUPS, weight, beta, bias=bias, temb=temb)


def _eager_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, beta, bias, temb = leaves or (i.x, i.weight, i.bias, i.bias, i.temb)
    return F.silu(F.group_norm(h + bias[None, :, None, None] + temb[:, :, None, None], GROUPS, weight, beta))


def _norm_backward(i: Inputs, function: Callable[..., Tensor]) -> object:
    leaves = [_leaf(value) for value in (i.x, i.weight, i.bias, i.bias, i.temb)]
    return torch.autograd.grad(function(i, *leaves), leaves, i.y)


# As in lucidrains' blocks: a norm over channels, scale and shift of the time embedding, SiLU, and the block's input.
def _fast_rms_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, scale, shift, residual = leaves or (i.x, i.weight, i.temb, i.temb, i.y)
    return ops.rms_norm_silu(h, weight, scale=scale, shift=shift, residual=residual)


def _eager_rms_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, scale, shift, residual = leaves or (i.x, i.weight, i.temb, i.temb, i.y)
    xhat = F.normalize(h, dim=1) * weight[None, :, None, None] * CHANNELS**0.5
    return F.silu(xhat * (scale[:, :, None, None] + 1) + shift[:, :, None, None]) + residual


def _rms_norm_backward(i: Inputs, function: Callable[..., Tensor]) -> object:
    leaves = [_leaf(value) for value in (i.x, i.weight, i.temb, i.temb, i.y)]
    return torch.autograd.grad(function(i, *leaves), leaves, i.y)


# As in the tutorial's blocks, in training: the norm takes the statistics of the batch.
def _fast_batch_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, beta, temb = leaves or (i.x, i.weight, i.bias, i.temb)
    return ops.batch_norm_silu(h, weight, beta, temb=temb)


def _eager_batch_norm(i: Inputs, *leaves: Tensor) -> Tensor:
    h, weight, beta, temb = leaves or (i.x, i.weight, i.bias, i.temb)
    return F.silu(F.batch_norm(h, None, None, weight, beta, training=True)) + temb[:, :, None, None]


def _batch_norm_backward(i: Inputs, function: Callable[..., Tensor]) -> object:
    leaves = [_leaf(value) for value in (i.x, i.weight, i.bias, i.temb)]
    return torch.autograd.grad(function(i, *leaves), leaves, i.y)


def _fast_loss_backward(i: Inputs) -> object:
    pred = _leaf(i.x)
    return _grads(ops.noise_mse(pred, rng=i.rng), pred)


def _eager_loss_backward(i: Inputs) -> object:
    pred = _leaf(i.x)
    return _grads(F.mse_loss(pred.float(), i.noise), pred)


CASES = [
    Case(
        "normal",
        lambda i: ops.normal(i.x.shape[0], i.x.shape[1:], rng=i.rng, out=i.y),
        lambda i: torch.randn_like(i.x),
        lambda size: size,
    ),
    Case(
        "random_bits",
        lambda i: ops.random_bits(i.x.shape[0], i.x.shape[1:], rng=i.rng),
        lambda i: torch.randint(0, 2**32, i.x.shape, device=i.x.device),
        lambda size: 8,
    ),
    Case("q_sample", lambda i: ops.q_sample(i.x, i.t, i.table, rng=i.rng), _eager_q_sample, lambda size: 2 * size),
    Case(
        "q_sample, noise given",
        lambda i: ops.q_sample(i.x, i.t, i.table, noise=i.noise),
        lambda i: _eager_q_sample(i, i.noise),
        lambda size: 2 * size + 4,
    ),
    Case(
        "add_bias_temb",
        lambda i: ops.add_bias_temb(i.x, i.bias, i.temb, act="silu"),
        lambda i: _eager_add(i, i.x),
        lambda size: 2 * size,
    ),
    Case("add_bias_temb, backward", _fast_add_backward, _eager_add_backward, lambda size: 5 * size),
    # Both read the images twice; the second time an image is in the cache.
    Case("group_norm_silu", _fast_norm, _eager_norm, lambda size: 2 * size, exact=False, atol=5e-6),
    Case(
        "group_norm_silu, backward",
        lambda i: _norm_backward(i, _fast_norm),
        lambda i: _norm_backward(i, _eager_norm),
        lambda size: 5 * size,
        exact=False,
        atol=5e-6,
    ),
    Case("rms_norm_silu", _fast_rms_norm, _eager_rms_norm, lambda size: 3 * size, exact=False, atol=5e-6),
    Case(
        "rms_norm_silu, backward",
        lambda i: _rms_norm_backward(i, _fast_rms_norm),
        lambda i: _rms_norm_backward(i, _eager_rms_norm),
        lambda size: 6 * size,  # forward: h, residual, y; backward: g, h, g_h (the residual's gradient is g)
        exact=False,
        atol=5e-6,
    ),
    Case("batch_norm_silu", _fast_batch_norm, _eager_batch_norm, lambda size: 3 * size, exact=False, atol=5e-6),
    Case(
        "batch_norm_silu, backward",
        lambda i: _batch_norm_backward(i, _fast_batch_norm),
        lambda i: _batch_norm_backward(i, _eager_batch_norm),
        lambda size: 8 * size,  # forward: h twice, y; backward: g and h twice, g_h
        exact=False,
        atol=5e-6,
    ),
    Case(
        "ddpm_step",
        # In place, again and again: its row clips and contracts, so the state stays bounded.
        lambda i: ops.ddpm_step(i.noise, i.y, i.steps, i.t_of_row, i.row, i.rng),
        _eager_step,
        lambda size: 8 + size,  # x read and written, m read
    ),
    Case(
        "noise_mse",
        lambda i: ops.noise_mse(i.x, rng=i.rng),
        lambda i: F.mse_loss(i.x.float(), i.noise),  # keeps the noise in memory, which ours draws again
        lambda size: size,
        exact=False,
    ),
    Case(
        "noise_mse, noise given",
        lambda i: ops.noise_mse(i.x, noise=i.noise),
        lambda i: F.mse_loss(i.x.float(), i.noise),
        lambda size: size + 4,
        exact=False,
    ),
    Case("noise_mse, backward", _fast_loss_backward, _eager_loss_backward, lambda size: 3 * size, exact=False),
]


def verify(case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
    """What is wrong with the op on a small input, or None: exact ops bit for bit, reductions within rounding."""
    got = _first(case.fast(Inputs.make(2, dtype, device)))
    with ddpm_fast.use_backend("reference"):
        expected = _first(case.fast(Inputs.make(2, dtype, device)))
    if case.exact:
        return None if torch.equal(got, expected) else "differs from the reference"
    rtol = 1e-5 if got.dtype == torch.float32 else 2**-7  # one rounding to the storage dtype on either side
    close = torch.allclose(got.float(), expected.float(), rtol=rtol, atol=case.atol)
    return None if close else "further than rounding from the reference"


def measure(case: Case, inputs: Inputs, device: torch.device, budget: float) -> dict[str, list[float]]:
    """Seconds of every round of ddpm_fast, eager and torch.compile of the eager code, in turns."""
    torch._dynamo.reset()
    compiled = torch.compile(case.eager)
    candidates = {"ddpm_fast": case.fast, "eager": case.eager, "torch.compile": compiled}
    return interleaved_rounds(
        {name: functools.partial(f, inputs) for name, f in candidates.items()}, device, budget=budget
    )


def run_ops(
    device: torch.device,
    dtype: torch.dtype,
    *,
    elements: int | None = None,
    budget: float = 1.0,
    only: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, object]:
    """Check and measure every op (or those whose name contains `only`), a line each; JSON-ready figures.

    elements: of each image tensor; None: 4 Mi on a CPU, 64 Mi on a GPU. budget: seconds for each candidate.
    """
    elements = elements or (2**26 if device.type == "cuda" else 2**22)
    inputs = Inputs.make(max(1, elements // (CHANNELS * EDGE * EDGE)), dtype, device)
    bandwidth = copy_bandwidth(device, 2**26 if device.type == "cuda" else 2**25)
    name = str(dtype).removeprefix("torch.")
    say(f"{inputs.x.numel()} elements, {name}; copy {bandwidth / 1e9:.1f} GB/s")
    say(f"{'op':<26}{'ms':>9}{'GB/s':>8}{'of copy':>9}{'vs eager':>10}{'vs compile':>12}")
    rows: list[dict[str, object]] = []
    failed: dict[str, str] = {}
    for case in CASES:
        if only and only not in case.name:
            continue
        wrong = verify(case, dtype, device)
        if wrong is not None:
            failed[case.name] = wrong
            say(f"{case.name:<26}  check failed: {wrong}")
            continue
        rounds = measure(case, inputs, device, budget)
        fast = Timing.of(rounds["ddpm_fast"]).median
        moved = case.bytes_per_element(inputs.x.element_size()) * inputs.x.numel()
        against = {name: ratios(rounds[name], rounds["ddpm_fast"]) for name in ("eager", "torch.compile")}
        say(
            f"{case.name:<26}{fast * 1e3:>9.3f}{moved / fast / 1e9:>8.1f}{moved / fast / bandwidth:>9.0%}"
            f"{against['eager'].median:>9.2f}x{against['torch.compile'].median:>11.2f}x"
        )
        rows.append(
            {
                "op": case.name,
                "bytes": moved,
                "seconds": {name: vars(Timing.of(values)) for name, values in rounds.items()},
                "ratios": {name: vars(value) for name, value in against.items()},
            }
        )
    return {
        "dtype": name,
        "elements": inputs.x.numel(),
        "copy_bytes_per_second": bandwidth,
        "cases": rows,
        "failed": failed,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print the table; exit code 1 when a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--elements", type=int, help="of each image tensor (default: 4 Mi on a CPU, 64 Mi on a GPU)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--only", help="a case whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each candidate")
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args(argv)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    machine = facts(device)
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    print(f"{name}, torch {torch.__version__}, commit {machine['commit']}")
    figures = run_ops(
        device,
        dtype,
        elements=options.elements,
        budget=options.seconds,
        only=options.only,
        say=lambda line: print(line, flush=True),
    )
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"machine": machine, **figures}, file, indent=1)
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
