# One word sets everything up and does it: `make sft rm ppo`, `make test`.
#   CONFIG=configs/tiny.yaml   another pipeline
#   ARGS="ppo.kl.coef=0.1"     settings, after the stages; for `make bench`, its flags

PYTHON ?= python3.11
CONFIG ?= configs/quickstart.yaml
ARGS   ?=
BENCH  ?= ppo
BIN    := .venv/bin
STAGES := sft rm ppo
GOALS  := $(filter $(STAGES),$(MAKECMDGOALS))
# ppo alone then also measures what it did.
TARGETS := $(GOALS) $(if $(filter ppo,$(GOALS)),evaluate)

.DEFAULT_GOAL := help
.PHONY: help setup $(STAGES) run test types tests check golden bench docs-figures chaos format clean

help:  ## This list.
	@awk -F ':.*## ' '/^[a-z $$()A-Z_-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready  ## Make .venv with everything in it.

# CPU wheels of torch have no separate name on the package index: it is installed first and alone, so that nothing that
# needs "some torch" pulls in another build.
.venv/ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there; next: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# Several goals in one call are one run: the first does the work, and the others wait for it.
$(STAGES): run
	@:

run: .venv/ready
	@$(BIN)/rlhf run $(TARGETS) --config $(CONFIG) $(ARGS)

check: .venv/ready  ## Lint, types, and the tests that start neither Ray nor training.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/pytest -m "not slow and not gpu and not vllm"

# Two processes with threads for each core would wait for each other.
test: export OMP_NUM_THREADS := 1
test: .venv/ready  ## Everything that CI runs: check, then the tests on a real Ray cluster.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(MAKE) --no-print-directory --jobs 2 types tests

# Beside each other: the tests leave processors idle while they wait.
types: .venv/ready
	$(BIN)/basedpyright

tests: .venv/ready
	$(BIN)/pytest -m "not gpu and not vllm" --durations=15 --numprocesses 2 --no-loadscope-reorder

golden: .venv/ready  ## Compare 20 steps of sft, rm and ppo with the recorded ones; ARGS=--record records them anew.
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.golden $(ARGS)

bench: .venv/ready  ## A PPO iteration beside the hardware's limit; BENCH=rollout, BENCH=sft, ARGS="--shape 1b".
	@$(BIN)/python -m benchmarks.$(BENCH) --shape tiny $(ARGS)

docs-figures: .venv/ready  ## Draw the pictures of docs/ from docs/data; that of the report needs chromium.
	@$(BIN)/python -m benchmarks.figures $(ARGS)

chaos: .venv/ready  ## The whole fault suite, for hours; interrupted, it goes on. `rm -r .chaos` starts it anew.
	$(BIN)/pytest tests/faults --chaos

format: .venv/ready  ## Format and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and caches; the store stays.
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis *.egg-info
