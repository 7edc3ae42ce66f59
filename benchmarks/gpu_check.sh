#!/usr/bin/env bash
# What to run on a machine with an NVIDIA GPU, in order: proofs first, then figures. From the root of a checkout:
#
#     benchmarks/gpu_check.sh [--quick]
#
# Needs nvcc for the CUDA half and, for every baseline, `pip install diffusers`. Stops at the first thing that fails;
# a speed is worth nothing before the tests pass. Leaves benchmarks/results/<gpu>.json, .md and .png.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-.venv/bin/python}"
QUICK=()
[[ "${1:-}" == "--quick" ]] && QUICK=(--quick)

echo "== 1. machine and build"
nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,memory.total --format=csv
DDPM_FAST_CUDA=ON "$PYTHON" -m pip install --quiet --editable '.[test,triton]' matplotlib
"$PYTHON" -m ddpm_fast

echo "== 2. every test, with those that need the GPU"
DDPM_FAST_REQUIRE_GPU=1 "$PYTHON" -m pytest -q -x

echo "== 3. the CUDA kernels under compute-sanitizer (memory, races)"
if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
        DDPM_FAST_REQUIRE_GPU=1 compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
            "$PYTHON" -m pytest -q -x -k "native-gpu and not cuda_build" tests
    done
else
    echo "compute-sanitizer is not on the PATH: it comes with the CUDA toolkit; this step was NOT done" >&2
fi

echo "== 4. ops at 64 Mi elements, sampling steps of both networks and of variants, drift, schedulers"
"$PYTHON" benchmarks/run.py --variants "${QUICK[@]}" --device cuda

echo "== 5. report"
"$PYTHON" benchmarks/report.py "$(ls -t benchmarks/results/*.json | head -n 1)"
