"""The launches of the Triton ops that are compiled and read: every kernel for every dtype and architecture, then other
formats and options once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ddpm_fast.backends import triton as ops
from ddpm_fast.backends.triton import aot

from .triton_jobs import Job

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
IMAGES = (256, 3, 32, 32)
FEATURES = (16, 128, 32, 32)


def meta(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if channels_last else x


RNG = meta(2, dtype=torch.int64)
T = meta(IMAGES[0], dtype=torch.int64)
NOISING_TABLE = meta(1000, 2)
STREAM = 2**31


@dataclass
class Case:
    """One launch to compile; wide_loads, wide_stores: bytes per element of each array that goes 128 bits at a time;
    narrow: of the others."""

    name: str
    call: Callable[[], object]
    dtype: str
    capability: int
    wide_loads: list[int] = field(default_factory=list)
    wide_stores: list[int] = field(default_factory=list)
    narrow: list[int] = field(default_factory=list)
    launch: int = -1  # which one of the call; before the last, offset noise launches the normal kernel, for example


def cases() -> Iterator[Case]:
    def step(
        dtype: torch.dtype,
        noise: bool = True,
        cl: bool = False,
        shape: tuple[int, ...] = IMAGES,
        rows: int = 1000,
        **options: Tensor,
    ) -> None:
        names = (
            "noise",
            "m_uncond",
            "guidance",
            "x0_prev",
            "logvar",
            "logvar_range",
            "threshold",
            "x0_out",
            "copy_out",
        )
        x, m = meta(*shape, channels_last=cl), meta(*shape, dtype=dtype, channels_last=cl)
        table = (meta(rows, 8), meta(rows, dtype=torch.int32), meta(1, dtype=torch.int64))
        rng = RNG if noise else None
        ops.ddpm_step(x, m, *table, rng, *(options.get(name) for name in names), meta(1, dtype=torch.int32))

    def mse(
        dtype: torch.dtype,
        target: str = "eps",
        loss: str = "mse",
        g: Tensor | None = None,
        cl: bool = False,
        n: int = IMAGES[0],
    ) -> None:
        pred = meta(n, *IMAGES[1:], dtype=dtype, channels_last=cl)
        x0 = meta(n, *IMAGES[1:], dtype=dtype, channels_last=cl)
        rest = (x0, T, NOISING_TABLE, None, RNG, STREAM, 0.0, target, loss, 1.0)
        if g is None:
            ops.noise_mse(pred, *rest)
        else:
            ops.noise_mse_backward(g, pred, *rest)

    def add(dtype: torch.dtype, act: str, cl: bool = False) -> None:
        ops.add_bias_temb(
            meta(*FEATURES, dtype=dtype, channels_last=cl), meta(FEATURES[1]), meta(*FEATURES[:2], dtype=dtype), act
        )

    def add_backward(dtype: torch.dtype, act: str, cl: bool = False) -> None:
        g = meta(*FEATURES, dtype=dtype, channels_last=cl)
        ops.add_bias_temb_backward(g, g, meta(FEATURES[1]), act, True, True, True)

    def norm_arguments(
        dtype: torch.dtype, cl: bool, shape: tuple[int, ...], per_sample: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        affine = shape[:2] if per_sample else shape[1:2]
        h = meta(*shape, dtype=dtype, channels_last=cl)
        return h, meta(shape[1]), meta(*shape[:2], dtype=dtype), meta(*affine), meta(*affine)

    def norm(
        dtype: torch.dtype,
        act: str = "silu",
        cl: bool = False,
        shape: tuple[int, ...] = FEATURES,
        groups: int = 32,
        per_sample: bool = False,
    ) -> None:
        ops.group_norm_silu(*norm_arguments(dtype, cl, shape, per_sample), groups, 1e-5, act)

    def norm_backward(
        dtype: torch.dtype,
        act: str = "silu",
        cl: bool = False,
        shape: tuple[int, ...] = FEATURES,
        groups: int = 32,
        per_sample: bool = False,
    ) -> None:
        h, *rest = norm_arguments(dtype, cl, shape, per_sample)
        statistics = (meta(shape[0], groups), meta(shape[0], groups))
        ops.group_norm_silu_backward(h, h, *rest, *statistics, groups, act, True, True, True, True)

    def rms_norm(
        dtype: torch.dtype,
        act: str = "silu",
        cl: bool = False,
        shape: tuple[int, ...] = FEATURES,
        per_sample: bool = False,
        backward: bool = False,
    ) -> None:
        h, affine = meta(*shape, dtype=dtype, channels_last=cl), shape[:2] if per_sample else shape[1:2]
        if backward:
            ops.rms_norm_silu_backward(h, h, meta(*affine), meta(*affine), 1e-12, act, True, True, True)
        else:
            ops.rms_norm_silu(h, meta(*affine), meta(*affine), h, 1e-12, act)

    def batch_norm(
        dtype: torch.dtype,
        act: str = "silu",
        cl: bool = False,
        shape: tuple[int, ...] = FEATURES,
        backward: bool = False,
    ) -> None:
        h, temb = meta(*shape, dtype=dtype, channels_last=cl), meta(*shape[:2], dtype=dtype)
        of_channels = (meta(shape[1]), meta(shape[1]))
        if backward:
            ops.batch_norm_silu_backward(h, h, *of_channels, *of_channels, True, 1e-5, act, True, True)
        else:
            ops.batch_norm_silu(h, temb, *of_channels, None, None, 1e-5, act)

    for capability in (90, 80):
        for name, dtype in DTYPES.items():
            size = dtype.itemsize
            x = meta(*IMAGES, dtype=dtype)
            both = (name, capability)
            yield Case("normal", lambda x=x: ops.normal(x, RNG, 0), *both, [], [size])
            yield Case(
                "q_sample",
                lambda x=x: ops.q_sample(x, T, NOISING_TABLE, None, RNG, STREAM, 0.0, "eps", x.dtype),
                *both,
                [size],
                [size, size],
            )
            yield Case(
                "q_sample_backward",
                lambda x=x: ops.q_sample_backward(x, x, T, NOISING_TABLE, "v", x.dtype, True, False),
                *both,
                [size, size],
                [size],
            )
            # Half-width m goes 64 bits at a time beside the float32 state: see ddpm_step.py.
            state, narrow = ([4, 4], []) if size == 4 else ([4], [size])
            yield Case("ddpm_step", lambda d=dtype: step(d), *both, state, [4], narrow)
            yield Case("noise_mse", lambda d=dtype: mse(d), *both, [size], [])
            if capability == 90:
                yield Case("ddpm_step_no_noise", lambda d=dtype: step(d, noise=False), *both, state, [4], narrow)
                yield Case("noise_mse_backward", lambda d=dtype: mse(d, g=meta(IMAGES[0])), *both, [size], [size])
            for act in ("none", "silu") if capability == 90 else ("silu",):
                yield Case(f"add_bias_temb_{act}", lambda d=dtype, a=act: add(d, a), *both, [size], [size])
                reads = [size, size] if act == "silu" else [size]
                yield Case(
                    f"add_bias_temb_backward_{act}", lambda d=dtype, a=act: add_backward(d, a), *both, reads, [size]
                )
            # Read for the mean, for the squares about it and for y; g and h for the sums and for g_h.
            yield Case("group_norm_silu", lambda d=dtype: norm(d), *both, [size] * 3, [size])
            yield Case("group_norm_silu_backward", lambda d=dtype: norm_backward(d), *both, [size] * 4, [size])
            # h for the sums, of one tile here, and for y; g and h for the sums and for g_h.
            for k, (reads, writes) in enumerate([([size], []), ([size], [size])]):
                call = functools.partial(batch_norm, dtype)
                yield Case(f"batch_norm_silu{'_sums' * (k == 0)}", call, *both, reads, writes, launch=k)
                call = functools.partial(batch_norm, dtype, backward=True)
                yield Case(f"batch_norm_silu_backward{'_sums' * (k == 0)}", call, *both, [size] * 2, writes, launch=k)
            # Once each: h and what is added, or g and h.
            yield Case("rms_norm_silu", lambda d=dtype: rms_norm(d), *both, [size] * 2, [size])
            yield Case("rms_norm_silu_backward", lambda d=dtype: rms_norm(d, backward=True), *both, [size] * 2, [size])
    # What comes once is compiled once: other formats and options.
    small = meta(*IMAGES, dtype=torch.bfloat16)
    byte = meta(*IMAGES, dtype=torch.uint8)
    history, history_last = meta(*IMAGES), meta(*IMAGES, channels_last=True)
    extra: list[tuple[str, Callable[[], object]]] = [
        ("random_bits", lambda: ops.random_bits(meta(*IMAGES, dtype=torch.int64), RNG, 0)),
        ("normal_channels_last", lambda: ops.normal(meta(*IMAGES, channels_last=True), RNG, 0)),
        ("normal_odd_size", lambda: ops.normal(meta(64, 3, 7, 5), RNG, 0)),
        ("q_sample_bytes", lambda: ops.q_sample(byte, T, NOISING_TABLE, None, RNG, STREAM, 0.0, "v", torch.bfloat16)),
        ("ddpm_step_channels_last", lambda: step(torch.bfloat16, cl=True)),
        (
            "ddpm_step_copy",
            lambda: step(torch.bfloat16, copy_out=meta(*IMAGES, dtype=torch.bfloat16, channels_last=True)),
        ),
        (
            "ddpm_step_all_options",
            lambda: step(
                torch.bfloat16,
                m_uncond=small,
                guidance=meta(1),
                x0_prev=meta(*IMAGES),
                logvar=small,
                logvar_range=meta(1000, 2),
                threshold=meta(IMAGES[0]),
                x0_out=meta(*IMAGES),
                copy_out=byte,
            ),
        ),
        ("ddpm_step_learned_range", lambda: step(torch.bfloat16, logvar=small, logvar_range=meta(1000, 2))),
        ("ddpm_step_history", lambda: step(torch.bfloat16, x0_prev=history, x0_out=history)),
        (
            "ddpm_step_history_channels_last",
            lambda: step(torch.bfloat16, noise=False, cl=True, x0_prev=history_last, x0_out=history_last),
        ),
        # Integer arguments that are 1 become constants, another path through the compiler.
        ("ddpm_step_of_one_number", lambda: step(torch.float32, shape=(1, 1, 1, 1), rows=1, copy_out=meta(1, 1, 1, 1))),
        (
            "q_sample_offset_noise",
            lambda: ops.q_sample(small, T, NOISING_TABLE, None, RNG, STREAM, 0.1, "v", small.dtype),
        ),
        ("noise_mse_of_one_sample", lambda: mse(torch.float32, n=1)),
        ("add_bias_temb_of_vectors", lambda: ops.add_bias_temb(meta(1, 1), meta(1), meta(1, 1), "silu")),
        (
            "add_bias_temb_backward_of_vectors",
            lambda: ops.add_bias_temb_backward(meta(1, 1), meta(1, 1), meta(1), "silu", True, True, True),
        ),
        ("noise_mse_v_huber_channels_last", lambda: mse(torch.bfloat16, "v", "huber", cl=True)),
        ("add_bias_temb_channels_last", lambda: add(torch.bfloat16, "silu", cl=True)),
        ("add_bias_temb_backward_channels_last", lambda: add_backward(torch.bfloat16, "silu", cl=True)),
        ("group_norm_silu_channels_last", lambda: norm(torch.bfloat16, cl=True, per_sample=True)),
        ("group_norm_silu_backward_channels_last", lambda: norm_backward(torch.bfloat16, cl=True, per_sample=True)),
        ("group_norm_silu_identity", lambda: norm(torch.float32, "none")),
        ("group_norm_silu_in_parts", lambda: norm(torch.float32, shape=(2, 96, 160, 160))),
        ("group_norm_silu_backward_in_parts", lambda: norm_backward(torch.float32, cl=True, shape=(2, 96, 160, 160))),
        ("group_norm_silu_of_one_number", lambda: norm(torch.float32, shape=(1, 1, 1, 1), groups=1)),
        ("group_norm_silu_backward_of_one_number", lambda: norm_backward(torch.float32, shape=(1, 1, 1, 1), groups=1)),
    ]
    for backward, cl, launch in (
        (False, True, 0),
        (False, True, 1),
        (True, True, 0),
        (True, True, 1),
        (False, False, 1),
    ):
        shape = FEATURES if cl else (1, 1, 1, 2)
        call = functools.partial(batch_norm, torch.bfloat16, cl=cl, shape=shape, backward=backward)
        yield Case(f"batch_norm_silu{'_backward' * backward}_{cl}_{launch}", call, "mixed", 90, launch=launch)
    for direction in ("", "_backward"):
        options: list[tuple[str, dict[str, Any]]] = [
            ("channels_last", {"cl": True, "per_sample": True}),
            ("wide_channels_last", {"cl": True, "shape": (16, 1024, 8, 8), "per_sample": True}),
            ("in_runs", {"shape": (16, 2048, 8, 8)}),
            ("in_runs_channels_last", {"shape": (1, 24576, 2, 2), "cl": True}),
            ("of_one_number", {"shape": (1, 1, 1, 1)}),
        ]
        for case, chosen in options:
            function = functools.partial(rms_norm, torch.bfloat16, backward=bool(direction), **chosen)
            extra.append((f"rms_norm_silu{direction}_{case}", function))
    yield from (Case(name, call, "mixed", 90) for name, call in extra)
    in_parts = {"group_norm_silu": norm, "group_norm_silu_backward": norm_backward}
    for name, function in in_parts.items():
        call = functools.partial(function, torch.bfloat16, cl=True, shape=(2, 96, 160, 160))
        yield Case(f"{name}_sums_of_parts", call, "mixed", 90, launch=0)


def job(case: Case) -> Job:
    """The launch of a case as it is recorded."""
    with aot.recorded() as launches:
        case.call()
    promised = (case.wide_loads, case.wide_stores, case.narrow)
    return Job("ops", case.name, case.dtype, case.capability, launches[case.launch], *promised)


def jobs() -> list[Job]:
    """All of them."""
    return [job(case) for case in cases()]
