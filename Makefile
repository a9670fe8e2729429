# The two commands of the README are `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: demo test check suite coverage services stop-services bench bench-gpu docs clean

demo: $(VENV)/.demo
	$(VENV)/bin/mcf demo

test: check suite

# Linters and type checks.
check: $(VENV)/.test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

# The tests, by three processes, one of which mostly waits for Slurm; those that need a real Slurm or S3 server run if
# `make services` was called before, and are listed if not.
suite: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/pytest -n 3 --dist loadfile --no-loadscope-reorder $(COV)

# The same, and which lines no test of them reached in its own process: half as much again of the tests' time.
coverage: COV := --cov --cov-report=term:skip-covered
coverage: suite

# Root on Debian: installs and starts the real Slurm and S3 server of the tests.
services: $(VENV)/.test
	$(VENV)/bin/python -m tests.services start

stop-services: $(VENV)/.test
	$(VENV)/bin/python -m tests.services stop

bench: $(VENV)/.test
	$(VENV)/bin/python -m benchmarks

# On a machine with a CUDA GPU.
bench-gpu: $(VENV)/.test
	$(VENV)/bin/python -m benchmarks compiled gpu

# The documentation as a site, in site/; a link that leads nowhere fails.
docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e '.[test]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) demo site
