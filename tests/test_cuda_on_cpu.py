"""The CUDA kernels without a GPU: compiled for the CPU (tests/cuda_on_cpu) and run under AddressSanitizer and UBSan.

Each test runs a child process, because the sanitizers must be loaded before Python is. What the children check is in
tests/cuda_on_cpu/check_kernels.py and in the op tests themselves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS / "cuda_on_cpu"))

import build  # noqa: E402

OPS = [
    "normal",
    "q_sample",
    "add_bias_temb",
    "batch_norm_silu",
    "group_norm_silu",
    "rms_norm_silu",
    "ddpm_step",
    "noise_mse",
]

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs Linux and g++: the lanes of a block switch stacks"
)


@pytest.fixture(scope="module")
def module() -> Path:
    """The sanitized module, built once per state of csrc/ and kept below build/."""
    return build.build(TESTS.parent / "build" / "cuda_on_cpu")


def sanitized(module: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the sanitizers loaded and the module named in DDPM_FAST_SHIM_MODULE."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "DDPM_FAST_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS.parent,
        env={
            **inherited,
            "LD_PRELOAD": build.preload(),
            "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until it ends
            "DDPM_FAST_SHIM_MODULE": str(module),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )


def passed(module: Path, *arguments: str, **environment: str) -> int:
    """How many tests pass in a sanitized pytest; all of them do, and none is skipped."""
    done = sanitized(module, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, **environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    closing = done.stdout.strip().splitlines()[-1]
    found = re.fullmatch(r"(\d+) passed(, \d+ deselected)?(, \d+ warnings?)? in .*", closing)
    assert found is not None, closing
    return int(found.group(1))


def test_the_op_tests_pass_with_the_cuda_kernels(module: Path) -> None:
    files = [str(TESTS / f"test_{op}.py") for op in OPS]
    # Those of the device fixture, which alone brings the module in. opcheck looks at how an op is declared, the same
    # for every backend; two tests look at the C++ half; and one imports a package that takes seconds.
    chosen = "cuda_on_cpu and not opcheck and not many_samples and not threads_change and not real_package"
    assert passed(module, *files, "-k", chosen, DDPM_FAST_TEST_BACKEND="cuda_on_cpu") > 850


def test_the_kernels_equal_the_cpp_half(module: Path) -> None:
    names = ("check_kernels.py", "check_batch_norm.py", "check_group_norm.py", "check_rms_norm.py")
    files = [str(TESTS / "cuda_on_cpu" / name) for name in names]
    assert passed(module, "--noconftest", *files) > 850


def test_divisions_by_multiplication_are_right(tmp_path: Path) -> None:
    program = tmp_path / "check_division"
    source = TESTS / "cuda_on_cpu" / "check_division.cpp"
    build.run([build.compiler(), "-std=c++17", "-O1", f"-I{build.CSRC}", str(source), "-o", str(program)])
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_an_access_outside_of_an_array_is_found(module: Path) -> None:
    """The safety net itself: an output one element too short ends the process."""
    script = (
        f"import sys; sys.path.insert(0, {str(TESTS / 'cuda_on_cpu')!r})\n"
        "import numpy as np; from check_kernels import C, Buffer\n"
        "out, rng = Buffer(6, 'float32'), np.zeros(2, np.int64)\n"
        "C.normal(0, 0, 1, 1, 7, False, out.place(), 0, rng.ctypes.data, 0)\n"
    )
    done = sanitized(module, "-c", script)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "normal_kernel" in done.stderr


@pytest.fixture(scope="module", params=["", "-DCUDA_ON_CPU_UCONTEXT"], ids=["assembly", "ucontext"])
def lanes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program check_lanes, with either way to switch between lanes."""
    program = tmp_path_factory.mktemp("lanes") / "check_lanes"
    options = [*build.SANITIZERS, *([request.param] if request.param else [])]
    source = TESTS / "cuda_on_cpu" / "check_lanes.cpp"
    build.run([build.compiler(), "-std=c++17", "-Og", "-pthread", *options, str(source), "-o", str(program)])
    return program


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("none", ""),
        ("beyond the input", r"heap-buffer-overflow(.|\n)*sum_kernel"),  # the report names the kernel
        ("beyond shared memory", "insufficient space|global-buffer-overflow"),  # either sanitizer sees it
        ("no barrier", "a sum is "),
        ("lane that ends", "a shuffle after some lanes of the warp have ended"),
        ("half a shuffle", "a barrier or shuffle was not reached by all lanes"),
    ],
)
def test_faults_of_a_kernel_are_found(lanes: Path, fault: str, found: str) -> None:
    done = subprocess.run([lanes, fault], capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == (fault == "none"), done.stdout + done.stderr
    assert re.search(found, done.stdout + done.stderr), done.stdout + done.stderr
