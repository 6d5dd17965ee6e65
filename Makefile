# `make demo` and `make test` work on a machine that has Python 3.11, pip, make and gcc: they make .venv first.
PYTHON ?= python3.11
VENV ?= .venv
# Further arguments for pip, such as an index with CPU builds of torch.
PIP_FLAGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test soak bench bench-full check lint unit format clean

install: $(INSTALLED)

# torch comes first, so that the wheel pinned in constraints.txt is the one that everything else sees. Python compiles what
# is imported when it is: pip would compile 25,000 files, for a minute or two.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-compile $(PIP_FLAGS) -c constraints.txt torch
	$(BIN)/python -m pip install --no-compile $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/ray-prefopt demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -m 'not soak and not ray' --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest -m 'not soak and ray'

soak: $(INSTALLED)
	$(BIN)/python -m pytest -m soak

bench: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.step --quick

bench-full: $(INSTALLED)
	$(BIN)/python -m tests.benchmarks.step --arms trl padded unshared shared headed packed halved --out step.json
	$(BIN)/python -m tests.benchmarks.cluster --out cluster.json
	$(BIN)/python -m tests.benchmarks.tokens --out tokens.json
	$(BIN)/python -m tests.benchmarks.balance

check: lint unit

lint: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint cluster/Dockerfile

unit: $(INSTALLED)
	$(BIN)/python -m pytest tests/unit tests/test_imports.py tests/test_layers.py ray_prefopt -m 'not ray and not slow and not gpu'

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info
