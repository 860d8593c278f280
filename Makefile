# `make demo` and `make test` need Python 3.11 or newer and nothing else: they build `.venv` with the tested versions.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

EXTRAS := explorer mcp posttrain ray s3 datasets fast gguf gpu track spread serve docs

.PHONY: demo test test-fast lint bench bench-gpu site notebooks clean $(EXTRAS)

demo: $(VENV)/.core
	$(BIN)/qwen-scope demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

# 285 s of processor time, so about two and a half minutes of two idle cores. Besides tests marked slow, folders are left
# out where most tests train, serve or run whole commands: posttrain, foundry and train train models, explorer starts
# servers, attacks feeds thousands of hostile files, cli and analysis run every command on every kind of file.
NOT_FAST := posttrain foundry train explorer attacks cli analysis

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist worksteal $(NOT_FAST:%=--ignore=tests/%)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# `make explorer`, `make posttrain`, ...: an extra of pyproject.toml for those who need it.
$(EXTRAS): $(VENV)/.core
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[$@]'

# Peers live in environments of their own; what is timed beside them runs in one of these, with our source on its path.
BESIDE := .venv-sae_lens/bin/python -W ignore

bench: $(VENV)/.dev
	for peer in sparsify dictionary_learning sae_lens; do \
	  test -f .venv-$$peer/.ready || tests/peers/run.sh $$peer || exit 1; done
	.venv-sae_lens/bin/python -m pip install -q lazy_loader jaxtyping numba
	$(BESIDE) bench/train_step.py
	$(BESIDE) bench/open.py
	$(BESIDE) bench/encode_decode.py
	$(BIN)/python -W ignore bench/extract.py
	$(BIN)/python -W ignore bench/extract_peers.py
	$(BESIDE) bench/encode.py

# Where a GPU is: the CUDA rows hold what the CPU's hold, then what they cost. Peers that are not installed are left out.
bench-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -q tests/sae/test_triton_rows.py
	PYTHONPATH=src $(PYTHON) -W ignore bench/encode.py
	PYTHONPATH=src $(PYTHON) -W ignore bench/encode_decode.py

# The documentation as a site in out/site; a warning, such as of a dead link, is an error.
site: docs
	$(BIN)/mkdocs build

# The notebooks as .ipynb files in out/notebooks, for Jupyter and Colab (File, Upload notebook).
notebooks: $(BIN)/python
	$(BIN)/python docs/site/notebooks.py -o out/notebooks

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
