# Each target creates its environment on a fresh machine; it needs Python 3.11 or newer and a C++ compiler only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The oldest torch and timm that are supported: headers to compile against, a package to run the patch tests with.
OLD_TORCH := 2.11.0
OLD_TIMM := 1.0.23

# Two processes. Each starts with one half of the files; an idle one takes tests from the other.
XDIST := -n 2 --dist worksteal

.PHONY: demo check test bench fuzz lint format setup clean

demo: setup  ## prunes a small ViT on scikit-learn's digits, in minutes on two cores
	$(BIN)/p3b demo --output runs/demo-$$(date +%Y%m%d-%H%M%S)

check: lint  ## before every commit, in minutes: lint, types, import order, tests without the mark slow
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests -m "not slow" $(XDIST)

test: lint $(VENV)/.oldest  ## everything that CI runs
	P3B_OLD_TORCH=$(abspath $(VENV))/torch-$(OLD_TORCH) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest tests $(XDIST) --durations=12
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONPATH=$(abspath $(VENV))/timm-$(OLD_TIMM) $(BIN)/python -m pytest tests/extension/test_patch.py tests/extension/test_modules.py tests/trainer/pruning/test_surgery.py tests/trainer/runs/test_checkpoint.py tests/trainer/data $(XDIST)
	PYTHON=$(abspath $(BIN))/python tests/fuzz/run.sh 3000 1 || [ $$? = 77 ]  # 77: this machine has no AddressSanitizer; run.sh reports it

# A page of tables: python tests/bench/table.py build/bench.json.
# On a busy machine: OMP_NUM_THREADS=1 P3B_BENCH_CLOCK=thread make bench
bench: setup  ## kernel benchmarks
	@mkdir -p build
	$(BIN)/python -m pytest tests/bench --benchmark-only --benchmark-max-time=0.3 --benchmark-timer=time.$(if $(filter thread,$(P3B_BENCH_CLOCK)),thread_time,perf_counter) --benchmark-json=build/bench.json -o python_files="bench_*.py" -o addopts="--import-mode=importlib -q"
	$(BIN)/python tests/bench/table.py build/bench.json

fuzz: setup  ## random calls under AddressSanitizer and UndefinedBehaviorSanitizer: make fuzz CALLS=100000 SEED=0
	PYTHON=$(abspath $(BIN))/python tests/fuzz/run.sh $(or $(CALLS),100000) $(SEED)

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy && $(BIN)/lint-imports
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

format: setup
	$(BIN)/ruff format . && $(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.cuh')

setup: $(VENV)/.built

# Without build isolation, so that the extension is built against the torch it will run with, downloaded once.
$(VENV)/.packages: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "p3b_ext needs Python 3.11 or newer, got " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install -q --disable-pip-version-check "torch>=2.11" torchvision "timm>=1.0.23" numpy safetensors scikit-learn matplotlib tqdm tensorboard "onnx>=1.17" "onnxscript>=0.7" onnxruntime ninja "pybind11>=2.12" pytest pytest-benchmark pytest-xdist hypothesis "ruff==0.17.5" "clang-format==18.1.8" "mypy==2.4.1" "import-linter==2.17" cmake
	@touch $@

$(VENV)/.built: $(VENV)/.packages setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/* csrc/cuda/*)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.oldest: $(VENV)/.packages
	$(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d $(VENV)/wheels torch==$(OLD_TORCH)
	$(BIN)/python -m zipfile -e $(VENV)/wheels/torch-$(OLD_TORCH)*.whl $(VENV)/torch-$(OLD_TORCH) && rm -rf $(VENV)/wheels
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/timm-$(OLD_TIMM) timm==$(OLD_TIMM)
	@touch $@

clean:
	rm -rf build $(VENV) p3b_ext/*.so *.egg-info
