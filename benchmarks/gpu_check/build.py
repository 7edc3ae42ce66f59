"""Builds the extension in place, with its CUDA half, from what is installed; then lets the package say what works.

    python -m gpu_check.build --out FILE.json [--again]

Nothing is built where the extension is newer than its sources and has the kernels for sm_80 and sm_90.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from .files import save

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = "80-real 90"
TOOLS = ("scikit_build_core", "pybind11")

ASK = """
import json
from ddpm_fast.backends import native
info = {} if native._C is None else dict(native._C.build_info())
file = "" if native._C is None else native._C.__file__
print(json.dumps({"file": file, "architectures": info.get("cuda_architectures", "")}))
"""


def extension() -> dict[str, str]:
    """The file of the installed extension and the architectures of its kernels, "" for what is missing."""
    asked = subprocess.run([sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode:
        return {"file": "", "architectures": ""}
    found: dict[str, str] = json.loads(asked.stdout.strip().splitlines()[-1])
    return found


def up_to_date(found: dict[str, str]) -> bool:
    """Whether that extension is this checkout's, complete and newer than all that it is made of."""
    file = Path(found["file"])
    if found["architectures"] != ARCHITECTURES or not file.is_relative_to(ROOT):
        return False
    made_of = [*(ROOT / "csrc").rglob("*.*"), ROOT / "CMakeLists.txt", ROOT / "setup.py", ROOT / "pyproject.toml"]
    return file.stat().st_mtime > max(path.stat().st_mtime for path in made_of)


def install() -> list[str]:
    """The command that builds. Without isolation, hence without a network, where the tools of a build are there."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        "--editable",
        str(ROOT),
    ]
    there = all(importlib.util.find_spec(tool) for tool in TOOLS) and shutil.which("cmake") and shutil.which("ninja")
    return [*command, "--no-build-isolation"] if there else command


def main(argv: list[str] | None = None) -> int:
    """Build, ask, write, print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    options.add_argument("--again", action="store_true", help="build even if everything is up to date")
    given = options.parse_args(argv)
    # cmake and ninja lie beside the Python that runs this, which need not be on the PATH.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    began, failures, command = time.perf_counter(), list[str](), []
    found = extension()
    if given.again or not up_to_date(found):
        command = install()
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "DDPM_FAST_CUDA": "ON"}, check=False)
        if done.returncode:
            failures.append(f"the build ended with exit code {done.returncode}; its messages are above")
        found = extension()
    if not failures and found["architectures"] != ARCHITECTURES:
        failures.append(f"the extension has kernels for {found['architectures'] or 'no GPU'}, not for {ARCHITECTURES}")
    took = time.perf_counter() - began
    figures = {
        "stage": "build",
        "ok": not failures,
        "failures": failures,
        "rehearsal": False,
        "command": command,
        "seconds": round(took, 1),
        "extension": found,
    }
    save(given.out, figures)
    if not failures:
        subprocess.run([sys.executable, "-m", "ddpm_fast"], cwd=ROOT, check=False)
    for failure in failures:
        print(f"build: {failure}", file=sys.stderr)
    print(f"build: {'built' if command else 'up to date'}, {took:.0f} s" if not failures else "build: failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
