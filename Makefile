# Everything sets itself up: a virtual environment in .venv, the libraries, the compiled extension. The second run starts at once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/digits
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
STAGE := sh .ci/stage.sh

APP := $(VENV)/.app
LIBRARIES := $(VENV)/.libraries
NATIVE := $(VENV)/.native
INSTALLED := $(VENV)/.installed
PEERS := $(VENV)/.peers
SOURCES := setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu tests/*/*.h tests/*/*.cpp)

.PHONY: help setup test sanitize triton36 demo lint format bench report docs wheel wheels-test follow clean
help:
	@echo "make demo    train mobilevitv3_xxs on handwritten digits with reference ops, PyTorch's modules and fused ops"
	@echo "make test    lint and the whole test suite"
	@echo "make sanitize  the tests of the CPU kernels with GCC's checks of memory and of undefined behaviour; ISA=avx512 for another variant"
	@echo "make triton36  the tests of the Triton kernels with the oldest Triton that is supported"
	@echo "make bench   the CPU benchmarks; make report puts their results into the README and docs/report.html"
	@echo "make docs    the documentation as a site, in build/site;  make wheel, make wheels-test  a wheel in dist/, tried beside several torch"
	@echo "make follow  the pages docs/start followed with that wheel, each in a fresh environment"
	@echo "make setup   only the virtual environment in $(VENV);  make clean removes it"

setup: $(INSTALLED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=/path/to/python"; exit 1; }
	@$(STAGE) "virtual environment" $(PYTHON) -m venv $(VENV) || { echo "the venv module is needed (Debian: apt-get install python3-venv)"; rm -rf $(VENV); exit 1; }

# The build needs torch, so torch comes before the package. The registry's plain torch is the CUDA build, which torchvision goes with.
$(APP): pyproject.toml | $(BIN)/python
	@$(STAGE) "pip, setuptools, ninja" $(PIP) --upgrade pip "setuptools>=77" ninja
	@$(STAGE) "PyTorch (a download of some 3 GB)" $(PIP) "torch>=2.11"
	@$(BIN)/python .ci/requirements.py app > $(VENV)/app.txt
	@$(STAGE) "libraries" $(PIP) --requirement $(VENV)/app.txt
	@touch $@

$(LIBRARIES): $(APP)
	@$(BIN)/python .ci/requirements.py app test > $(VENV)/requirements.txt
	@$(STAGE) "libraries of the tests" $(PIP) --requirement $(VENV)/requirements.txt
	@touch $@

BUILD := $(PIP) --no-build-isolation --no-deps --editable .
EXPLAIN := if [ -e mvit3_kernels/_build_failure.txt ]; then echo "not built, plain PyTorch runs instead:"; cat mvit3_kernels/_build_failure.txt; fi

# For a demonstration the kernels of this machine's CPU are enough: a quarter of all, which the other target then need not compile again.
$(NATIVE): $(APP) $(SOURCES)
	@rm -f $(INSTALLED)
	@MVIT3_VARIANTS=native $(STAGE) "compiled kernels for this CPU (a minute)" $(BUILD)
	@$(EXPLAIN)
	@touch $@

$(INSTALLED): $(LIBRARIES) $(SOURCES)
	@$(STAGE) "compiled kernels (some 4 minutes)" $(BUILD)
	@$(EXPLAIN)
	@touch $(NATIVE) $@

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
	PYTHONPATH=$(TRITON36) $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/ops/test_*_triton.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Of the recipe's 20 epochs 12: three trainings in the time of two, and as good (99.7 % of the digits).
demo: $(NATIVE)
	$(BIN)/mvit3 demo --run.output $(DEMO) --schedule.epochs 12
	$(BIN)/mvit3 evaluate --checkpoint $(DEMO)/fused/last.pt

# The inference runtimes that the networks are compared with.
$(PEERS): pyproject.toml | $(INSTALLED)
	@$(BIN)/python .ci/requirements.py bench > $(VENV)/bench.txt
	@$(STAGE) "inference runtimes" $(PIP) --requirement $(VENV)/bench.txt
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
	$(BIN)/python benchmarks/bench_upsample.py --json --compile
	$(BIN)/python benchmarks/bench_models.py --json
	$(BIN)/python benchmarks/bench_dense.py --json
	$(BIN)/python benchmarks/bench_dense.py --json --memory
	$(BIN)/python benchmarks/bench_training.py --json

report: $(INSTALLED)
	$(BIN)/python benchmarks/report.py
	$(BIN)/mvit3 report benchmarks/results/*.json --output docs/report.html $(if $(shell command -v chromium),--png docs)

# Reads docstrings without importing, so it needs neither torch nor a compiler. Warnings, and links to nothing, are errors.
SITE := build/docs-venv
$(SITE)/.installed: pyproject.toml
	@$(STAGE) "mkdocs" sh -c '$(PYTHON) -m venv $(SITE) && $(SITE)/bin/python -m pip install --quiet --upgrade pip && $(SITE)/bin/python -m pip install --quiet --group docs'
	@touch $@

docs: $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict --quiet
	@echo "build/site/index.html"

# One for every Python and torch; with the CUDA kernels where nvcc is. An environment for each torch is a download of some 3 GB.
TORCH := 2.11 2.13 newest
WHEELS := $(VENV)/.wheels
$(WHEELS): | $(INSTALLED)
	@$(STAGE) "auditwheel, abi3audit" $(PIP) auditwheel abi3audit
	@touch $@

wheel: $(INSTALLED) $(WHEELS)
	rm -rf dist/*.whl build/lib.* # which would keep files that are no longer in the sources
	@$(STAGE) "wheel" $(BIN)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python -m tests.wheels.check dist/*.whl

wheels-test: $(INSTALLED)
	$(BIN)/python -m tests.wheels.environments dist/*.whl --torch $(TORCH)

# The first steps of four readers, as the pages have them, each in an environment of its own: four times some 3 GB.
follow: $(INSTALLED)
	$(BIN)/python -m tests.docs.follow dist/*.whl

clean:
	rm -rf $(VENV) build dist runs *.egg-info python/*.egg-info mvit3_kernels/*.so mvit3_kernels/_build_failure.txt
