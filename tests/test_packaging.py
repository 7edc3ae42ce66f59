"""Installs anywhere: wheels build in isolation without torch, with and without nvcc, and import elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pybind11", reason="pip install pybind11")

import pybind11

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc")
# What pip says where it reaches nobody; that there is no such package would be a fault of ours.
NO_NETWORK = re.compile(r"NameResolutionError|NewConnectionError|ConnectTimeoutError|name resolution|Network is unreach")
COMPILER = shutil.which(os.environ.get("CXX") or "c++")


def hurried(folder: Path) -> dict[str, str]:
    """An environment whose compilers do not optimise, whatever they are told: most of a build's time, and nothing that
    is tested here. What the real options make of the kernels, test_cuda_build.py reads.
    """
    if COMPILER is None or os.name != "posix":
        return {}
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec "{COMPILER}" "$@" -O0\n')
    script.chmod(0o755)
    return {"CXX": str(script), "CUDAHOSTCXX": str(script), "CUDAFLAGS": "-Xcicc -O0 -Xptxas -O0"}


def build(kind: str, out: Path, environment: dict[str, str]) -> Path:
    """Build in a copy of the tracked and new files, so that nothing already built is found."""
    source = out / "source"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", "demo.*", ".*_cache"
    )
    shutil.copytree(ROOT, source, ignore=ignore)
    if (
        kind == "sdist"
        and subprocess.run([sys.executable, "-m", "build", "-V"], cwd=out, capture_output=True).returncode
    ):
        pytest.skip("needs the package build: pip install build")
    command = {
        "wheel": [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(out), str(source)],
        "sdist": [sys.executable, "-m", "build", "--sdist", "--outdir", str(out), str(source)],
    }[kind]
    environment = {"PIP_RETRIES": "1", **os.environ, **environment}
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode and NO_NETWORK.search(said):
        pytest.skip("a build in isolation fetches its tools, and there is no network here")
    assert done.returncode == 0, said
    (archive,) = [*out.glob("*.whl"), *out.glob("*.tar.gz")]
    return archive


def unpack_and_import(wheel: Path, folder: Path) -> tuple[str, Path]:
    """The report of the unpacked wheel, run from another folder, and the extension's path."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (extension,) = (folder / "ddpm_fast").glob("_C*")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import ddpm_fast, torch; from ddpm_fast.__main__ import report; "
        "assert torch.equal(ddpm_fast.normal(1, (4,), seed=0), ddpm_fast.normal(2, (4,), seed=0)[:1]); print(report())"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout, "the report names the extension of the unpacked wheel"
    return done.stdout, extension


def linked(extension: Path) -> str:
    return subprocess.run(["ldd", str(extension)], capture_output=True, text=True, check=True).stdout


def without_nvcc() -> dict[str, str]:
    """An environment in which no CUDA compiler is found."""
    folders = [f for f in os.environ["PATH"].split(os.pathsep) if not (Path(f) / "nvcc").exists()]
    kept = tuple(name for name in ("cc", "c++", "gcc", "g++", "make", "git") if shutil.which(name))
    tools = Path(os.environ["HIDDEN_TOOLS"])
    for name in kept:  # compilers may lie in the folder that had to go
        (tools / name).symlink_to(str(shutil.which(name)))
    return {"PATH": os.pathsep.join([str(tools), *folders]), "CUDACXX": "", "CUDA_PATH": "", "CUDA_HOME": ""}


@pytest.mark.skipif(sys.platform != "linux", reason="ldd is Linux's; run on Linux")
def test_wheel_without_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("HIDDEN_TOOLS", str(tmp_path / "tools"))
    (tmp_path / "tools").mkdir()
    environment = without_nvcc()
    assert shutil.which("nvcc", path=environment["PATH"]) is None
    (tmp_path / "out").mkdir()
    wheel = build("wheel", tmp_path / "out", {**environment, **hurried(tmp_path), "DDPM_FAST_CUDA": "AUTO"})
    (tmp_path / "site").mkdir()
    report, extension = unpack_and_import(wheel, tmp_path / "site")
    assert "CUDA half: not built" in report
    assert "served by native" in report
    assert "torch" not in linked(extension)

    # What pip would run, without another isolated environment.
    place = {"PATH": os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])}
    required = subprocess.run(
        [
            *("cmake", "-G", "Ninja", "-S", str(tmp_path / "out" / "source"), "-B", str(tmp_path / "required")),
            *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
        ],
        env={**os.environ, **environment, **place, "DDPM_FAST_CUDA": "ON"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert required.returncode != 0
    assert "DDPM_FAST_CUDA=ON, but nvcc was not found" in required.stdout + required.stderr


@pytest.mark.skipif(NVCC is None, reason="no nvcc here; put a CUDA toolkit on PATH to build the CUDA half")
def test_wheel_with_nvcc_imports_without_a_gpu(tmp_path):
    """The extension that is installed, where it has a CUDA half: an install is such a build. Otherwise a new one."""
    from ddpm_fast.__main__ import report
    from ddpm_fast.backends import native

    if native._C is not None and native._C.build_info()["cuda"]:
        said, extension = report(), Path(native._C.__file__)
    else:
        (tmp_path / "out").mkdir()
        wheel = build("wheel", tmp_path / "out", {**hurried(tmp_path), "DDPM_FAST_CUDA": "ON"})
        (tmp_path / "site").mkdir()
        said, extension = unpack_and_import(wheel, tmp_path / "site")
    assert "CUDA half: runtime" in said
    assert "80-real 90" in said
    libraries = linked(extension)
    for unwanted in ("torch", "libc10", "libcuda", "libcudart"):
        assert unwanted not in libraries, libraries


def test_sdist_holds_all_that_a_build_needs(tmp_path):
    archive = build("sdist", tmp_path, {"DDPM_FAST_CUDA": "OFF"})
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources <= names
    assert {"CMakeLists.txt", "LICENSE", "ddpm_fast/py.typed", "pyproject.toml", "setup.py"} <= names
