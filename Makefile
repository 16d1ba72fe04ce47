# One word sets everything up and does it: `make sft rm ppo`, `make test`.
#   CONFIG=configs/tiny.yaml   another pipeline
#   ARGS="ppo.kl.coef=0.1"     settings, after the stages; for `make bench`, its flags

# Empty takes the newest of these that works: a name may be there, as one of pyenv's, without its Python.
PYTHON  ?=
PYTHONS := python3.13 python3.12 python3.11
CONFIG ?= configs/quickstart.yaml
ARGS   ?=
BENCH  ?= ppo
BIN    := .venv/bin
STAGES := sft rm ppo grpo rloo dpo
# uv, where it is, installs the same versions faster.
INSTALL := $(if $(shell command -v uv),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet \
           --disable-pip-version-check) --constraint constraints.txt
GOALS  := $(filter $(STAGES),$(MAKECMDGOALS))
# The last stage, of those named the one that aligns a policy, is also measured.
LAST   := $(lastword $(filter-out sft rm,$(GOALS)))
TARGETS := $(GOALS) $(if $(LAST),"evaluate.policies=[$(LAST)]" evaluate)

.DEFAULT_GOAL := help
.PHONY: help setup demo $(STAGES) run test types tests check golden bench docs docs-figures chaos wheel matrix format \
        clean

help:  ## This list.
	@awk -F ':.*## ' '/^[a-z $$()A-Z_-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready  ## Make .venv with everything in it.

demo: .venv/ready  ## In a few minutes: a model made from nothing learns from rankings before your eyes.
	@$(BIN)/rlhf demo $(ARGS)

# CPU wheels of torch have no separate name on the package index: it is installed first and alone, so that nothing that
# needs "some torch" pulls in another build.
.venv/ready: pyproject.toml constraints.txt
	@for python in $(or $(PYTHON),$(PYTHONS)); do \
	  if $$python -c 'import ensurepip' 2>/dev/null; then exec $$python -m venv .venv; fi; done; \
	echo "error: none of $(or $(PYTHON),$(PYTHONS)) is here with its venv; next: install one, or make PYTHON=… $(MAKECMDGOALS)"; \
	exit 2
	$(INSTALL) pip setuptools wheel
	$(INSTALL) torch
	$(INSTALL) --no-build-isolation --editable '.[dev]'
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

# Zensical is kept by the makers of Material for MkDocs, which is no longer developed; its strict mode checks links and
# anchors, and it needs eight small packages.
docs: .venv/ready  ## The site: build/site/index.html.
	@$(BIN)/python docs/pages.py build/docs
	@$(BIN)/zensical build --strict --clean

docs-figures: .venv/ready  ## Draw the pictures of docs/ from docs/data; that of the report needs chromium.
	@$(BIN)/python -m benchmarks.figures $(ARGS)

chaos: .venv/ready  ## The whole fault suite, for hours; interrupted, it goes on. `rm -r .chaos` starts it anew.
	$(BIN)/pytest tests/faults --chaos

wheel: .venv/ready  ## dist/*.whl and the source distribution.
	rm -rf dist build
	$(BIN)/python -c "from setuptools import build_meta as build; build.build_sdist('dist'); build.build_wheel('dist')" >/dev/null

matrix: wheel  ## The wheel with the oldest and the newest versions that it admits, through the tiny pipeline; .ci/matrix.
	.ci/matrix $(ARGS)

format: .venv/ready  ## Format and fix what can be fixed.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and caches; the store stays.
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis *.egg-info
