# Two commands matter: `make demo` and `make test`. Both set up what they need, in .venv.
#
# A torch that $(PYTHON) already has is used as it is; otherwise $(TORCH) is installed.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
VENV   ?= .venv
OUT    ?= build/gpu-check
WORKERS ?= $(shell nproc)

BIN     := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test setup build bench lint types gates check parity-settings attack sanitize cuda-build-check gpu-check clean

demo: build
	$(BIN)/bigkern train gpt --compare --seconds 150 --steps 1500 --context 128 --batch 8 --positions rotary \
	  --tokenizer bpe --vocab-size 1024 --lr 4e-3 --out runs/demo

test: build
	rm -rf build/parity build/features build/planted
	$(BIN)/python -m pytest tests -n $(WORKERS) --dist worksteal
	$(BIN)/python tests/parity_table.py
	$(BIN)/python tests/feature_table.py --check

setup: $(VENV)/.ready
build: $(VENV)/.built

$(VENV)/.ready:
	if $(PYTHON) -c 'import torch' 2>/dev/null; \
	then $(PYTHON) -m venv --system-site-packages $(VENV); \
	else $(PYTHON) -m venv $(VENV) && $(BIN)/pip install --quiet $(TORCH) numpy; fi
	$(BIN)/pip install --quiet 'setuptools>=77' wheel ninja 'pybind11>=2.12' numpy
	touch $@

$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[test]'
	$(BIN)/python -c 'from bigkern.core import info; print("bigkern:", info.summary())'
	touch $@

bench: build
	$(BIN)/bigkern bench

# ---- what continuous integration runs besides the tests ---------------------------------------------

$(VENV)/.dev: $(VENV)/.built
	$(BIN)/pip install --quiet ruff mypy clang-format==23.1.5
	touch $@

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.h' -o -name '*.inl' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
	$(BIN)/python tests/test_layering.py

types: $(VENV)/.dev
	$(BIN)/mypy

# CUDA and Triton kernels compiled for sm_80 and sm_90(a): no spills, no register or memory excess. Of Triton's
# many configurations continuous integration compiles a sixth; GATE= compiles them all.
GATE ?= --quick
gates: build
	$(BIN)/python tests/gate_nvcc.py
	$(BIN)/python tests/gate_triton.py $(GATE)

check: lint types gates test

# The parity tests on the CPU under other instruction sets, other roundings of stock's libraries, other threads.
parity-settings: build
	$(BIN)/python tests/parity_settings.py --workers $(WORKERS)

# ---- attacks ------------------------------------------------------------------------------------------

# Random calls, valid and not, in processes whose memory is guarded. SEED= begins elsewhere.
N    ?= 20000
SEED ?= 0
attack: build
	$(BIN)/python tests/attack/attack.py --calls $(N) --first $(SEED)

# The C++ tests, the emulator's among them, with AddressSanitizer and UndefinedBehaviorSanitizer; those of the
# CPU kernels also with ThreadSanitizer.
SANITIZED := -DNVCC=OFF -DCMAKE_BUILD_TYPE=Sanitized
SANITIZER := -O1 -g1 -fno-omit-frame-pointer -fno-sanitize-recover=all
CPU_TESTS := $(basename $(notdir $(filter-out %_simt.cpp tests/cpp/test_simt%,$(wildcard tests/cpp/test_*.cpp))))
CTEST     := ctest --output-on-failure --parallel $(WORKERS) --timeout 600
sanitize:
	cmake -S . -B build/sanitize/address $(SANITIZED) -DCMAKE_CXX_FLAGS="$(SANITIZER) -fsanitize=address,undefined"
	cmake --build build/sanitize/address --target cpp_tests --parallel $(WORKERS)
	$(CTEST) --test-dir build/sanitize/address --exclude-regex simt_plain
	cmake -S . -B build/sanitize/thread $(SANITIZED) -DCMAKE_CXX_FLAGS="$(SANITIZER) -fsanitize=thread"
	cmake --build build/sanitize/thread --target $(CPU_TESTS) --parallel $(WORKERS)
	$(CTEST) --test-dir build/sanitize/thread --exclude-regex simt

# ---- machines of other kinds --------------------------------------------------------------------------

cuda-build-check: build
	bash tests/cuda_build_check.sh $(BIN)/python

gpu-check:
	bash tests/gpu_check.sh $(PYTHON) $(OUT)

clean:
	rm -rf build dist *.egg-info bigkern/_ops*.so bigkern/_info*.so $(VENV)/.built
