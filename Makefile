# `make demo` and `make test` are all a fresh Debian or Ubuntu machine needs; root or not.
# PYTHON     the interpreter for .venv, 3.11 or newer
# PIP_ARGS   more arguments for pip: an index with CPU builds of torch, a proxy, ...
# TESTS      what `make test` runs: make test TESTS=tests/latency
# WORKERS    in how many processes; 0: in one, where a debugger can look

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PIP_ARGS ?=
TESTS ?= tests
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
BIN := .venv/bin
APT = $(shell if [ "$$(id -u)" = 0 ]; then echo "apt-get"; \
	elif sudo -n true 2>/dev/null; then echo "sudo -n apt-get"; fi)

# Threads that spin while they wait starve each other on a busy machine: training is many times slower without these.
export OMP_WAIT_POLICY := passive
export GOMP_SPINCOUNT := 3000
export KMP_BLOCKTIME := 0
export DEBIAN_FRONTEND := noninteractive

.DEFAULT_GOAL := help
.PHONY: help env data demo test lint format soak gpu-test clean distclean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(BIN)/.installed ## The environment in .venv, with the set of packages that is known to work together

$(BIN)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing into .venv; takes a few minutes the first time"
	$(BIN)/pip install $(PIP_ARGS) --quiet -c constraints.txt -e '.[dev,rtx,openvino,cuda]'
	@touch $@

$(BIN)/pip:
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.11 or newer found; install one, or name it: make env PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: $(PYTHON) is older than 3.11; name a newer one: make env PYTHON=python3.12" >&2; exit 1; }
	@if ! $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null; then \
		package=$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
		if [ -n "$(APT)" ] && command -v apt-get >/dev/null; then \
			$(APT) install -y -qq $$package || { $(APT) update -qq && $(APT) install -y -qq $$package; }; \
		else \
			echo "make: $(PYTHON) can't make environments; install $$package (sudo apt-get install $$package)" >&2; exit 1; \
		fi; \
	fi
	$(PYTHON) -m venv .venv

data: ## Fashion-MNIST from the system's package where that can be had; else it is downloaded when first used
	@if [ -e /usr/share/datasets/fashion-mnist ] || { [ -n "$$PASSDEPLOY_DATA" ] && \
		find -L $$(echo "$$PASSDEPLOY_DATA" | tr : ' ') -maxdepth 3 -name 'train-images-idx3-ubyte*' 2>/dev/null | grep -q .; }; then \
		echo "data: Fashion-MNIST is here"; \
	elif [ -n "$(APT)" ] && command -v apt-get >/dev/null; then \
		$(APT) install -y -qq dataset-fashion-mnist >/dev/null 2>&1 \
		|| { $(APT) update -qq && $(APT) install -y -qq dataset-fashion-mnist >/dev/null; } \
		|| echo "data: the system has no dataset-fashion-mnist; it is downloaded when first used"; \
	else \
		echo "data: not root, so Fashion-MNIST is downloaded when first used"; \
	fi

demo: env data ## The whole pipeline: ResNet-20 twice as fast on this machine's CPU, into runs/demo
	$(BIN)/passdeploy run --model resnet20 --data fashion-mnist --target cpu --latency 2x --out runs/demo

lint: env ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env ## Formats the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: env data lint ## What has to pass before a change goes in: no GPU, under 20 minutes on 2 cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TESTS) -m "not soak and not gpu" -n $(WORKERS) --dist loadfile

soak: env data ## The tests that run for hours
	$(BIN)/python -m pytest tests -m soak

gpu-test: env data ## The tests that need an NVIDIA GPU
	$(BIN)/python -m pytest tests/gpu -m gpu

clean: ## Removes caches and build products; keeps runs/ and .venv
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean ## Removes .venv too
	rm -rf .venv
