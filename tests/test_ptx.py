"""The COMPILED Triton kernels without a GPU: their PTX for sm_90 and sm_80 executed by benchmarks/gpu_check/ptx.

Each file of tests/ptx_on_cpu runs in a child process, because kernels decorated under TRITON_INTERPRET=1 cannot be
compiled: the machine on code written by hand, kernels against the reference, and faults planted in kernels. The op
tests themselves can run on compiled code, too, which takes minutes:

    DDPM_FAST_TEST_PTX=90 pytest tests/test_normal.py tests/test_triton_conv.py ... -k "not opcheck"
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; pip install 'ddpm_fast[triton]'")

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler"
)


def child(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without Triton's interpreter, with this checkout's package and benchmarks."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_INTERPRET"))
    }
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), inherited.get("PYTHONPATH", "")])
    environment = {**inherited, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(
    ("file", "least"), [("check_machine.py", 20), ("check_faults.py", 20), ("check_kernels.py", 40)]
)
def test_compiled_code_on_the_cpu(file, least):
    done = child("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(TESTS / "ptx_on_cpu" / file))
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    closing = re.search(r"^(\d+) passed\b(?!.*(?:skipped|failed))", done.stdout, re.M)
    assert closing is not None, done.stdout
    assert int(closing[1]) >= least


def test_the_stage_of_gpu_check(tmp_path):
    out = tmp_path / "compiled_code.json"
    done = child("-m", "gpu_check.compiled_code", "--out", str(out), "--rehearse")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["stage"] == "compiled_code"
    assert found["rehearsal"]
    assert found["ok"]
    assert found["failures"] == []
    assert {row["capability"] for row in found["cases"]} == {80, 90}
    assert all(row["wrong"] is None and row["instructions"] for row in found["cases"])
    assert any("needs no GPU either" in line for line in found["not_done"])
    assert "compiled_code: ok" in done.stdout
