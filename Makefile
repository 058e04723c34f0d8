# Two commands for a new user: `make demo` and `make test`. Both do their own set-up.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INTEGRATIONS := $(VENV)/.installed-integrations

.PHONY: demo test test-all lint build clean

$(STAMP): requirements/pins.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	# torch first and alone: everything after it is held to the same pins.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements/pins.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/pins.txt -e '.[bench,test,lint]'
	touch $@

# Apart, because `make demo` has no use for them.
$(INTEGRATIONS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements/pins.txt -e '.[test-integrations]'
	touch $@

demo: $(STAMP)
	$(BIN)/fop-bench demo

# Two at a time; OMP_NUM_THREADS keeps each to one core.
test test-all: export OMP_NUM_THREADS = 1

# Without what is marked slow, and without Trainer, accelerate and Lightning, whose imports alone take long.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --ignore tests/integrations

test-all: $(INTEGRATIONS)
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: $(STAMP)
	$(BIN)/python -m build

clean:
	rm -rf $(VENV) build dist
