# Works from a bare clone: Python 3.11 or newer, make and a C++ compiler are all it needs.
# Every target makes what it depends on and makes it again only when its inputs changed.

PYTHON ?= python3
VENV   ?= .venv
RECIPE ?=
ARGS   ?=
PYTEST ?= -q

BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet
NATIVE := $(shell find csrc -type f 2>/dev/null)
CPP    := $(filter %.cpp %.h %.cu %.cuh,$(NATIVE))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart quickstart-60s build test isa parity lint format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  Variables: PYTHON=$(PYTHON) VENV=$(VENV) RECIPE=name or file.toml ARGS='section.key=value ...' PYTEST='$(PYTEST)'"

quickstart: build ## Install, build, train the small world and write its report
	@echo "==> Train: torchrun -m snoopi.train $(RECIPE) $(ARGS) --resume"
	@$(BIN)/torchrun -m snoopi.train $(RECIPE) $(ARGS) --resume

quickstart-60s: build ## The same, tiny: checks that everything works together
	@echo "==> Train: torchrun -m snoopi.train debug --out runs/ci $(ARGS)"
	@$(BIN)/torchrun -m snoopi.train debug --out runs/ci $(ARGS)

build: $(STAMPS)/build ## Make .venv, install the pinned requirements, build the op

test: build $(STAMPS)/test ## Run the tests (all but gpu, slow and parity)
	@echo "==> Test: pytest $(PYTEST)"
	@$(BIN)/python -m pytest -m "not slow and not gpu and not parity" $(PYTEST)

# Processors that torch's own switches can make of this one. AMX runs on plain code in its place.
# Left out: what is the same on all of them, and what goes through them by itself.
ISA_TESTS := tests/kernels --ignore tests/kernels/test_formulas.py --ignore tests/kernels/test_capabilities.py \
             --ignore tests/kernels/simt
# torch's attention asks for AVX-512 where oneDNN may use AMX, whatever its own vectors are.
ISAS := ATEN_CPU_CAPABILITY=default,ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ONEDNN_MAX_CPU_ISA=AVX512_CORE \
        ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16

isa: build $(STAMPS)/test ## Run the op's tests as lesser processors would, and AMX emulated
	@for isa in $(ISAS); do \
	  echo "==> $$isa: pytest tests/kernels $(PYTEST)"; \
	  env $$(echo $$isa | tr , ' ') $(BIN)/python -m pytest $(PYTEST) $(ISA_TESTS) || exit 1; done
	@echo "==> Build: the op with AMX emulated"
	@SNOOPI_EMULATE_AMX=1 $(BIN)/python setup.py -q build --build-base build/amx --build-lib build/amx/lib
	@echo "==> AMX emulated: pytest tests/kernels $(PYTEST)"
	@$(BIN)/python -m pytest $(PYTEST) -o pythonpath=build/amx/lib $(ISA_TESTS)

parity: build $(STAMPS)/parity ## Compare with diffusers, transformers and peft
	@echo "==> Parity: pytest tests/parity $(PYTEST)"
	@$(BIN)/python -m pytest -m "parity and not slow and not gpu" $(PYTEST) tests/parity

lint: $(STAMPS)/dev ## Check style and types; changes nothing
	@echo "==> Lint: ruff, clang-format, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))
	@$(BIN)/mypy

format: $(STAMPS)/dev ## Format the Python and C++ sources in place
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(if $(CPP),$(BIN)/clang-format -i $(CPP))

clean: ## Remove .venv, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find snoopi csrc -name '*.so' -delete 2>/dev/null || true
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: '$(PYTHON)' was not found; install Python 3.11 or newer, or name it: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) has no venv module; install it (Debian and Ubuntu: the package python3-venv)" >&2; exit 1; }
	@echo "==> Virtual environment: $(VENV) ($$($(PYTHON) -V 2>&1))"
	@$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/run: requirements/run.txt | $(STAMPS)/venv
	@echo "==> Install: requirements/run.txt (the first time torch is a large download)"
	@$(PIP) install -r requirements/run.txt
	@touch $@

$(STAMPS)/test $(STAMPS)/parity $(STAMPS)/dev: $(STAMPS)/%: requirements/%.txt $(STAMPS)/run
	@echo "==> Install: requirements/$*.txt"
	@$(PIP) install -r requirements/$*.txt
	@touch $@

$(STAMPS)/test $(STAMPS)/parity: requirements/emoji.txt
$(STAMPS)/parity: requirements/test.txt

$(STAMPS)/build: setup.py pyproject.toml $(NATIVE) $(STAMPS)/run
	@[ "$$SNOOPI_BUILD" = none ] || for c in $${CXX:-c++ g++ clang++}; do command -v $$c && break; done | grep -q . || { \
	  echo "error: no C++ compiler found ($${CXX:-c++, g++, clang++}); install one (Debian and Ubuntu: g++) or set CXX," >&2; \
	  echo "       or build without the fused op: make build SNOOPI_BUILD=none" >&2; exit 1; }
	@echo "==> Build: the op and an editable install (about a minute)"
	@$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
