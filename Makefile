# make demo      train a small DSGformer on sample photographs, test it, show the result
# make test      every test that takes seconds        make test-all   the long ones too
# make lint      ruff and mypy                        make setup      only the environment, .venv
# make docs      the documentation as a web site, site/; every link is checked
# make fuzz      fuzz every reader of files, minutes=30 of each
# make pretrained  retrain the weights in the package, from the data of docs/pretraining.md (hours)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
SAMPLE := datasets/sample

# Tests share the cores as processes; a thread pool in each of them would fight the others.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

.PHONY: setup demo docs fuzz pretrained test test-all lint clean
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^# //p' Makefile | head -6

setup: $(READY)

# BasicSR's isolated build would download PyTorch again: torch comes first, then BasicSR beside it.
$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch torchvision numpy cython setuptools wheel 'pyvips[binary]'
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python tools/create_sample_set.py $(SAMPLE)
	$(BIN)/python tools/demo.py --pretrained
	$(BIN)/basicsr train -opt options/train_sample.yml --auto_resume
	$(BIN)/basicsr test -opt options/test_sample.yml
	$(BIN)/python tools/demo.py

PRETRAIN := datasets/pretrain
BLUR := datasets/pretrain_blur
SYNTHESIZE := $(BIN)/python tools/synthesize_blur.py
MAKE_CROPS := --out $(BLUR) --crop 256
STREET := $(SYNTHESIZE) shake $(PRETRAIN)/pairs/sharp --settings options/blur/street.yml $(MAKE_CROPS)
SHAKE := $(SYNTHESIZE) shake $(PRETRAIN)/photographs --settings options/blur/photographs.yml $(MAKE_CROPS)
OBJECTS := $(SYNTHESIZE) objects $(PRETRAIN)/photographs --settings options/blur/photographs.yml $(MAKE_CROPS)
# Averages of linear light, and of encoded levels as in the pairs of GoPro.
LINEAR := --plain --saturation 0.5 --jpeg 0.2
ENCODED := --plain --response linear

# Calling this again continues an interrupted run.
pretrained: $(READY)
	$(STREET) --name street --count 1000 --seed 1 $(LINEAR)
	$(STREET) --name street_encoded --count 500 --seed 22 $(ENCODED) --jpeg 0.2
	$(SYNTHESIZE) shake $(PRETRAIN)/pairs/sharp --settings options/blur/court.yml $(MAKE_CROPS) \
		--name court_encoded --count 250 --seed 21 $(ENCODED)
	$(SHAKE) --name shake --count 300 --seed 2 $(LINEAR)
	$(SHAKE) --name shake_encoded --count 400 --seed 24 $(ENCODED) --jpeg 0.2
	$(SHAKE) --name camera --count 1000 --seed 3
	$(OBJECTS) --name objects --count 100 --seed 4 $(LINEAR)
	$(OBJECTS) --name objects_encoded --count 150 --seed 23 $(ENCODED) --jpeg 0.2
	$(BIN)/basicsr train -opt options/pretrain.yml --auto_resume
	$(BIN)/python tools/convert_checkpoint.py experiments/pretrain/models/net_g_latest.pth \
		dsgformer_arch/weights/dsgformer_h.safetensors --system dsgformer_h --half

test: $(READY)
	$(PYTEST) -m 'not long'

test-all: $(READY)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --clean

minutes ?= 30

fuzz: $(READY)
	$(BIN)/pip install --quiet -c constraints.txt atheris
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --minutes $(minutes)

clean:
	rm -rf $(VENV) build *.egg-info results experiments tb_logger site $(SAMPLE)
