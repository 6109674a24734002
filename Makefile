# hpc_bnn. `make help` lists the targets.
SHELL := /bin/sh
.DEFAULT_GOAL := help
ACTIVATE = . tools/activate.sh
RUN_DIR ?= runs/quickstart
BACKEND ?= auto
# The bytecode of hpc_bnn and of the tests is kept: otherwise each of a hundred processes compiles all of it again
unexport PYTHONDONTWRITEBYTECODE
# Prints a line when a test ends, and the longest tests at the end; -u: also into a pipe
PYTEST = python -u -m pytest tests -v -n 2 --durations 40

.PHONY: help setup quickstart test test-all gpu-check lint clean

help: ## List the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: ## Make .venv with torch, MPI, Horovod and hpc_bnn (does nothing if .venv is up to date)
	@tools/setup.sh

quickstart: setup ## Train a Bayesian network on real data on 4 ranks (2 x 2) and write runs/quickstart/
	$(ACTIVATE); python data_prep/digits.py --output data/digits
	$(ACTIVATE); mpirun -np 4 python -m mpi4py -m hpc_bnn train --config configs/digits.yaml \
	    --grid.sample_size 2 --backend $(BACKEND) --run_dir $(RUN_DIR)
	$(ACTIVATE); python -m hpc_bnn report $(RUN_DIR)

test: setup ## Run the quick tests, serial and on 1 and 4 MPI ranks (on a slow machine set HPC_BNN_TEST_PATIENCE=3)
	$(ACTIVATE); $(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: setup ## Run all tests: the quick tests of `make test` and the slow ones
	$(ACTIVATE); $(PYTEST) $(PYTEST_ARGS)

gpu-check: ## Test and measure on a machine with an NVIDIA GPU, offline and without set-up (PYTHON=..., WHEELS=DIR; 6 minutes)
	@tools/gpu_check.sh

lint: setup ## Check style, docstrings, types and the order of imports
	$(ACTIVATE); command -v basedpyright >/dev/null || python -m pip install -q 'basedpyright>=1.20'
	$(ACTIVATE); ruff check . && ruff format --check . && lint-imports && basedpyright

clean: ## Remove the environment, data and runs
	rm -rf .venv data runs
