"""Builds the AMX kernels for the tests: on the processor's tiles, on emulated ones, and under AddressSanitizer.

The flags are those of CMakeLists.txt. Needs g++ 11 or newer, or clang++ 12, on x86-64.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
INFERENCE = HERE.parents[1] / "csrc" / "cpu" / "inference"

WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized"]  # GCC 12 warns about its own intrinsics
COMMON = [
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",
]
CONTRACTED = ["-ffp-contract=fast", "-fno-trapping-math"]
AVX512 = ["-mavx2", "-mfma", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")), "-mprefer-vector-width=512"]
BF16 = [*CONTRACTED, *AVX512, "-mavx512bf16"]
AMX = [*BF16, "-mamx-tile", "-mamx-bf16"]
EMULATED = [*BF16, "-DDDPM_FAST_TILES_EMULATED", "-include", str(HERE / "tile_registers.h")]
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def run(*command: str | Path) -> str:
    """Run a command; its output. What it says when it fails becomes the error."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def compile_one(source: Path, target: Path, *flags: str) -> Path:
    """``source`` compiled to the object file ``target``."""
    found = compiler()
    assert found is not None
    run(found, *COMMON, *flags, "-c", source, "-o", target)
    return target


def understands(folder: Path, *flags: str) -> bool:
    """Whether the compiler and its assembler take these flags and make tile instructions."""
    source = folder / "understands.cpp"
    source.write_text("#include <immintrin.h>\nvoid f() { _tile_zero(0); _tile_dpbf16ps(0, 1, 2); }\n")
    try:
        compile_one(source, folder / "understands.o", *flags)
    except RuntimeError:
        return False
    return True


def kernel_object(folder: Path, *, emulated: bool) -> Path:
    """isa_amx_bf16.cpp as an object file."""
    target = folder / f"kernels_{'emulated' if emulated else 'amx'}.o"
    return compile_one(INFERENCE / "isa_amx_bf16.cpp", target, "-O3", *(EMULATED if emulated else AMX))


def library(folder: Path, kernels: Path, *, emulated: bool) -> Path:
    """The kernels in ``kernels`` as a library for ctypes."""
    name = "emulated" if emulated else "amx"
    found = compiler()
    assert found is not None
    target = folder / f"lib_{name}.so"
    glue = compile_one(
        HERE / "library.cpp",
        folder / f"library_{name}.o",
        *("-O1", "-fvisibility=default"),
        *(EMULATED if emulated else AMX),
    )
    permission = compile_one(INFERENCE / "amx_permission.cpp", folder / f"permission_{name}.o", "-O3")
    run(found, "-shared", glue, permission, kernels, "-o", target)
    return target


def checks(folder: Path) -> tuple[Path, Path]:
    """The programs check_bounds.cpp and check_program.cpp on emulated tiles, under AddressSanitizer and UBSan."""
    found = compiler()
    assert found is not None
    bounds, program = folder / "check_bounds", folder / "check_program"
    emulated = [INFERENCE / "isa_amx_bf16.cpp", HERE / "check_bounds.cpp"]
    names = ("attention", "convolution", "ends", "isa_plain", "linear_attention", "norm", "pack", "program", "rms_norm")
    plain = [INFERENCE / f"{name}.cpp" for name in names]
    plain += [INFERENCE.parent / "parallel.cpp", HERE / "check_program.cpp"]

    def one(source: Path) -> Path:
        # What is tested here is what the AMX kernels touch; the rest is only to be compiled quickly.
        flags = ["-O1", *EMULATED, *SANITIZED] if source in emulated else ["-O0", *CONTRACTED]
        return compile_one(source, folder / f"check_{source.stem}.o", *flags)

    with ThreadPoolExecutor(2) as pool:
        objects = dict(zip([*emulated, *plain], pool.map(one, [*emulated, *plain]), strict=True))
    run(found, *SANITIZED, *(objects[source] for source in emulated), "-o", bounds)
    run(found, *SANITIZED, "-pthread", objects[emulated[0]], *(objects[source] for source in plain), "-o", program)
    return bounds, program
