# Everything runs in .venv, made on first use. PYTHON picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
INTEGRATIONS ?= .venv-integrations
SERVING ?= .venv-serving
DOCS ?= .venv-docs
BIN = $(VENV)/bin
INSTALL = $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: install demo test quick full check style integrations serving docs

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml references/pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) "torch>=2.11"
	$(INSTALL) -e ".[bench,triton,dev]" -e ./references
	touch $@

demo: install  ## compress the shipped reference model: a table, a plot, a picture
	$(BIN)/vispress demo --out demo

test: install  ## all tests; law 1 on every method, further ones on every way through the runtime
	$(BIN)/python -m pytest -n 2 --dist worksteal

quick: install  ## one case of each test, without the slow ones
	$(BIN)/python -m pytest -n 2 --dist worksteal --quick

full: install  ## everything: laws on every method and every family
	$(BIN)/python -m pytest -n 2 --dist worksteal -m full

integrations: $(INTEGRATIONS)/.installed  ## tests of the lmms-eval plug-in, of datasets, of int8 models, of TRL
	HF_HUB_OFFLINE=1 $(INTEGRATIONS)/bin/python -m pytest tests/integrations \
		-n 2 -o addopts="-q -p no:logging --strict-markers --strict-config"

# on top of VENV: what is there is not installed again; lmms-eval alone, without its judges and demos
$(INTEGRATIONS)/.installed: $(VENV)/.installed tests/integrations/requirements.txt
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(BIN)/python -c "import sysconfig as s; print(f'import site; site.addsitedir({s.get_path(\"purelib\")!r})')" \
		> $$($(INTEGRATIONS)/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))")/below.pth
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r tests/integrations/requirements.txt
	$(INTEGRATIONS)/bin/pip install --quiet --disable-pip-version-check --no-deps "lmms-eval==0.7.3"
	touch $@

serving: $(SERVING)/.installed  ## tests of the vLLM plug-in, on CPUs; installing takes 3.5 GB
	HF_HUB_OFFLINE=1 $(SERVING)/bin/python -m pytest tests/serving \
		-o addopts="-q -p no:logging --strict-markers --strict-config"

# on its own: vLLM pins what the other environments leave open. Its wheels of torchaudio and
# torchcodec are built for CUDA, and their import fails beside a torch without
$(SERVING)/.installed: constraints.txt pyproject.toml tests/serving/requirements.txt
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(SERVING)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-r tests/serving/requirements.txt -e .
	$(SERVING)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

docs: $(DOCS)/.installed  ## the site, in site/: a page a method; warnings are errors
	HF_HUB_OFFLINE=1 NO_MKDOCS_2_WARNING=1 PYTHONPATH=src:kernels:. $(DOCS)/bin/python -m mkdocs build --strict

# on top of VENV, as integrations are
$(DOCS)/.installed: $(VENV)/.installed docs/requirements.txt
	$(PYTHON) -m venv $(DOCS)
	$(BIN)/python -c "import sysconfig as s; print(f'import site; site.addsitedir({s.get_path(\"purelib\")!r})')" \
		> $$($(DOCS)/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))")/below.pth
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r docs/requirements.txt
	touch $@

style: install  ## format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: install  ## what CI checks beside the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
