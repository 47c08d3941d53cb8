# make demo      train a small DSGformer on sample photographs, test it, show the result
# make test      every test that takes seconds        make test-all   the long ones too
# make lint      ruff and mypy                        make setup      only the environment, .venv

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
SAMPLE := datasets/sample

# Tests share the cores as processes; a thread pool in each of them would fight the others.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: setup demo test test-all lint clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^# //p' Makefile | head -3

setup: $(READY)

# BasicSR's isolated build would download PyTorch once more: torch comes first, then BasicSR beside it.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch torchvision numpy cython setuptools wheel 'pyvips[binary]'
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python tools/create_sample_set.py $(SAMPLE)
	$(BIN)/basicsr train -opt options/train_sample.yml --auto_resume
	$(BIN)/basicsr test -opt options/test_sample.yml
	$(BIN)/python tools/demo.py

test: $(READY)
	$(PYTEST) -m 'not long'

test-all: $(READY)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info results experiments tb_logger $(SAMPLE)
