# make demo   a client, a router and a server in namespaces, real traffic through `fp router` (ARGS="--json --seconds 5")
# make test   every test (ARGS="-k lpm -x"); those that need root are skipped with that reason otherwise
# make test-vm  zero-copy tests in a guest with a newer kernel (qemu, software emulation, minutes)
# make stress the stress tests with 10^8 elements where `make test` has 10^6 (COUNT=1000000000 for more)
# make docs   the documentation, as HTML in build/docs
# make lint   ruff and mypy
# make bench  NAME=forward, or all of them
# The virtual environment .venv is made by the first command that needs it.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
ARGS ?=
NAME ?=
COUNT ?= 100000000

.PHONY: demo test test-vm stress docs lint format bench clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -8

demo: $(VENV)/.ready
	@$(RUN) -m libfp demo $(ARGS)

test: $(VENV)/.ready-dev
	@$(RUN) -m tests.run $(ARGS)

# What can be had is installed; what is missing then is pytest's reason to skip. The kernel is downloaded, not installed.
test-vm: $(VENV)/.ready-dev
	@if ! command -v qemu-system-x86_64 >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo "libfp: installing qemu-system-x86"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
			apt-get install -y -qq --no-install-recommends qemu-system-x86 >/dev/null || true; \
	fi
	@LIBFP_VM=1 $(RUN) -m pytest tests/vm $(ARGS)

stress: $(VENV)/.ready-dev
	@LIBFP_STRESS=$(COUNT) $(RUN) -m pytest -m stress $(ARGS)

docs: $(VENV)/.ready-dev
	@$(RUN) -m sphinx -q -W --keep-going docs build/docs $(ARGS)
	@echo "libfp: build/docs/index.html"

lint: $(VENV)/.ready-dev
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy

format: $(VENV)/.ready-dev
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: $(VENV)/.ready-dev
	@$(RUN) -m bench $(NAME) $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

# The markers say which set of dependencies is in place, so that a repeated make starts at once.
$(VENV)/.ready: pyproject.toml | $(VENV)/bin/python
	@echo "libfp: installing into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml | $(VENV)/bin/python
	@echo "libfp: installing with the development tools into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@ $(VENV)/.ready

# Debian's python3 comes without venv and pip: install them where we may, else say exactly what to type.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "libfp: needs Python 3.11 or later; try: make PYTHON=python3.11" >&2; exit 2; }
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "libfp: installing python3-venv"; \
			apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq python3-venv >/dev/null; \
		else \
			echo "libfp: the Debian package python3-venv is missing; type: sudo apt-get install -y python3-venv" >&2; \
			exit 2; \
		fi; \
	fi
	@$(PYTHON) -m venv $(VENV)
