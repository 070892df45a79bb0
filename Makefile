# The commands of this project. Each sets up what it needs: a fresh clone on a machine with Python 3.11 and a
# package index is enough.
PYTHON ?= python3.11

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/requirements.lock
RAY := $(VENV)/ray.lock

.DEFAULT_GOAL := help
.PHONY: help grid study test gate parity speed lint assets gpu-bundle clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

grid: $(INSTALLED) ## compare the 4-bit methods on the default model (an hour on 2 cores)
	$(BIN)/python -m harness.grid grids/quick.yaml

study: $(INSTALLED) ## the same with everything learned and more of every task (hours; resumes)
	$(BIN)/python -m harness.grid grids/full.yaml

test: lint $(RAY) ## lint, then every test
	$(BIN)/python -m pytest --numprocesses auto --dist loadscope --no-loadscope-reorder

gate: $(INSTALLED) ## has accuracy fallen since results/reference/gate.json was recorded? (minutes)
	$(BIN)/python -m harness.gate --reference results/reference/gate.json

parity: $(INSTALLED) ## does the int4 execution of every method do what its simulation does? (two hours on 2 cores)
	$(BIN)/python -m harness.parity --out results/reference/parity.json.xz --report reports/parity.md

speed: $(INSTALLED) ## time the default model simulated and in int4 beside float (minutes; fails above 2x float)
	$(BIN)/python -m harness.speed --threads 2 --at-most 2 --out results/reference/speed.json

lint: $(INSTALLED) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

assets: $(INSTALLED) ## fetch the default model and the benchmark files, without running anything
	$(BIN)/python -m methods.assets

gpu-bundle: $(INSTALLED) ## pack what a grid and the benchmark's peers need on a GPU machine without an index
	$(BIN)/python -m methods.assets
	$(BIN)/python -m kernels.bundle collect grid --data "$$($(BIN)/python -c 'from methods import assets; print(assets.home() / "assets")')"
	$(BIN)/python -m kernels.bundle collect peers

# A set-up that begins anew takes this file with it.
$(RAY): $(INSTALLED)
	@if ! sed -n 's/^# ray: //p' requirements.lock | cmp -s - $@; then \
	  set -e; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$(sed -n 's/^# ray: //p' requirements.lock); \
	  sed -n 's/^# ray: //p' requirements.lock > $@; \
	fi

clean: ## remove the environment and every cache in this folder (results and downloads stay)
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The copy of the lock file is written last, so a set-up that was cut off starts again, and the contents are
# compared because a checkout changes the lock file's time. pip comes first: it installs the rest.
$(INSTALLED): requirements.lock
	@if cmp -s $< $@; then touch $@; else \
	  set -e; \
	  command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: make PYTHON=/path/to/python3.11" >&2; exit 2; }; \
	  echo "setting up $(VENV) from $<"; \
	  rm -rf $(VENV); \
	  $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^pip==' $<)"; \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check -r $<; \
	  $(BIN)/python -m pip check; \
	  if [ "$$(uname -s)" = Linux ]; then \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $$(sed -n 's/^# kernels: //p' $<); \
	  fi; \
	  cp $< $@; \
	fi
