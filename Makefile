# `make demo` and `make test` need Python 3.11 or newer and nothing else: they build `.venv` with the tested versions.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.core
	$(BIN)/qwen-scope demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# Peers live in environments of their own; the benchmark runs in one of them, with our source on its path.
bench: $(VENV)/.core
	tests/peers/run.sh sparsify
	tests/peers/run.sh sae_lens
	.venv-sae_lens/bin/python -m pip install -q lazy_loader jaxtyping numba
	.venv-sae_lens/bin/python -W ignore bench/encode.py

clean:
	rm -rf $(VENV) .venv-* build dist

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "qwen-scope needs Python 3.11 or newer; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.core
