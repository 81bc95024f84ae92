# Needs CPython >= 3.10 and make, nothing else. `make PYTHON=python3.12 setup` chooses the interpreter.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup demo test check format audit bench bench-gpu soak clean

help:
	@echo "make demo    set up .venv, then generate with the bundled checkpoint over 4 ranks"
	@echo "make test    set up .venv, then run every test"
	@echo "make check   what CI runs before the tests: ruff, mypy --strict, import-linter"
	@echo "make format  let ruff put things in order"
	@echo "make audit   compile every kernel for sm_90, sm_100 and gfx942"
	@echo "make bench   measure, beside torch and transformers"
	@echo "make bench-gpu  test and measure the kernels on this machine's GPU; writes benchmarks/results"
	@echo "make soak    kill, stop and delay ranks 200 times; every other rank must name the right one"
	@echo "make clean   remove .venv and caches"

setup: $(READY)

# Where the system's torch works with a GPU it is kept, whatever its version; elsewhere constraints.txt holds.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: crossdock needs Python >= 3.10, $(PYTHON) is $$($(PYTHON) -V 2>&1): try make PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "error: $(PYTHON) cannot make virtual environments (no ensurepip): install its venv package" \
	         "(Debian, Ubuntu: apt-get install python3-venv) or try make PYTHON=..." >&2; exit 1; }
	@set -e; \
	if $(PYTHON) -c 'import torch; torch.ones(1, device="cuda").item()' >/dev/null 2>&1; then \
	  echo "keeping the torch of $(PYTHON), which works with this machine's GPU"; \
	  test -x $(BIN)/pip || $(PYTHON) -m venv --system-site-packages $(VENV); \
	  $(BIN)/python -m pip install --quiet -e '.[dev]'; \
	else \
	  test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt; \
	fi
	@touch $@

demo: setup
	@$(BIN)/crossdock generate --ranks 4

test: setup
	$(BIN)/python -m pytest -q

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

audit: setup
	@$(BIN)/crossdock audit

bench: setup
	@for question in router gemm layer exchange generate; do $(BIN)/crossdock bench $$question || exit 1; done

bench-gpu: setup
	@$(BIN)/python benchmarks/bench_gpu.py

soak: setup
	@$(BIN)/python benchmarks/soak.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
