# make setup | demo | test | test-slow | check | clean
# Another Python: make setup PYTHON=python3.12. Another torch than the lock's: make setup TORCH=2.11.0.
# Tests one after another: make test TEST_PROCESSES=0.

PYTHON ?= python3
TORCH ?= $(shell sed -n 's/^torch==//p' requirements.lock)
# Much of a test of stage 1 is waiting for Ray, so two processes are worth it on two cores.
TEST_PROCESSES ?= 2
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready-torch-$(TORCH)

.PHONY: setup demo test test-slow check clean
.DEFAULT_GOAL := setup

setup: $(READY)

# torch first and by its version: whatever asks for torch later finds it there. The lock holds the rest to exact
# versions; FlashAttention 3 is not in it: docs/training_speed.md says where it comes from.
$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "error: found Python %d.%d: expected 3.11 or later: make setup PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "torch==$(TORCH)"
	sed '/^torch==/d' requirements.lock > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev,s3,tensorboard]'
	@rm -f $(VENV)/.ready-*
	@touch $@

demo: setup
	$(BIN)/python -m examples.demo --output demo_output

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest -m 'not slow and not gpu and not multigpu' -n $(TEST_PROCESSES) --dist loadfile

test-slow: setup
	$(BIN)/python -m pytest -m 'slow'

clean:
	rm -rf $(VENV) demo_output build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
