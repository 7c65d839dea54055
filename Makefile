# Everything a fresh clone needs, one word each. The first call makes a virtual environment in .venv and builds into it;
# later calls rebuild what changed.

PYTHON     ?= python3
VENV       ?= .venv
TORCH_SPEC ?= torch==2.13.0
LINT_TOOLS := ruff==0.17.6 clang-format==23.1.5

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet

# Folders too, so that a new or a deleted file is noticed.
BUILD_INPUTS := setup.py cuda_compiler.py pyproject.toml build_backend.py $(shell find csrc -not -name CMakeLists.txt)
CPP_FILES     = $(shell find csrc tests bench -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: help demo test bench results bench-cpp fuzz soak emulated cuda-report mutants packaging sanitize neon lint format build clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo '  variables: PYTHON VENV TORCH_SPEC TESTS DEMO_ARGS BENCH_ARGS RESULTS BENCH_CPP_ARGS FUZZ_CASES MUTANTS'
	@echo '             (CUDA: see setup.py)'

demo: build  ## train the captioner on real digits and draw what it looks at
	$(PY) -m mmca_ext.demo train $(DEMO_ARGS)

test: build $(VENV)/.cpp-tools  ## all tests (TESTS="tests/test_x.py -k y" for some)
	$(PY) -m pytest -q $(TESTS)

bench: build $(VENV)/.cpp-tools  ## side by side with torch's own attention; linear attention against length
	$(PY) -m bench $(BENCH_ARGS)
	$(if $(BENCH_ARGS),,$(PY) -m bench linear)

RESULTS ?= bench/results/cpu.json
results: build  ## measure all that RESULTS holds, and put it into the figures and the README (a quiet machine, 20 minutes)
	for part in run scaling linear; do $(PY) -m bench $$part --json $(RESULTS) || exit 1; done
	$(PY) -m bench plot $(RESULTS)
	$(PY) -m bench readme $(RESULTS)

bench-cpp: $(VENV)/.cpp-tools  ## the kernels without torch, beside what the processor can do at most (BENCH_CPP_ARGS)
	cmake -S bench/cpp -B build/bench-cpp && cmake --build build/bench-cpp --parallel
	status=0; for family in tiles_bench $(notdir $(basename $(wildcard bench/cpp/*_bench.cpp))); do \
	  build/bench-cpp/$$family --gtest_output=json:build/bench-cpp/$$family.json $(BENCH_CPP_ARGS) || status=1; \
	done; exit $$status

FUZZ_CASES ?= 100000
fuzz: build  ## random cases against fp64, ten times as many as in the tests
	MMCA_EXT_FUZZ_CASES=$(FUZZ_CASES) $(PY) -m pytest -q -m fuzz

# What holds on any device and takes minutes there; the CPU's suites ask for more in places (weights of 32 bits, its
# instruction sets). Of tests/faults some: a GPU runs them all (bench/gpu.sh).
EMULATED ?= tests/test_emulated_kernels.py tests/test_emulated_forward.py tests/test_emulated_backward.py \
  tests/test_emulated_linear.py tests/test_linear.py tests/test_functional_api.py tests/test_autograd.py \
  tests/test_bad_packing.py tests/test_packed_layers.py tests/test_gradcheck.py tests/test_differential.py \
  $(EMULATED_FAULTS:%=tests/faults/test_%.py)
EMULATED_FAULTS := arguments autograd empty_rows extreme_numbers

SOAK_STEPS ?= 30000
SOAK_REPEATS ?= 2000
soak: build  ## train for long: memory stays flat; run again and again: the same bits
	MMCA_EXT_SOAK_STEPS=$(SOAK_STEPS) MMCA_EXT_SOAK_REPEATS=$(SOAK_REPEATS) \
	  $(PY) -m pytest -q tests/test_soak.py tests/faults/test_determinism.py

emulated: build  ## CUDA's kernels on an emulated GPU: the suites of the operators, whole (half an hour)
	$(PY) -m pytest -q --device emulated $(EMULATED)

cuda-report:  ## registers, stack and spills of every CUDA kernel that the last build compiled
	@$(PY) cuda_compiler.py --report build

mutants: build  ## take away guard after guard and see that a test fails (MUTANTS="kernels --only scale"; cuda: barriers)
	$(PY) $(if $(filter cuda,$(MUTANTS)),tests/emulation/mutate.py $(filter-out cuda,$(MUTANTS)),-m tests.mutants $(MUTANTS))

packaging: build  ## every way to build and install, with and without isolation and torch
	$(PIP) install build
	MMCA_EXT_PACKAGING=all $(PY) -m pytest -q tests/test_packaging.py

sanitize: $(VENV)/.cpp-tools  ## the C++ suite under address, undefined-behaviour and thread sanitizers
	for kind in address,undefined thread; do \
	  cmake -S tests/cpp -B build/cpp-$$kind -DMMCA_SANITIZE=$$kind && cmake --build build/cpp-$$kind --parallel && \
	  ctest --test-dir build/cpp-$$kind --output-on-failure || exit 1; \
	done

neon: $(VENV)/.cpp-tools  ## the C++ suite for AArch64, under emulation
	@found() { command -v "$$@" >/dev/null; }; \
	{ found aarch64-linux-gnu-g++ || found aarch64-linux-gnu-g++-12; } && \
	{ found qemu-aarch64 || found qemu-aarch64-static; } || { \
	  echo 'make neon needs a cross compiler and an emulator (Debian: g++-12-aarch64-linux-gnu, qemu-user)'; exit 1; }
	cmake -S tests/cpp -B build/cpp-aarch64 -DCMAKE_TOOLCHAIN_FILE=aarch64.cmake
	cmake --build build/cpp-aarch64 --parallel --target mmca_core_tests
	ctest --test-dir build/cpp-aarch64 --output-on-failure --parallel "$$(nproc)"

lint: $(VENV)/.lint-tools  ## check style (what the pre-commit hook does)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

format: $(VENV)/.lint-tools  ## mend style
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

clean:  ## remove what was built; .venv stays
	rm -rf build dist *.egg-info mmca_ext/_C.*.so $(VENV)/.built

# Set-up, each step once.

build: $(VENV)/.built  ## compile and install into .venv, editable

# Editable: the tests run this tree with the extension compiled from it; tests/test_packaging.py holds the wheel to the
# same. Without isolation, so that it is compiled against the torch it will run with.
$(VENV)/.built: $(VENV)/.torch $(BUILD_INPUTS)
	@echo 'building mmca_ext (minutes the first time, seconds after)'
	MMCA_EXT_STRICT=1 $(PIP) install --no-build-isolation --editable '.[test]'
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	@$(PY) -c 'import torch' 2>/dev/null || { echo 'installing $(TORCH_SPEC)'; $(PIP) install '$(TORCH_SPEC)'; }
	$(PIP) install 'setuptools>=77' ninja
	@touch $@

$(VENV)/.python:
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.lint-tools: $(VENV)/.python
	$(PIP) install $(LINT_TOOLS)
	@touch $@

# GoogleTest and Google Benchmark: Debian's packages if that is simple, else CMake fetches them, else they are skipped.
$(VENV)/.cpp-tools: $(VENV)/.python
	@if [ ! -e /usr/include/gtest/gtest.h ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo 'installing libgtest-dev libbenchmark-dev'; \
	  { timeout 120 apt-get -qq update; timeout 300 apt-get -qq install -y libgtest-dev libbenchmark-dev; } \
	    >/dev/null 2>&1 || echo 'could not; C++ tests will be skipped unless CMake can fetch GoogleTest'; \
	fi
	@touch $@
