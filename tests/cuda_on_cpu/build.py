"""Build csrc/, the CUDA kernels included, as one Python module that runs on the CPU under sanitizers.

``python tests/cuda_on_cpu/build.py OUT [--no-sanitize]`` writes ``OUT/<key>/_C_shim.<suffix>`` and prints its path. The
key is a hash of all sources, flags and the compiler, so an unchanged tree is not built again. Needs g++ and pybind11.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
MODULE = "_C_shim"
MAX_THREADS = 2**16  # of one launch; larger batches take several, as batches of 2**31 threads do on a GPU
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]


def compiler() -> str:
    """g++: its sanitizers are shared libraries that can be loaded into Python."""
    found = shutil.which("g++")
    if found is None:
        raise RuntimeError("the CPU build of the CUDA kernels needs g++; install it and put it on PATH")
    return found


def sources() -> list[Path]:
    """The bindings, the C++ half and the CUDA half."""
    bindings = [CSRC / "bindings.cpp", CSRC / "bindings_norms.cpp"]
    return [*bindings, *sorted(CSRC.glob("cpu/*.cpp")), *sorted(CSRC.glob("cuda/*.cu"))]


def flags(sanitize: bool) -> list[str]:
    """Arguments of every compilation: no contraction, as in the real build.

    No function clones: they are chosen at load time, before the sanitizers have started.
    """
    import pybind11

    return [
        *("-std=c++17", "-Og", "-fPIC", "-fvisibility=hidden", "-pthread"),
        *("-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"),
        *("-DDDPM_FAST_HAS_CUDA", "-DDDPM_FAST_NO_CLONES", f"-DDDPM_FAST_MODULE_NAME={MODULE}"),
        f"-DDDPM_FAST_MAX_THREADS={MAX_THREADS}",
        f"-I{HERE}",
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_paths()["include"]),
        *(SANITIZERS if sanitize else []),
    ]


def key(arguments: list[str]) -> str:
    """A hash of everything that the module is made of."""
    digest = hashlib.sha256()
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    digest.update("\0".join([version, sys.version, *arguments]).encode())
    headers = [p for folder in (CSRC, HERE) for p in folder.rglob("*") if p.suffix in {".h", ".cuh"}]
    for path in sorted([*sources(), *headers]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str]) -> None:
    """Run a compiler command; its messages become the error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def build(out: Path, *, sanitize: bool = True) -> Path:
    """Build the module below ``out`` unless it is there; its path."""
    arguments = flags(sanitize)
    folder = out / key(arguments)
    module = folder / (MODULE + sysconfig.get_config_var("EXT_SUFFIX"))
    if module.exists():
        return module
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.{os.getpid()}.o"
        # The bindings take half of the time, and pass addresses on without reading anything there.
        plain = [a for a in arguments if a not in SANITIZERS] if source.name.startswith("bindings") else arguments
        run([compiler(), *plain, "-x", "c++", "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources()))
    part = folder / f"{MODULE}.{os.getpid()}.part"
    run([compiler(), "-shared", "-pthread", *(SANITIZERS if sanitize else []), *objects, "-o", str(part)])
    part.replace(module)  # in one step: another process may be building the same
    for name in objects:
        Path(name).unlink()
    return module


def preload() -> str:
    """What LD_PRELOAD must name for a Python that imports the sanitized module."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    return ":".join(path for path in found if Path(path).is_absolute())


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the CUDA kernels for the CPU.")
    parser.add_argument("out", type=Path, help="folder for the build")
    parser.add_argument("--no-sanitize", action="store_true", help="without AddressSanitizer and UBSan")
    arguments = parser.parse_args()
    print(build(arguments.out, sanitize=not arguments.no_sanitize))


if __name__ == "__main__":
    main()
