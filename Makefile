# make demo   set up .venv, build, and complete a line of Python with the model inside the package
# make test   the same set-up, then the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
CXX_FILES := $(shell git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' 2>/dev/null)

.PHONY: demo test test-transformers-4 bench lint format tidy sanitize wheel build resources prebuilt gpu clean help

help:
	@sed -n 's/^# make /make /p' Makefile
	@echo "also: build, bench, test-transformers-4, lint, format, tidy, sanitize, wheel, resources, prebuilt, gpu, clean"

# CUDA kernels take minutes to compile: without a GPU the demo leaves them out, unless ALULA_CUDA=1.
demo: export ALULA_CUDA := $(or $(ALULA_CUDA),$(if $(wildcard /dev/nvidia0),,0))
demo: build
	@$(BIN)/alula generate "def fibonacci(n):"

test: build $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# The drop-in's tests on the last transformers 4, which lies beside .venv's and is found before it.
test-transformers-4: build build/transformers-4/.done
	PYTHONPATH=build/transformers-4 $(BIN)/python -m pytest tests/test_transformers_*.py $(PYTEST_ARGS)

build/transformers-4/.done: requirements-transformers-4.txt $(VENV)/.test
	rm -rf $(@D)
	$(PIP) --target $(@D) -r requirements-transformers-4.txt
	touch $@

# Kernels against PyTorch and the machine's limits; `alula bench model` (extra [bench]) compares whole models.
bench: build $(VENV)/.test
	$(BIN)/alula bench ops

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# Mistakes that compilers do not see (.clang-tidy), each an error. Each kernel file is read once for each instruction set,
# which takes minutes, so it is no part of lint; TIDY_FILES=csrc/ops/linear_cpu.cpp reads that one alone.
TIDY_FILES ?= $(filter csrc/%.cpp,$(CXX_FILES))
tidy: build $(VENV)/.test
	test -x $(BIN)/clang-tidy || $(PIP) clang-tidy==23.1.4
	printf '%s\n' $(TIDY_FILES) | xargs -P $$(nproc) -n 1 $(BIN)/clang-tidy \
	  -p $$(ls -td build/cp*/ | head -1) --quiet --extra-arg=-Wno-unknown-warning-option

# The tests of the ops, on CPU kernels built with AddressSanitizer and UndefinedBehaviorSanitizer (slow to build).
# Leaks are not looked for: Python and torch keep what they have until they end.
SANITIZED := build/sanitize/python
SANITIZED_TESTS ?= $(patsubst %,tests/test_%.py,activations attention bad_ops block_plan block_sparse_attention cache_layers \
  choose_token decoder_blocks embedding isa layer_norm linear pack_weight qkv_projection quantize_columns quantize_weight \
  quantized_linear refuse_grad rotary scaled_masked_softmax)
sanitize: $(VENV)/.test
	PATH=$(abspath $(BIN)):$$PATH cmake -G Ninja -B build/sanitize -DALULA_SANITIZE=ON -DALULA_CUDA=0 \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python
	PATH=$(abspath $(BIN)):$$PATH cmake --build build/sanitize
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r python/alula $(SANITIZED)/
	$(BIN)/cmake --install build/sanitize --prefix $(SANITIZED)/alula
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so) $$(c++ -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$(SANITIZED) \
	  $(BIN)/python -m pytest -x -k "not opcheck" $(PYTEST_ARGS) $(SANITIZED_TESTS)

# Registers, shared memory, stack and spills of every CUDA kernel; a spill that is not allowed fails.
resources: build
	$(BIN)/python csrc/cuda/resources.py report $$(ls -td build/cp*/ | head -1)

# Everything that needs a GPU: tests, compute-sanitizer, benchmark, a results file. GPU_PYTHON=python3 takes that
# interpreter's packages and installs none (no network is needed): the op library comes from build/prebuilt, which
# `make prebuilt` makes elsewhere, and alula._C is compiled for it; without build/prebuilt everything is built.
gpu: $(if $(GPU_PYTHON),,build $(VENV)/.test)
	$(if $(GPU_PYTHON),$(GPU_PYTHON) tests/gpu/prebuilt.py use)
	$(if $(GPU_PYTHON),PYTHONPATH=$(CURDIR)/python $(GPU_PYTHON),$(BIN)/python) tests/gpu/prove.py $(GPU_ARGS)

prebuilt: build
	$(BIN)/python tests/gpu/prebuilt.py pack

wheel: $(VENV)/.run
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir dist .

# Installed in place: Python files are used from the checkout, compiled files are put beside them. Ninja rebuilds what changed.
build: $(VENV)/.run
	$(PIP) --no-build-isolation --no-deps --editable .

$(VENV)/.run: requirements.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.txt
	touch $@

$(VENV)/.test: requirements-test.txt $(VENV)/.run
	$(PIP) -r requirements-test.txt
	touch $@

clean:
	rm -rf build dist $(VENV) python/alula/*.so python/*.egg-info
