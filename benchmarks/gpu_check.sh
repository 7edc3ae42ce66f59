#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can prove and measure; with --dry-run what one without can.
#
#     benchmarks/gpu_check.sh OUT                    # all stages: proofs first, then figures, into the folder OUT
#     benchmarks/gpu_check.sh OUT build suite-gpu    # some of them; OUT keeps what earlier calls found
#     benchmarks/gpu_check.sh OUT --minutes 9        # what fits into nine minutes
#     benchmarks/gpu_check.sh OUT --dry-run          # no GPU needed: builds, compiles, inspects, runs kernels on the CPU
#     benchmarks/gpu_check.sh --list                 # the stages, what they do, their time limits
#
# Needs torch, Triton, nvcc, cmake, ninja, pybind11, scikit-build-core, pytest; no network. Python: $PYTHON, else that of
# .venv, else python3.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -x "$ROOT/.venv/bin/python" ]] && PYTHON="$ROOT/.venv/bin/python"
fi
export PYTHONPATH="$ROOT/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m gpu_check "$@"
