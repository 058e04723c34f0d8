# Two commands for a new user: `make demo` and `make test`. Both do their own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEGRATIONS := $(VENV)/.installed-integrations
DOCS := $(VENV)/.installed-docs
PIP := $(BIN)/python -m pip install --disable-pip-version-check

.PHONY: demo test test-all test-every notebooks lint build docs clean

# Not --quiet: torch alone is hundreds of megabytes, and pip's bars say how far it is.
$(STAMP): requirements/pins.txt pyproject.toml
	@echo "Set-up 1 of 3: a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: everything after it is held to the same pins.
	@echo "Set-up 2 of 3: torch; a few minutes where it has to be downloaded"
	$(PIP) "$$(grep '^torch==' requirements/pins.txt)"
	@echo "Set-up 3 of 3: this package and what it is measured and tested with"
	$(PIP) -c requirements/pins.txt -e '.[bench,test,lint]'
	touch $@

# Apart, because `make demo` has no use for them.
$(INTEGRATIONS): $(STAMP)
	$(PIP) --quiet -c requirements/pins.txt -e '.[test-integrations]'
	# Without torchvision, which does not import beside a torch for the CPU alone; the tests do not use it.
	$(PIP) --quiet -c requirements/pins.txt --no-deps timm
	touch $@

$(DOCS): $(STAMP)
	$(PIP) --quiet -c requirements/pins.txt -e '.[docs]'
	touch $@

demo: $(STAMP)
	@echo "Demo: importing torch"
	$(BIN)/fop-bench demo

# Two at a time; OMP_NUM_THREADS keeps each to one core.
test test-all test-every notebooks: export OMP_NUM_THREADS = 1

# Without what is marked slow, and most cases of tests that have many; without Trainer, accelerate and Lightning, whose
# imports alone take long.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not many and not notebook" --ignore tests/integrations

# Of tests with very many cases half of these.
test-all: $(INTEGRATIONS)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not notebook and not rest"

test-every: $(INTEGRATIONS)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not notebook"

# The tutorials, each from its first cell to the assertion in its last.
notebooks: $(INTEGRATIONS)
	$(BIN)/python -m pytest -n 2 -m notebook tests/test_notebooks.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# dist/ is emptied, so that what is checked is what was built.
build: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m build --wheel --outdir dist bench
	$(BIN)/python -m twine check --strict dist/*
	test $$(cat dist/fop_optim-*.whl | wc -c) -lt 200000  # the optimizer alone

# Into site/; --strict: a broken link, or a name that the API page misses, is an error.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) build dist site
