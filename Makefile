# make demo | test | bench | lint - each needs Python >= 3.10 and a C++ compiler; nvcc is used where it is found.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_OUT ?= demo
TEST_WORKERS ?= 2

# Other processes want the cores too (two test workers, a shared machine): threads must sleep while they wait, not spin.
demo test: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test bench lint format clean

# An editable install of the package with everything that demo, tests and lint need. Versions: constraints.txt.
$(VENV)/.installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch triton
	$(PIP) install --quiet --constraint constraints.txt --editable '.[demo,test,lint]'
	# A peer that tests and benchmarks run; torchvision, which it asks for, has no build for a CPU-only torch.
	$(PIP) install --quiet --constraint constraints.txt --no-deps denoising-diffusion-pytorch
	touch $@

demo: $(VENV)/.installed
	$(BIN)/ddpm-fast demo --out $(DEMO_OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)
	$(BIN)/python benchmarks/report.py "$$(ls -t benchmarks/results/*.json | head -1)"

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files '*.h' '*.cpp' '*.cu' '*.cuh')

clean:
	rm -rf build dist *.egg-info ddpm_fast/_C*.so
