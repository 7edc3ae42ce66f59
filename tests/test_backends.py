"""Which backend serves: automatic choice, explicit requests that never fall back, the report."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import ddpm_fast
from ddpm_fast import __main__ as report_module
from ddpm_fast import backends, ops
from ddpm_fast.backends import native
from ddpm_fast.ops._schema import SCHEMAS

CPU = torch.device("cpu")


def child(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_every_backend_implements_every_op():
    for name in backends.BACKENDS:
        module = __import__(f"ddpm_fast.backends.{name}", fromlist=["_"])
        missing = [op for op in SCHEMAS if not callable(getattr(module, op, None))]
        assert not missing, f"{name} lacks {missing}"


def test_native_serves_the_cpu_by_default():
    assert backends.resolve("normal", torch.zeros(1, 1)) is native.normal


def test_float64_is_served_by_the_reference():
    from ddpm_fast.backends import reference

    assert backends.resolve("q_sample", torch.zeros(1, 1, dtype=torch.float64)) is reference.q_sample


def test_use_backend_as_a_call_and_as_a_context():
    from ddpm_fast.backends import reference

    x = torch.zeros(1, 1)
    with ddpm_fast.use_backend("reference"):
        assert backends.resolve("normal", x) is reference.normal
        with ddpm_fast.use_backend("native"):
            assert backends.resolve("normal", x) is native.normal
        assert backends.resolve("normal", x) is reference.normal
    assert backends.resolve("normal", x) is native.normal
    ddpm_fast.use_backend("reference")
    assert backends.resolve("normal", x) is reference.normal
    ddpm_fast.use_backend(None)
    assert backends.resolve("normal", x) is native.normal


def test_unknown_backend_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown backend 'cuda'.*reference, native, triton"):
        ddpm_fast.use_backend("cuda")


def test_an_explicit_request_never_falls_back(monkeypatch):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_import_error", "No module named _C")
    with (
        ddpm_fast.use_backend("native"),
        pytest.raises(
            RuntimeError, match=r"'native' was asked for.*is missing \(No module named _C\).*Available here: ref"
        ),
    ):
        ddpm_fast.normal(1, (4,), seed=0)
    assert ddpm_fast.normal(1, (4,), seed=0).shape == (1, 4), "the automatic choice goes on to the reference"


def test_float64_on_an_explicit_backend_raises():
    x = torch.zeros(1, 2, dtype=torch.float64)
    with (
        ddpm_fast.use_backend("native"),
        pytest.raises(RuntimeError, match="float64 is computed by the reference backend"),
    ):
        ops.add_bias_temb(x)


def test_triton_without_gpu_or_interpreter_says_how_to_get_it():
    done = child(
        "import ddpm_fast; ddpm_fast.use_backend('triton'); ddpm_fast.normal(1, (4,), seed=0)", TRITON_INTERPRET="0"
    )
    assert done.returncode == 1
    assert "TRITON_INTERPRET=1" in done.stderr
    assert "Available here: reference, native" in done.stderr


def test_environment_variable_chooses():
    code = (
        "import importlib, os, torch; from ddpm_fast import backends as b\n"
        "print(b.resolve('normal', torch.zeros(1, 1)).__module__)\n"
        "os.environ['DDPM_FAST_BACKEND'] = 'fast'\n"
        "importlib.reload(b).resolve('normal', torch.zeros(1, 1))\n"
    )
    done = child(code, DDPM_FAST_BACKEND="reference")
    assert done.stdout.strip() == "ddpm_fast.backends.reference"
    assert "unknown backend 'fast'" in done.stderr


def test_import_needs_neither_triton_nor_the_extras():
    """A machine with torch and numpy only."""
    blocked = ("triton", "PIL", "tqdm", "sklearn", "safetensors", "matplotlib")
    code = (
        "import sys\n"
        f"for name in {blocked!r}: sys.modules[name] = None\n"
        "import ddpm_fast, torch\n"
        "x = ddpm_fast.normal(2, (3, 4, 4), seed=0)\n"
        "from ddpm_fast.backends import triton, unavailable_reason\n"
        "print(unavailable_reason('triton', torch.device('cuda')))\n"
        "print(triton.unavailable_reason(torch.device('cpu')), hasattr(triton, 'normal'))\n"
    )
    done = child(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    cuda, cpu = done.stdout.splitlines()
    assert "triton" in cuda
    assert "ddpm_fast[triton]" in cpu
    assert cpu.endswith("False")


def test_report_names_what_was_built_and_what_serves(capsys):
    assert report_module.main() == 0
    text = capsys.readouterr().out
    assert f"ddpm_fast {ddpm_fast.__version__}" in text
    assert "served by native" in text
    assert "extension:" in text
    for op in SCHEMAS:
        assert op in text


def test_report_without_the_extension(monkeypatch, capsys):
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_import_error", "No module named _C")
    assert report_module.main() == 1
    text = capsys.readouterr().out
    assert "pip install" in text
    assert "served by reference" in text


def test_report_compares_driver_and_runtime(monkeypatch):
    class Built:
        __file__ = "somewhere"

        @staticmethod
        def build_info():
            return {
                "compiler": "12",
                "cuda": True,
                "cuda_architectures": "80 90",
                "cuda_runtime": "13.0",
                "cuda_driver": "12.2",
                "cuda_devices": 0,
                "cuda_error": "CUDA driver version is insufficient for CUDA runtime version",
            }

    monkeypatch.setattr(native, "_C", Built)
    native._cuda_reason.cache_clear()
    try:
        reason = native.unavailable_reason(torch.device("cuda"))
        assert reason is not None
        for word in ("13.0", "12.2", "insufficient", "update the NVIDIA driver"):
            assert word in reason
        assert "CUDA is not usable" in "\n".join(report_module.build_lines())
    finally:
        native._cuda_reason.cache_clear()


@pytest.mark.parametrize(
    ("built", "capability", "served"),
    [
        ("80-real 90", (8, 0), True),
        ("80-real 90", (8, 9), True),
        ("80-real 90", (9, 0), True),
        ("80-real 90", (12, 0), True),  # by PTX
        ("80-real 90", (7, 5), False),
        ("80-real", (9, 0), False),
        ("native", (7, 5), True),
    ],
)
def test_a_gpu_that_nothing_was_compiled_for_says_so(monkeypatch, built, capability, served):
    class Built:
        @staticmethod
        def build_info():
            return {"cuda": True, "cuda_architectures": built, "cuda_error": ""}

    monkeypatch.setattr(native, "_C", Built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    native._cuda_reason.cache_clear()
    try:
        reason = native.unavailable_reason(torch.device("cuda", 0))
        assert (reason is None) == served
        if not served:
            number = "".join(map(str, capability))
            assert f"compiled for {built}" in reason
            assert f"-DCMAKE_CUDA_ARCHITECTURES={number}" in reason
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "torch built for CUDA" in native.unavailable_reason(torch.device("cuda", 0))
    finally:
        native._cuda_reason.cache_clear()


def test_pool_survives_a_fork():
    """A DataLoader worker is a fork: the parent's threads do not exist there."""
    code = (
        "import ddpm_fast, torch, os, sys\n"
        "torch.set_num_threads(2)\n"
        "big = lambda: ddpm_fast.normal(4, (3, 128, 128), seed=1)\n"
        "expected = big()\n"
        "pid = os.fork()\n"
        "if pid == 0: os._exit(0 if torch.equal(big(), expected) else 3)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_threads_share_the_pool():
    """Calls from several Python threads at once give the same bits as alone."""
    from concurrent.futures import ThreadPoolExecutor

    expected = [ddpm_fast.normal(4, (3, 64, 64), seed=seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(lambda seed: ddpm_fast.normal(4, (3, 64, 64), seed=seed), range(8)))
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
