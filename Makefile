PYTHON ?= python3
BIN := .venv/bin
# PyTorch's own index has the CPU build, a tenth of the size of the one with CUDA on PyPI.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: help demo test check static bench clean

help:
	@echo 'make demo    a shop, a trained bundle and the service on http://127.0.0.1:8000'
	@echo '             of your own files: make demo EVENTS=events.csv [ITEMS=items.csv] [USERS=users.csv] [PORT=8000]'
	@echo 'make test    every test, against real servers'
	@echo 'make check   format, lint, types, import contracts, then every test'
	@echo 'make bench   throughput and latency over HTTP'
	@echo 'make clean   removes the environment, builds and caches'

demo: .venv/installed
	$(BIN)/millirec demo \
		$(if $(EVENTS),--events "$(EVENTS)") $(if $(ITEMS),--items "$(ITEMS)") \
		$(if $(USERS),--users "$(USERS)") $(if $(PORT),--port "$(PORT)")

test: .venv/installed
	$(BIN)/python -m pytest

check: static test

static: .venv/installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: .venv/installed
	$(BIN)/python -m tests.bench

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find app models tests -name __pycache__ -type d -prune -exec rm -rf {} +

PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile
# Python compiles what it imports when it does, and keeps it: compiling everything here would double the install.
unexport PYTHONDONTWRITEBYTECODE

# The CPU build of torch goes first and alone: an index that cannot be reached is then asked for one package, not
# for each of a hundred, and PyPI's build is taken.
.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Millirec needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)' >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) --quiet --no-deps --retries 1 --timeout 15 \
		--extra-index-url $(TORCH_INDEX) "$$(grep '^torch==' requirements.txt)"
	$(PIP) --requirement requirements.txt
	$(PIP) --quiet --no-deps --no-build-isolation --editable .
	touch $@
