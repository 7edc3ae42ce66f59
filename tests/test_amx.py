"""The AMX matrix product: on emulated tiles wherever AVX512-BF16 runs, and on the processor's own where there are some.

The emulation (tests/amx_on_cpu/tile_registers.h) follows Intel's definition bit for bit and refuses what a processor
would refuse. Sums are compared with float64, and bit for bit with the order that gemm_amx.h promises.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS / "amx_on_cpu"))

import amx_build  # noqa: E402

PANEL = 16
STEP = 32  # k of one instruction
ROWS = 70
GUARD = 16 * 64  # a whole tile of rows written too many stays inside of it


def cpu_flags() -> set[str]:
    """What Linux says that the processor can do."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found.group(1).split()) if found else set()


FLAGS = cpu_flags()

pytestmark = [
    pytest.mark.skipif(
        platform.machine() not in {"x86_64", "AMD64"} or not sys.platform.startswith("linux"),
        reason="AMX is of x86-64, and the test reads /proc/cpuinfo",
    ),
    pytest.mark.skipif(amx_build.compiler() is None, reason="needs a C++ compiler"),
]


class Built:
    """What is compiled for this file."""

    def __init__(self, folder: Path) -> None:
        self.object = amx_build.kernel_object(folder, emulated=False)
        self.real = amx_build.library(folder, self.object, emulated=False)
        self.emulated = amx_build.library(folder, amx_build.kernel_object(folder, emulated=True), emulated=True)
        self.bounds, self.program = amx_build.checks(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("amx")
    if not amx_build.understands(folder, *amx_build.AMX):
        pytest.skip("the compiler or its assembler does not know AMX: GCC 11 or Clang 12 and binutils 2.36 do")
    return Built(folder)


@pytest.fixture(scope="module")
def real(built: Built) -> ctypes.CDLL:
    """The library as users get it."""
    library = ctypes.CDLL(str(built.real))
    library.usable.restype = ctypes.c_bool
    return library


@pytest.fixture(scope="module", params=["emulated", "processor"])
def amx(built: Built, real: ctypes.CDLL, request: pytest.FixtureRequest) -> ctypes.CDLL:
    """The library on emulated tiles, or on the processor's."""
    if request.param == "processor":
        if not real.usable():
            pytest.skip("this processor has no AMX or the system does not permit it; the emulated half has run")
        return real
    if "avx512_bf16" not in FLAGS:
        pytest.skip("the kernels need AVX512-BF16 even with emulated tiles")
    return ctypes.CDLL(str(built.emulated))


def bfloat16(x: np.ndarray) -> np.ndarray:
    """The upper halves of float32 values: exact for the values of this file, cut off for others."""
    return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def values(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Float32 numbers that bfloat16 holds, in [1/8, 2) and of either sign: products and sums of two are exact in
    float64, so that float32 arithmetic can be followed there."""
    rng = np.random.default_rng(seed)
    x = rng.choice([-1.0, 1.0], shape) * np.exp2(rng.integers(-3, 1, shape)) * (1 + rng.integers(0, 128, shape) / 128)
    return x.astype(np.float32)


def float32(x: np.ndarray) -> np.ndarray:
    """Rounded to float32, as float64."""
    return x.astype(np.float32).astype(np.float64)


def promised(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sums over segments and k of a [m, segments, k] and b [segments, k, columns] in the promised order: in each step
    of 32, one chain of fused multiply-adds over the even k and one over the odd, then their sum is added."""
    m, segments, k = a.shape
    total = np.zeros((m, b.shape[2]))
    for s in range(segments):
        for start in range(0, k, STEP):
            even, odd = np.zeros_like(total), np.zeros_like(total)
            for p in range(start, min(start + STEP, k), 2):
                even = float32(even + a[:, s, p, None].astype(np.float64) * b[s, p])
                odd = float32(odd + a[:, s, p + 1, None].astype(np.float64) * b[s, p + 1])
            total = float32(total + float32(even + odd))
    return total.astype(np.float32)


def packed(b: np.ndarray, panels: int) -> np.ndarray:
    """The weights [segments, k, columns] of the first panels as csrc/cpu/inference/pack.h lays a group out."""
    segments, k, _ = b.shape
    width = panels * PANEL
    full = np.zeros((segments, -(-k // STEP) * STEP, width), np.float32)
    full[:, :k] = b[:, :, :width]
    return np.ascontiguousarray(bfloat16(full).reshape(segments, -1, 2, width).transpose(0, 1, 3, 2))


class Rows:
    """The rows of a [m, segments, k] in memory, NaN wherever a row is not."""

    def __init__(self, a: np.ndarray, layout: str) -> None:
        m, segments, k = a.shape
        self.pointers: np.ndarray | None = None  # [segments, m]
        self.stride = k
        if layout == "contiguous":
            starts = np.arange(m) * k
        elif layout in {"strided", "spaced"}:
            self.stride = k + PANEL
            starts = np.arange(m * segments).reshape(segments, m) * self.stride
        elif layout == "widening":  # each 16 rows further apart than those before
            starts = np.cumsum(k + np.arange(m * segments) % m // 16 * PANEL).reshape(segments, m)
        elif layout == "broken":  # as pixels of images whose rows have 12
            starts = (np.arange(m * segments) * k + np.arange(m * segments) // 12 * PANEL).reshape(segments, m)
        else:  # irregular: another order and gaps of different sizes
            rng = np.random.default_rng(3)
            starts = np.empty(m * segments, np.int64)
            starts[rng.permutation(m * segments)] = np.cumsum(k + PANEL * rng.integers(1, 4, m * segments))
            starts = starts.reshape(segments, m)
        self.memory = np.full(int(starts.max()) + 2 * k + PANEL, 0x7FC0, np.uint16)
        for (s, i), start in np.ndenumerate(np.atleast_2d(starts)):
            self.memory[start : start + k] = bfloat16(a[i, s])
        if layout in {"spaced", "widening", "broken", "irregular"}:
            self.pointers = self.memory.ctypes.data + 2 * starts


def multiply(amx: ctypes.CDLL, rows: Rows, first: int, m: int, weights: np.ndarray, k: int) -> np.ndarray:
    """Sums of rows first .. first + m, with a look at the memory around them."""
    segments, _, width, _ = weights.shape
    memory = np.full(2 * GUARD + m * width, 55, np.float32)
    memory[GUARD:-GUARD] = np.nan
    chosen = None if rows.pointers is None else np.ascontiguousarray(rows.pointers[:, first : first + m])
    with_next = m % 2 == 1
    amx.multiply(
        ctypes.c_void_p(None if chosen is None else chosen.ctypes.data),
        ctypes.c_void_p(rows.memory.ctypes.data + 2 * first * rows.stride),
        *(ctypes.c_int64(n) for n in (rows.stride, m, segments, k)),
        ctypes.c_void_p(weights.ctypes.data),
        ctypes.c_void_p(weights.ctypes.data if with_next else None),
        ctypes.c_int64(weights.nbytes if with_next else 0),
        ctypes.c_int64(width // PANEL),
        ctypes.c_void_p(memory.ctypes.data + 4 * GUARD),
    )
    assert (memory[:GUARD] == 55).all()
    assert (memory[-GUARD:] == 55).all()
    return memory[GUARD:-GUARD].reshape(m, width)


@pytest.mark.parametrize("segments", [1, 9])
@pytest.mark.parametrize("k", [16, 32, 34, 48, 64, 272])
def test_sums_are_those_of_the_promised_order(amx: ctypes.CDLL, k: int, segments: int) -> None:
    """For every number of rows and panels, so that no bit of a row depends on how many come with it."""
    a, b = values((ROWS, segments, k), 1), values((segments, k, 4 * PANEL), 2)
    expected = promised(a, b)
    exact = np.einsum("msk,skc->mc", a.astype(np.float64), b)
    size = np.einsum("msk,skc->mc", np.abs(a).astype(np.float64), np.abs(b))
    assert (np.abs(expected - exact) <= 1e-6 * size).all()
    layouts = ["spaced", "widening", "broken", "irregular"] + (["contiguous", "strided"] if segments == 1 else [])
    everywhere = {layout: Rows(a, layout) for layout in layouts}
    for panels in range(1, 5):
        weights = packed(b, panels)
        for layout, rows in everywhere.items():
            for m in range(1, ROWS + 1):
                got = multiply(amx, rows, 0, m, weights, k)
                assert np.array_equal(got, expected[:m, : panels * PANEL]), (layout, panels, m)


def test_rows_may_be_cut_anywhere(amx: ctypes.CDLL) -> None:
    a, b = values((ROWS, 2, 80), 4), values((2, 80, 4 * PANEL), 5)
    rows, weights = Rows(a, "irregular"), packed(b, 4)
    whole = multiply(amx, rows, 0, ROWS, weights, 80)
    for cut in (1, 7, 16, 33, 69):
        parts = [multiply(amx, rows, 0, cut, weights, 80), multiply(amx, rows, cut, ROWS - cut, weights, 80)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_rows_may_be_one_and_the_same(amx: ctypes.CDLL) -> None:
    """As the pixels around an image are: one row of zeros, 0 bytes apart."""
    a, b = values((ROWS, 1, 48), 6), values((1, 48, 2 * PANEL), 7)
    a[3:60] = 0
    rows = Rows(a, "irregular")
    assert rows.pointers is not None
    rows.pointers[:, 4:60] = rows.pointers[0, 3]
    assert np.array_equal(multiply(amx, rows, 0, ROWS, packed(b, 2), 48), promised(a, b))


def instruction(amx: ctypes.CDLL, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """c + a b of one tile each: a [16, 32], b [32, 16]."""
    sums = np.ascontiguousarray(c, np.float32).copy()
    left, right = bfloat16(a), packed(b[None], 1)
    amx.instruction(*(ctypes.c_void_p(x.ctypes.data) for x in (left, right, sums)))
    return sums


def test_the_instruction_is_the_manual_s(amx: ctypes.CDLL) -> None:
    """Denormals are zeros on the way in and out, rounding is to nearest even, even and odd k are added apart."""
    a, b, c = (np.zeros(shape, np.float32) for shape in ((16, STEP), (STEP, 16), (16, 16)))
    denormal = np.float32(2.0**-127)
    a[0, 0], a[1, 0], a[2, 0], a[2, 1], a[3, 0] = denormal, 2.0**-70, 1, 1, 1
    b[0], b[1] = 2.0**60, 1
    b[0, 1], b[0, 2], b[1, 2] = 2.0**-70, 1, 2.0**-24
    c[4, 0] = denormal
    c[3, 2], c[2, 2] = 2.0**24, 2.0**24
    got = instruction(amx, a, b, c)
    assert got[0, 0] == 0  # a denormal factor
    assert got[1, 0] == np.float32(2.0**-10)
    assert got[1, 1] == 0  # a denormal product
    assert got[4, 0] == 0  # a denormal sum
    assert got[3, 2] == 2.0**24  # a tie: to even
    assert got[2, 2] == 2.0**24  # 1 + 2^-24 rounds to 1 before it is added; added at once they would give 2^24 + 2


def test_weights_are_padded_to_whole_instructions(amx: ctypes.CDLL) -> None:
    amx.k_multiple.restype = ctypes.c_int64
    assert amx.k_multiple() == STEP


def test_usable_is_what_the_processor_has_and_the_system_permits(real: ctypes.CDLL) -> None:
    usable, permitted = real.usable(), ctypes.c_uint64(0)
    arch_prctl, get_permission, tile_data = 158, 0x1022, 18
    ctypes.CDLL(None).syscall(arch_prctl, get_permission, ctypes.byref(permitted))
    has = {"amx_tile", "amx_bf16", "avx512_bf16"} <= FLAGS
    assert usable == (has and bool(permitted.value >> tile_data & 1))


@pytest.mark.skipif("avx512_bf16" not in FLAGS, reason="the kernels need AVX512-BF16 even with emulated tiles")
class TestEmulation:
    """What only emulated tiles can tell, and that they tell it."""

    @staticmethod
    def checked(program: Path) -> subprocess.CompletedProcess[str]:
        # Leaks are looked for by tracing the process, which some containers forbid, and none matters here.
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=120)

    def test_nothing_is_read_or_written_outside(self, built: Built) -> None:
        done = self.checked(built.bounds)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]

    def test_a_program_runs_every_kind_of_layer(self, built: Built) -> None:
        """Packing, transforms, products and ends fit together, within the rounding of bfloat16."""
        done = self.checked(built.program)
        assert done.returncode == 0, done.stdout + done.stderr[-4000:]
        assert done.stdout.count("relative error") == 24

    @pytest.mark.parametrize(
        ("which", "message"),
        [
            (0, "used without a configuration"),
            (1, "larger than 16 rows"),
            (2, "eight tiles"),
            (3, "not configured"),
            (4, "shapes of a product"),
            (5, "must differ"),
            (6, "used without a configuration"),
        ],
    )
    def test_misuse_ends_the_process(self, built: Built, which: int, message: str) -> None:
        script = f"import ctypes; ctypes.CDLL({str(built.emulated)!r}).misuse({which})"
        done = subprocess.run([sys.executable, "-S", "-c", script], capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert message in done.stderr


def disassembled(program: Path) -> dict[str, list[tuple[int, str, str]]]:
    """Address, mnemonic and operands of the instructions of each function."""
    functions: dict[str, list[tuple[int, str, str]]] = {}
    lines: list[tuple[int, str, str]] = []
    for line in amx_build.run("objdump", "-d", "--no-show-raw-insn", program).splitlines():
        if found := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            lines = functions.setdefault(found.group(1), [])
        elif found := re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)$", line):
            lines.append((int(found.group(1), 16), found.group(2), found.group(3)))
    return functions


def product_loops(lines: list[tuple[int, str, str]]) -> list[list[tuple[int, str, str]]]:
    """The innermost loops with a tile product."""
    loops = []
    for address, name, operands in lines:
        if name.startswith("j") and (found := re.match(r"([0-9a-f]+) ", operands)):
            start = int(found.group(1), 16)
            body = [line for line in lines if start <= line[0] <= address]
            if any(line[1] == "tdpbf16ps" for line in body):
                loops.append(body)
    return [
        loop
        for loop in loops
        if not any(other is not loop and loop[0][0] <= other[0][0] <= other[-1][0] <= loop[-1][0] for other in loops)
    ]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump and nm (binutils)")
class TestMachineCode:
    """What the compiler made for real tiles."""

    def test_inner_loops_are_tiles_and_nothing_from_the_stack(self, built: Built) -> None:
        if "Free Software Foundation" not in amx_build.run(str(amx_build.compiler()), "--version"):
            pytest.skip("the loops are looked for as GCC writes them")
        shapes = set()
        for name, lines in disassembled(built.object).items():
            for loop in product_loops(lines):
                names = [mnemonic for _, mnemonic, _ in loop]
                shapes.add((names.count("tdpbf16ps"), names.count("tileloadd")))
                for _, mnemonic, operands in loop:
                    assert "%rsp" not in operands, (name, mnemonic, operands)
                    assert not re.search(r"-0x[0-9a-f]+\(%rbp\)", operands), (name, mnemonic, operands)
        # Products and loads of 2x2 tiles, of 1x4 and 4x1, 1x3, 1x2 and 2x1, 1x1.
        assert shapes == {(4, 4), (4, 5), (3, 4), (2, 3), (1, 2)}

    def test_only_the_table_is_seen_from_outside(self, built: Built) -> None:
        """An inline function compiled for AVX512 must not be the copy that other files get."""
        defined = [
            line.split() for line in amx_build.run("nm", "--defined-only", "--extern-only", built.object).splitlines()
        ]
        assert [(kind, name) for _, kind, name in defined] == [("T", "_ZN9ddpm_fast9inference16kernels_amx_bf16Ev")]
