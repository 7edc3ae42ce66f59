"""The CUDA kernels, run on the CPU, against the C++ half: the same bits for every dtype, format, alignment and option.

Run by tests/test_cuda_on_cpu.py in a child process under AddressSanitizer, with the path of the module in
DDPM_FAST_SHIM_MODULE. NumPy only: this is about memory accesses, tails and indices; the op tests judge the formulas.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GUARD = 0xAB
DTYPES = {"float32": (0, np.float32), "bfloat16": (1, np.uint16), "float16": (2, np.float16), "uint8": (3, np.uint8)}
FLOATS = ["float32", "bfloat16", "float16"]
# (n, channels, inner): whole quads and packs, tails of every length, one element, nothing
SHAPES = [
    (2, 3, 64),
    (3, 8, 16),
    (2, 4, 6),
    (3, 5, 7),
    (1, 1, 1),
    (2, 1, 3),
    (1, 1, 1023),
    (2, 64, 1),
    (0, 3, 4),
    (2, 3, 0),
]
STEPS = 4


def layouts() -> Iterator[Any]:
    """(shape, last, shift, dtype): all dtypes as they come, two channels last or misaligned, one that is both."""
    for i, shape in enumerate(SHAPES):
        for last, shift in itertools.product((False, True), (0, 1)):
            for dtype in (FLOATS[(i + k) % 3] for k in range(last + shift, 3)):
                name = f"{'x'.join(map(str, shape))}{'-last' * last}{'-shifted' * shift}-{dtype}"
                yield pytest.param(shape, last, shift, dtype, id=name)


every_layout = pytest.mark.parametrize(("shape", "last", "shift", "dtype"), list(layouts()))


def load_module() -> Any:
    spec = importlib.util.spec_from_file_location("_C_shim", os.environ["DDPM_FAST_SHIM_MODULE"])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


C = load_module()
libc = ctypes.CDLL(None)
libc.posix_memalign.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


@dataclass
class Buffer:
    """An argument in memory of exactly its size, ``shift`` elements behind an aligned address; None: to be written."""

    count: int
    dtype: str
    values: np.ndarray | None = None
    shift: int = 0
    tolerance: float | None = None  # None: bits
    results: list[np.ndarray] = field(default_factory=list)

    def place(self) -> int:
        kind = np.dtype(DTYPES.get(self.dtype, (0, self.dtype))[1])
        size = (self.count + self.shift) * kind.itemsize
        base = ctypes.c_void_p()
        assert libc.posix_memalign(ctypes.byref(base), 64, size) == 0
        assert base.value is not None
        self.base = base.value
        raw = np.frombuffer((ctypes.c_uint8 * size).from_address(self.base), np.uint8)
        raw[:] = GUARD
        self.front = raw[: self.shift * kind.itemsize]
        self.data = raw[self.shift * kind.itemsize :].view(kind)
        if self.values is not None:
            self.data[:] = self.values
        return self.base + self.shift * kind.itemsize

    def collect(self) -> None:
        assert (self.front == GUARD).all(), "wrote in front of the array"
        self.results.append(self.data.copy())
        del self.data, self.front
        libc.free(self.base)

    def compare(self, what: str) -> None:
        cpu, cuda = (decoded(result, self.dtype) for result in self.results)
        if self.tolerance is None:
            np.testing.assert_array_equal(cuda, cpu, what, strict=True)
        else:
            np.testing.assert_allclose(cuda, cpu, self.tolerance, self.tolerance, err_msg=what)


def decoded(data: np.ndarray, dtype: str) -> np.ndarray:
    return (data.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else data


def both(op: str, *args: Any, case: object = "") -> None:
    """Call the op of both halves with the same arguments and compare all buffers, the inputs included."""
    buffers = list({id(a): a for a in args if isinstance(a, Buffer)}.values())  # one may stand in two places
    for buffer in buffers:
        buffer.results.clear()
    for device, stream in ((-1, 1), (0, 0)):
        places = {id(buffer): buffer.place() for buffer in buffers}
        getattr(C, op)(device, stream, *[places.get(id(a), a) for a in args])
        for buffer in buffers:
            buffer.collect()
    for place, argument in enumerate(args):
        if isinstance(argument, Buffer):
            argument.compare(f"{op}, case {case}, argument {place}")


class Data:
    """Random arguments for one shape; every array begins ``shift`` elements behind an aligned address."""

    def __init__(self, shape: tuple[int, int, int], last: bool, shift: int) -> None:
        self.random = np.random.default_rng(7)
        self.n, self.channels, self.inner = shape
        self.size = self.n * self.channels * self.inner
        self.shape = (*shape, last)
        self.shift = shift

    def array(self, dtype: str = "float32", count: int | None = None) -> Buffer:
        count = self.size if count is None else count
        values = self.random.standard_normal(count).astype(np.float32)
        if dtype == "uint8":
            values = self.random.integers(0, 256, count, np.uint8)
        elif dtype == "bfloat16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        return Buffer(count, dtype, values, self.shift)

    def output(self, dtype: str = "float32", count: int | None = None, tolerance: float | None = None) -> Buffer:
        return Buffer(self.size if count is None else count, dtype, None, self.shift, tolerance)

    def fixed(self, values: Any, dtype: Any) -> Buffer:
        values = np.asarray(values, dtype)
        return Buffer(values.size, dtype, values)

    def rng(self) -> Buffer:
        return self.fixed([2024, 2**33 - 1], np.int64)

    def t(self) -> Buffer:
        return self.fixed([1, STEPS, STEPS - 1][: self.n], np.int64)  # the second is out of range

    def noising_table(self) -> Buffer:
        return self.array(count=2 * STEPS)


def code(dtype: str) -> int:
    return DTYPES[dtype][0]


def test_golden_bits() -> None:
    golden = json.loads((Path(__file__).parents[1] / "data" / "golden_normal.json").read_text())
    for case in golden[:-1]:
        out = np.empty(len(case["bits"]), np.float32)
        rng = np.array([case["seed"], case["sample"]], np.uint64)
        C.normal(0, 0, 1, 1, out.size, False, out.ctypes.data, 0, rng.ctypes.data, case["stream"])
        assert [f"{bits:08x}" for bits in out.view(np.uint32)] == case["bits"]


@every_layout
def test_normal(shape: tuple[int, int, int], last: bool, shift: int, dtype: str) -> None:
    data = Data(shape, last, shift)
    both("normal", *data.shape, data.output(dtype), code(dtype), data.rng(), 5)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 1023, 4096])
def test_random_bits(count: int) -> None:
    data = Data((3, 1, count), False, 0)
    both("random_bits", 3, count, Buffer(3 * count, np.int64), data.rng(), 5)


@every_layout
def test_q_sample(shape: tuple[int, int, int], last: bool, shift: int, dtype: str) -> None:
    data = Data(shape, last, shift)
    for k, (x0, noise) in enumerate(itertools.product([*FLOATS, "uint8"], ["drawn", "given", "offset"])):
        target = k % 4
        both(
            "q_sample",
            *(*data.shape, data.array(x0), code(x0), data.t(), data.noising_table(), STEPS),
            *(data.array() if noise == "given" else 0, data.rng(), 5, 0.1 if noise == "offset" else 0.0, 9),
            *(target, data.output(dtype), data.output(dtype) if target else 0, code(dtype)),
            case=(x0, noise, target),
        )


@every_layout
def test_q_sample_backward(shape: tuple[int, int, int], last: bool, shift: int, dtype: str) -> None:
    data = Data(shape, last, shift)
    for target, missing in [(0, "g_target"), (1, ""), (2, "g_eps"), (3, ""), (3, "g_x_t"), (3, "g_x0")]:
        both(
            "q_sample_backward",
            *data.shape,
            0 if missing == "g_x_t" else data.array(dtype),
            0 if missing == "g_target" else data.array(dtype),
            *(code(dtype), data.t(), data.noising_table(), STEPS, target),
            *(0 if missing == "g_x0" else data.output(dtype), code(dtype)),
            0 if missing == "g_eps" else data.output(),
            case=(target, missing),
        )


@every_layout
def test_add_bias_temb(shape: tuple[int, int, int], last: bool, shift: int, dtype: str) -> None:
    data = Data(shape, last, shift)
    for silu, missing in itertools.product([False, True], ["", "bias", "temb", "sums"]):
        other = "float32" if missing == "sums" else dtype
        bias = data.array(other, data.channels)
        temb = data.array(dtype, data.n * data.channels)
        both(
            "add_bias_temb",
            *(*data.shape, data.array(dtype), code(dtype), 0 if missing == "bias" else bias, code(other)),
            *(0 if missing == "temb" else temb, code(dtype), silu, data.output(dtype)),
            case=(silu, missing),
        )
        sums = [data.output(count=data.n * data.channels, tolerance=2e-6 * (1 + data.inner**0.5)) for _ in range(2)]
        both(
            "add_bias_temb_backward",
            *(*data.shape, data.array(dtype), code(dtype)),
            *(data.array(dtype) if silu else 0, code(dtype)),
            *(bias if silu and missing != "bias" else 0, code(other), silu),
            data.output(dtype) if missing != "temb" else 0,
            *([0, 0] if missing == "sums" else sums),
            case=(silu, missing),
        )


@every_layout
def test_ddpm_step(shape: tuple[int, int, int], last: bool, shift: int, dtype: str) -> None:
    data = Data(shape, last, shift)
    table = data.array(count=8 * STEPS)
    assert table.values is not None
    table.values.reshape(STEPS, 8)[:, 7] = [0.5, 1.0, np.inf, np.inf]
    table.values.reshape(STEPS, 8)[3, 6] = 0.0  # no noise at the last step
    cases = [("", row, "") for row in (0, 2, 3, -5, STEPS)]
    cases += [(option, 1, "") for option in ("given", "guided", "threshold", "history", "logvar", "range", "out")]
    cases += [("history out", 1, "")]
    cases += [(option, 1, copy) for option in ("copy", "copy_across", "given copy") for copy in ("uint8", dtype)]
    for option, row, copy in cases:
        history = data.array()
        both(
            "ddpm_step",
            *(*data.shape, data.array(), data.array(dtype), code(dtype)),
            *((data.array(dtype), code(dtype), data.array(count=1)) if option == "guided" else (0, 0, 0)),
            *(table, data.fixed([999, 500, 250, 0], np.int32), STEPS, data.fixed([row], np.int64)),
            *(data.array() if "given" in option else 0, data.rng()),
            history if "history" in option else 0,
            *((data.array(dtype), code(dtype)) if option in ("logvar", "range") else (0, 0)),
            data.array(count=2 * STEPS) if option == "range" else 0,
            data.fixed([0.5, 1.0, 2.0][: data.n], np.float32) if option == "threshold" else 0,
            history if option == "history out" else data.output() if option == "out" else 0,
            *((data.output(copy), code(copy), last != (option == "copy_across")) if copy else (0, 0, False)),
            data.fixed([-1], np.int32),
            case=(option, row, copy),
        )


@every_layout
@pytest.mark.parametrize("noise", ["drawn", "given", "offset"])
def test_noise_mse(shape: tuple[int, int, int], last: bool, shift: int, dtype: str, noise: str) -> None:
    data = Data(shape, last, shift)
    for target, loss in itertools.product((1, 2, 3), (0, 1, 2)):
        images = ["uint8", "float32", "bfloat16"][loss]
        common = [
            *(*data.shape, data.array(dtype), code(dtype), data.array(images), code(images)),
            *(data.t(), data.noising_table(), STEPS, data.array() if noise == "given" else 0, data.rng(), 5),
            *(0.1 if noise == "offset" else 0.0, 9, target, loss, 0.8),
        ]
        both("noise_mse", *common, data.output(count=data.n, tolerance=1e-6), 0, 0, case=(target, loss))
        both("noise_mse_backward", *common, data.array(count=data.n), data.output(dtype), case=(target, loss))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("columns", [0, 1, 2, 100])
@pytest.mark.parametrize("inner", [1024, 16384, 16383])
def test_noise_mse_of_large_samples(last: bool, columns: int, inner: int) -> None:
    """A warp, a block and several blocks a sample; never more partial sums than there is room for."""
    data = Data((2, 3, inner), last, 0)
    workspace = Buffer(2 * columns, "float32", tolerance=1e30) if columns else 0  # anything may be left there
    out = data.output(count=2, tolerance=3e-7)
    both(
        "noise_mse",
        *(*data.shape, data.array(), 0, 0, 0, 0, 0, 0, 0, data.rng(), 5, 0.0, 9, 1, 0, 1.0),
        *(out, workspace, columns),
    )


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("inner", [60, 64, 1024, 2052, 5000, 5001])
@pytest.mark.parametrize("channels", [3, 32, 36])
def test_sums_of_large_samples(last: bool, inner: int, channels: int) -> None:
    """Groups of 4 and 32 threads and whole blocks, with and without a tail; several blocks of channels."""
    data = Data((1, channels, inner), last, 0)
    g, h, bias = data.array(), data.array(), data.array(count=channels)
    sums = [data.output(count=channels, tolerance=1e-5) for _ in range(2)]
    both("add_bias_temb_backward", *data.shape, g, 0, h, 0, bias, 0, True, data.output(), *sums)


@pytest.mark.parametrize("last", [False, True])
def test_batches_that_take_several_launches(last: bool) -> None:
    """The build allows 2**16 threads a launch; each of these batches needs more."""
    data = Data((100, 36, 84), last, 0)
    table, t = data.noising_table(), data.fixed(np.arange(data.n) % STEPS, np.int64)
    both("normal", *data.shape, data.output(), 0, data.rng(), 5)
    both("random_bits", data.n, 36 * 84, Buffer(data.size, np.int64), data.rng(), 5)
    both("q_sample", *data.shape, data.array(), 0, t, table, STEPS, 0, data.rng(), 5, 0.0, 9, 0, data.output(), 0, 0)
    bias, temb = data.array(count=36), data.array(count=data.n * 36)
    both("add_bias_temb", *data.shape, data.array(), 0, bias, 0, temb, 0, False, data.output())

    data = Data((150 if last else 600, 36, 4), last, 0)
    sums = [data.output(count=data.n * 36, tolerance=1e-5) for _ in range(2)]
    both("add_bias_temb_backward", *data.shape, data.array(), 0, 0, 0, 0, 0, False, data.output(), *sums)

    data = Data((2100, 3, 4), last, 0)
    arguments = [data.array(), 0, 0, 0, 0, 0, 0, 0, data.rng(), 5, 0.0, 9, 1, 0, 1.0]
    both("noise_mse", *data.shape, *arguments, data.output(count=data.n, tolerance=1e-6), 0, 0)


def test_the_sum_of_an_infinite_gradient_is_infinite() -> None:
    g = np.ones(4096, np.float32)
    g[77] = np.inf
    total = np.zeros(1, np.float32)
    C.add_bias_temb_backward(0, 0, 1, 1, 4096, False, g.ctypes.data, 0, 0, 0, 0, 0, False, 0, 0, total.ctypes.data)
    assert total[0] == np.inf


def test_errors_come_back_as_exceptions() -> None:
    out, rng = np.empty(4, np.float32), np.zeros(2, np.int64)
    with pytest.raises(RuntimeError, match="invalid device"):
        C.normal(1, 0, 1, 1, 4, False, out.ctypes.data, 0, rng.ctypes.data, 0)
    with pytest.raises(RuntimeError, match="2147483644"):
        C.normal(0, 0, 1, 1, 2**31, False, out.ctypes.data, 0, rng.ctypes.data, 0)
