# Everything sets itself up: a virtual environment in .venv, the libraries, the compiled extension. The second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/digits

LIBRARIES := $(VENV)/.libraries
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu tests/*/*.h tests/*/*.cpp)

.PHONY: help setup test sanitize triton36 demo lint format bench report clean
help:
	@echo "make demo    train mobilevitv3_xxs on handwritten digits with reference and with fused ops, then evaluate the checkpoint"
	@echo "make test    lint and the whole test suite"
	@echo "make sanitize  the tests of the CPU kernels with GCC's checks of memory and of undefined behaviour; ISA=avx512 for another variant"
	@echo "make triton36  the tests of the Triton kernels with the oldest Triton that is supported"
	@echo "make bench   the CPU benchmarks; make report puts their results into the README"
	@echo "make setup   only the virtual environment in $(VENV);  make clean removes it"

setup: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "the venv module is needed (Debian: apt-get install python3-venv)"; rm -rf $(VENV); exit 1; }

# The build needs torch, so torch comes before the package. The registry's plain torch is the CUDA build, which torchvision goes with.
$(LIBRARIES): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" ninja pybind11 "torch>=2.11"
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[app,test]"
	@touch $@ $(INSTALLED)

$(INSTALLED): $(LIBRARIES) setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
	@# make takes this target for old where $(LIBRARIES) has just built it
	@if [ ! -e $@ ] || [ -n "$$(find setup.py csrc -newer $@ -print -quit)" ]; then \
	  echo "building the compiled kernels"; $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable . || exit 1; fi
	@touch $@

test: $(INSTALLED) lint
	$(BIN)/python -m mvit3_kernels.info
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

# A copy of the package with one variant, which is checked while it runs: the generic one has no masked loads, which GCC does not check.
# Python itself is not checked, so it needs the checking library, and the one that throws exceptions, before everything else. A finding ends
# the process: its report must not wait in pytest's capture.
ISA := generic
CHECKED := build/sanitized_$(ISA)
sanitize: $(INSTALLED)
	CXX=$(CXX) MVIT3_SANITIZE=$(ISA) $(BIN)/python setup.py --quiet build --build-base $(CHECKED) --build-lib $(CHECKED)/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(CHECKED)/lib MVIT3_SANITIZE=$(ISA) $(BIN)/pytest -q -n 2 --dist worksteal --capture=sys \
	  tests/test_native.py::test_build_that_must_be_loaded tests/ops/test_*_cpu.py tests/ops/test_fuzz.py tests/inference

# The oldest supported Triton beside the installed one, and the numpy that its interpreter needs.
TRITON36 := build/triton36
triton36: $(INSTALLED)
	[ -d $(TRITON36) ] || $(BIN)/python -m pip install --quiet --no-deps --target $(TRITON36) "triton==3.6.*" "numpy<2.4"
	PYTHONPATH=$(TRITON36) $(BIN)/pytest -q -n 2 --dist worksteal tests/ops/test_*_triton.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

demo: $(INSTALLED)
	$(BIN)/mvit3 demo --run.output $(DEMO)
	$(BIN)/mvit3 evaluate --checkpoint $(DEMO)/fused/last.pt

# The inference runtimes that the networks are compared with.
$(PEERS): pyproject.toml | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	@touch $@

bench: $(INSTALLED) $(PEERS)
	$(BIN)/python benchmarks/bench_batch_norm_act.py --json
	$(BIN)/python benchmarks/bench_inverted_residual.py --json
	$(BIN)/python benchmarks/bench_dropout.py --json
	$(BIN)/python benchmarks/bench_feed_forward.py --json
	$(BIN)/python benchmarks/bench_patch_attention.py --json
	$(BIN)/python benchmarks/bench_pointwise.py --json
	$(BIN)/python benchmarks/bench_separable_attention.py --json
	$(BIN)/python benchmarks/bench_depthwise_conv.py --json
	$(BIN)/python benchmarks/bench_conv3x3.py --json
	$(BIN)/python benchmarks/bench_upsample.py --json
	$(BIN)/python benchmarks/bench_models.py --json
	$(BIN)/python benchmarks/bench_dense.py --json
	$(BIN)/python benchmarks/bench_dense.py --json --memory
	$(BIN)/python benchmarks/bench_training.py --json

report: $(INSTALLED)
	$(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) build runs *.egg-info python/*.egg-info mvit3_kernels/*.so mvit3_kernels/_build_failure.txt
