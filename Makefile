# Everything runs in .venv, made on first use. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo test quick check style

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "torch>=2.11"
	$(INSTALL) -e ".[bench,triton,dev]"
	touch $@

demo: install  ## compress the shipped reference model: a table, a plot, a picture
	$(BIN)/vispress demo --out demo

test: install  ## all tests
	$(BIN)/python -m pytest -n 2

quick: install  ## tests without the slow ones
	$(BIN)/python -m pytest -n 2 -m "not slow"

style: install  ## format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: install  ## what CI checks beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
