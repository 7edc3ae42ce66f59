"""What benchmarks/gpu_check.sh runs: see __main__.py."""
