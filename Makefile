# make demo    set everything up, turn the photographs in examples/images into PCA pictures in demo/
# make test    set everything up with the development tools, run the tests; test-all: the slow ones too
# make lint    check style, formatting and types
# make venv    set up only
# make clean   remove the virtual environment and what was made
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: venv demo test test-slow test-all lint clean

demo: $(VENV)/installed
	$(BIN)/fmupsample visualize examples/images -o demo

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m slow

test-all: test test-slow

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: $(VENV)/installed

# The stamps carry the time of the installation: it is repeated only after pyproject.toml changed.
$(VENV)/installed: pyproject.toml | $(BIN)/python
	@echo "installing fmupsample into $(VENV); PyTorch is large, this takes a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml | $(BIN)/python
	@echo "installing fmupsample into $(VENV); PyTorch is large, this takes a few minutes"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/installed

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) demo build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
