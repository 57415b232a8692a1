# The tasks of this project; their names stay the same for ever. `make` alone lists them.
#
# Everything runs inside .venv, which the first task builds; nothing needs activating. Portable sh
# and GNU make 3.81, because that is what an old machine and a Mac have.
#
#   PYTHON=...       the Python to build .venv with (otherwise the first one found, 3.11 or newer)
#   TORCH_INDEX=...  the package index to take torch from; remembered in .venv. PyPI's wheel for Linux
#                    is the CUDA build of several GB; https://download.pytorch.org/whl/cpu has the
#                    build for CPUs
#   WORKERS=...      processes that share the tests (2)

.DEFAULT_GOAL := help
.PHONY: help install demo test check bench serve FORCE

BIN := .venv/bin
PYTHONS := $(if $(PYTHON),$(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)
WORKERS ?= 2
SAMPLE := $(BIN)/charloom sample demo "The " --max-tokens 300 --seed 1

# Two processes with one thread each, not one with two: the networks in the tests are too small to
# share a matrix product, while most tests wait for nothing but themselves. OpenMP's threads would
# spin for each other across the two processes; a passive wait keeps those tests quick that set a
# number of threads themselves.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE \
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

install: .venv/installed ## build or refresh the environment in .venv

demo: .venv/installed ## train about a minute on text that comes with Python, then print samples
	$(BIN)/charloom train python-docs --name demo --minutes 1 --overwrite
	@printf '\nA cautious sample (temperature 0.5):\n\n'
	@$(SAMPLE) --temperature 0.5
	@printf '\nA lively one (0.8):\n\n'
	@$(SAMPLE) --temperature 0.8
	@printf '\nOne drawn exactly as the model believes (1.0):\n\n'
	@$(SAMPLE) --temperature 1.0
	@printf '\nWhat to try next:\n'
	@printf '  %s\n' \
		'$(BIN)/charloom sample demo --interactive' \
		'$(BIN)/charloom train YOUR-TEXT.txt --name mine --minutes 5' \
		'$(BIN)/charloom models show demo' \
		'$(BIN)/charloom train --help'

test: .venv/installed ## run every test
	$(PYTEST)

check: .venv/installed ## format, lint, strict types, import contract, fast tests: about a minute
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -m "not slow"

bench: .venv/installed ## run the benchmarks; each prints its table with the machine it ran on
	$(BIN)/python benchmarks/corpus.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/serve.py

serve: .venv/installed ## serve what is in models/ over HTTP, at http://127.0.0.1:8000
	$(BIN)/charloom serve

# The stamp says that .venv matches these two files and the index torch came from.
REMEMBERED := $(shell cat .venv/torch-index 2>/dev/null)
TORCH_INDEX ?= $(REMEMBERED)
ifneq ($(TORCH_INDEX),$(REMEMBERED))
.venv/installed: FORCE
AGAIN := --force-reinstall
endif

# torch comes first and alone, so that its download, by far the largest, is seen. From an index of its
# own it comes without its dependencies: such an index carries few of the versions pinned here.
.venv/installed: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		for python in $(PYTHONS); do \
			"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
			python=; \
		done; \
		if [ -z "$$python" ]; then \
			echo 'Charloom needs Python 3.11 or newer, and "$(firstword $(PYTHONS))" is missing or older:' \
				'install one, or name it: make PYTHON=/path/to/python3' >&2; exit 1; \
		fi; \
		if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
			echo "$$python cannot build a virtual environment, because its venv module is not complete:" \
				'install it (on Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; \
		fi; \
		echo "Building .venv with $$("$$python" --version)"; \
		"$$python" -m venv --clear .venv; \
	}
ifeq ($(TORCH_INDEX),)
	@echo 'Taking torch from the default package index. On Linux that may be the CUDA build of several'
	@echo 'GB; for the smaller build for CPUs stop this and run:'
	@echo '  make $(or $(MAKECMDGOALS),install) TORCH_INDEX=https://download.pytorch.org/whl/cpu'
	$(BIN)/python -m pip install --constraint constraints.txt $(AGAIN) torch
else
	$(BIN)/python -m pip install --constraint constraints.txt --index-url $(TORCH_INDEX) --no-deps \
		$(AGAIN) torch
endif
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,tensorboard,serve,redis,dev]'
	@echo '$(TORCH_INDEX)' >.venv/torch-index
	@touch $@
