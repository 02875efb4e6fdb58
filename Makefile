# make train: everything from nothing to a trained model. make test: the whole suite, but for what
# NVIDIA's compilers test, in an environment of its own: make test-gpu-aot.
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v))) python3)
VENV ?= .venv
BIN = $(VENV)/bin
VERSION = $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
PINS = $(wildcard constraints-$(VERSION).txt)
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(PINS))

.PHONY: train test test-slow test-gpu-aot run-gpu-aot lint format studies docs smoke clean

train: $(VENV)/.run
	$(BIN)/python -m tokenlab data fetch english_prose
	$(BIN)/python -m tokenlab train experiments/quickstart.py

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist load --slow

test-gpu-aot:
	$(MAKE) run-gpu-aot VENV=$(VENV)-gpu

run-gpu-aot: $(VENV)/.gpu-aot
	JAX_PLATFORMS=cpu $(BIN)/python -c 'from kernels_pallas.common.aot import gpu_devices; print(*gpu_devices("h100"))'
	$(BIN)/python -m pytest -n 2 -m gpu_aot tests/kernels_pallas/test_gpu_aot.py

smoke: $(VENV)/.dev
	XLA_FLAGS= $(BIN)/python -m pytest -n 2 --dist loadfile -m smoke

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

studies: $(VENV)/.run
	for file in experiments/*/*.py; do \
	  grep -q '^def study' $$file && { $(BIN)/python -m tokenlab study $$file || exit 1; }; done; true

docs: $(VENV)/.run
	$(BIN)/python -m tokenlab systems --markdown > docs/systems.md

clean:
	rm -rf $(VENV) $(VENV)-gpu .cache runs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tokenlab needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: requirements.txt pyproject.toml $(PINS) | $(VENV)/bin/python
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps -e .
	touch $@

$(VENV)/.dev: requirements-dev.txt requirements-notebooks.txt $(VENV)/.run
	$(INSTALL) -r requirements-dev.txt
	touch $@

$(VENV)/.gpu-aot: requirements-gpu-aot.txt $(VENV)/.run
	$(INSTALL) pytest pytest-xdist hypothesis beartype
	$(INSTALL) --no-deps -r requirements-gpu-aot.txt
	touch $@
