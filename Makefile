# Two commands set everything up on a fresh machine: make demo, make test.
PYTHON ?= python3.12
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slurm campaign format

demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash pipelines/demo.sh demo

# Several run at once, so each with one thread of OpenMP.
test slurm campaign: export OMP_NUM_THREADS = 1

test: .venv/installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	find psfgen psftrain -name '*.nb?' -delete  # numba does not notice that a module which it compiled from has changed
	$(BIN)/python -m pytest -q -n 3 --dist worksteal

# A real one-node Slurm, started for the tests; needs slurmctld slurmd slurm-client munge, and takes some 3 minutes.
slurm: .venv/installed-test
	$(BIN)/python -m pytest -q -m slurm

# The long campaigns of kills and statistics: some ten minutes and more, before a release.
campaign: .venv/installed-test
	$(BIN)/python -m pytest -q -m campaign

format: .venv/installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python setup.cfg constraints.txt
	@echo "installing into .venv (a few minutes the first time, some 6 GB with PyTorch) ..."
	$(PIP) -e .
	@touch $@

.venv/installed-test: .venv/installed
	@echo "installing the tools of the tests ..."
	$(PIP) -e '.[test]'
	@touch $@
