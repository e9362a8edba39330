# `make help` lists what there is. Every target but help does the set-up that it needs, once.
#
# PYTHON: the interpreter (3.10 or newer) that a new virtual environment is made with.
# VENV:   where that environment lies. Empty (`make test VENV=`): no set-up, run in the Python named PYTHON as it is.
PYTHON ?= python3
VENV ?= .venv
PIP_VERSION := 26.3

# OpenMP threads that wait for each other burn their time slices where something else wants the cores: wait in short.
export GOMP_SPINCOUNT ?= 3000

# Of detectron2's libraries, on each import: not for the users of this project to mend.
export PYTHONWARNINGS ?= ignore::FutureWarning:torch.jit._script

# Tests run in so many processes, each with one thread.
TEST_PROCESSES ?= auto
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(TEST_PROCESSES) --maxprocesses 4 --dist loadfile --durations=10

SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

ifneq ($(VENV),)
RUN := "$(VENV)/bin/python"
# Written last, each when its step is complete: a set-up that was interrupted goes on at the next make.
REQUIREMENTS_DONE := $(VENV)/.requirements-installed
SETUP_DONE := $(VENV)/.setup-complete
else
RUN := $(PYTHON)
endif

.PHONY: help
help:
	@echo 'make quickstart          train a small Co-DETR on handwritten digits, evaluate it and draw its predictions'
	@echo 'make quickstart-co-dino  the same with a Co-DINO'
	@echo 'make quickstart-trees    the first on photographs of tree crowns'
	@echo 'make quickstart-nuclei   the first on a micrograph of cell nuclei, with their masks'
	@echo 'make reproduce           the paper'"'"'s ablations on the digits, and its measurements: docs/reproduction.md (hours)'
	@echo 'make reproduce-short     the same in minutes: two models, one seed'
	@echo 'make reproduce-more      Co-DINO, and cell nuclei, for the same page'
	@echo 'make test                check the style and run every test but the end-to-end run'
	@echo 'make test-fast           the tests that take less than two minutes in all, for the inner loop'
	@echo 'make test-end-to-end     a short training, evaluation and prediction through the command lines'
	@echo 'make lint                check the style alone'
	@echo 'make setup               only the set-up: $(VENV) with torch, detectron2 and this package'
	@echo
	@echo 'PYTHON=python3.12        use this Python for the set-up (default: python3)'

.PHONY: setup
setup: $(SETUP_DONE)

.PHONY: quickstart quickstart-co-dino quickstart-trees quickstart-nuclei
quickstart: $(SETUP_DONE)
	$(RUN) tools/quick_start.py digits

quickstart-co-dino: $(SETUP_DONE)
	$(RUN) tools/quick_start.py digits --model co_dino

quickstart-trees: $(SETUP_DONE)
	$(RUN) tools/quick_start.py trees

quickstart-nuclei: $(SETUP_DONE)
	$(RUN) tools/quick_start.py nuclei

.PHONY: reproduce reproduce-short reproduce-more
reproduce: $(SETUP_DONE)
	$(RUN) -m reproduction full

reproduce-short: $(SETUP_DONE)
	$(RUN) -m reproduction short

reproduce-more: $(SETUP_DONE)
	$(RUN) -m reproduction more

.PHONY: lint test test-fast test-end-to-end
lint: $(SETUP_DONE)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

test: lint
	$(PYTEST) --ignore=tests/end_to_end

test-fast: $(SETUP_DONE)
	$(PYTEST) --ignore=tests/end_to_end -m 'not slow'

test-end-to-end: $(SETUP_DONE)
	$(RUN) -m pytest tests/end_to_end --durations=10

ifneq ($(VENV),)
IS_SUPPORTED_PYTHON := import sys; sys.exit(sys.version_info < (3, 10))

# A working environment is kept, with whatever else is installed in it; a broken one is made anew.
$(REQUIREMENTS_DONE): requirements.txt codetr_d2_programs/install_detectron2.py
	@if ! $(RUN) -c 'import pip; $(IS_SUPPORTED_PYTHON)' 2> /dev/null; then \
	    $(PYTHON) -c '$(IS_SUPPORTED_PYTHON)' || { \
	        echo 'error: $(PYTHON) is not Python 3.10 or newer. Name one that is: make setup PYTHON=python3.12' >&2; exit 1; }; \
	    $(PYTHON) -c 'import ensurepip, venv' || { \
	        echo 'error: $(PYTHON) cannot make virtual environments: apt install python3-venv (or your system'"'"'s name for it)' >&2; exit 1; }; \
	    echo 'Making the virtual environment $(VENV): about 6 GB, most of it torch.'; \
	    if test -e "$(VENV)/pyvenv.cfg"; then clear=--clear; fi; \
	    $(PYTHON) -m venv $$clear "$(VENV)" || exit 1; \
	fi
	@$(RUN) -m pip install --disable-pip-version-check --quiet pip==$(PIP_VERSION) \
	    && $(RUN) -m pip install -r requirements.txt \
	    || { echo 'error: could not install requirements.txt. Check network and disk, then: make setup' >&2; exit 1; }
	@$(RUN) tools/install_detectron2.py
	@$(RUN) -W ignore -c 'import cv2, detectron2.engine, matplotlib, pycocotools, pytest, xdist, scipy, sklearn, timm, torchvision' \
	    || { echo 'error: the installation in $(VENV) is damaged. Make it anew: rm -rf "$(VENV)" && make setup' >&2; exit 1; }
	@touch "$@"

$(SETUP_DONE): $(REQUIREMENTS_DONE) setup.py pyproject.toml $(wildcard codetr_d2/ops/*.h codetr_d2/ops/*/*.cpp codetr_d2/ops/*/*.h)
	@PYTHONWARNINGS=ignore $(RUN) -m pip install --quiet --no-build-isolation --no-deps --editable . \
	    || { echo 'error: could not install codetr_d2 itself; the lines above say why. Mend that, then: make setup' >&2; exit 1; }
	@touch "$@"
	@$(RUN) -W ignore -c 'from codetr_d2.ops import active_backend; \
	    print("Set-up complete in $(VENV). Deformable attention on the CPU: %s (%s)." % active_backend("cpu"))'
endif
