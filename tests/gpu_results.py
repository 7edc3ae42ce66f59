"""A result file as a run on a GPU would leave it, with figures made up for tests."""

from __future__ import annotations

from typing import Any


def candidate(name: str, ms: float, **more: Any) -> dict[str, Any]:
    """A candidate that took so many ms a step in each of three rounds."""
    return {
        "id": name, "what": f"what {name} is", "flags": f"flags of {name}", "dtype": "bfloat16", "notes": "",
        "status": "ok", "reason": "", "error": 1e-2, "prepare_s": 1.5, "rounds_s": [ms / 1e3] * 3, **more,
    }  # fmt: skip


def case(name: str, n: int, **ms: float) -> dict[str, Any]:
    """A sampling step; F16 has 2 ms once per call."""
    fixed = {"fixed_s": {"median": 2e-3, "p20": 2e-3, "p80": 2e-3, "rounds": 3}}
    return {
        "name": name, "n": n, "shape": [3, 32, 32], "network": name.split()[0], "options": {},
        "macs": 750_000_000, "parameters": 32_000_000, "layers": "",
        "candidates": [candidate(i, m, **(fixed if i == "F16" else {})) for i, m in ms.items()],
        "update_s": {"median": 1e-5, "p20": 1e-5, "p80": 1e-5, "rounds": 5},
    }  # fmt: skip


def op(name: str, size: float, ours: float, eager: float, compiled: float, elements: int = 2**26) -> dict[str, Any]:
    """An op that moves `size` bytes an element; seconds of ours, of eager PyTorch and of torch.compile."""

    def timing(value: float) -> dict[str, float]:
        return {"median": value, "p20": 0.9 * value, "p80": 1.1 * value, "rounds": 7}

    ratios = {"eager": timing(eager / ours), "torch.compile": timing(compiled / ours)}
    slower = {"eager": timing(eager / ours / 2), "torch.compile": timing(compiled / ours / 2)}
    seconds = {"ddpm_fast": ours, "native": ours, "triton": 2 * ours, "eager": eager, "torch.compile": compiled}
    return {
        "op": name, "bytes": size * elements, "backend": "native", "ratios": ratios,
        "seconds": {who: timing(value) for who, value in seconds.items()},
        "backends": {"native": ratios, "triton": slower},
    }  # fmt: skip


def result(gpu: str = "NVIDIA H100 80GB HBM3", **more: Any) -> dict[str, Any]:
    """As run.py --device cuda writes one. A copy moves 3e12 bytes a second."""
    return {
        "schema": 1,
        "machine": {
            "device": "cuda", "gpu": gpu, "cpu": "Some CPU", "cpus": 16, "threads": 16, "cpu_features": ["avx2"],
            "inference_isas": [], "isa_mask": "", "omp_wait_policy": "", "load_average": 0.1, "driver": "580.65",
            "python": "3.12.3", "ddpm_fast": "0.1.0", "commit": "abc123", "date": "2031-01-02", "cuda": "13.0",
            "cudnn": 91300, "versions": {"torch": "2.11.0", "triton": "3.6.0"},
        },
        "settings": {"argv": ["--only", "ops"], "took_s": 60.0},
        "peaks": {"bfloat16": 8e14, "float32": 4e14, "read": 3e12},
        "ops": [], "cases": [], "host": [], "training": [], "drift": None, **more,
    }  # fmt: skip
