# Two commands set everything up on a fresh machine with Python 3.11+:
#   make quickstart   trains a small MoE on real text, on the CPU
#   make test         passes the tests
PYTHON ?= python3
VENV := .venv
NMOE := $(VENV)/bin/nmoe
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint clean

quickstart: $(STAMP)
	$(NMOE) prep-mixture configs/quickstart.toml
	$(NMOE) train configs/quickstart.toml --resume

test: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/pytest --cov=nmoe --cov-report=term:skip-covered

lint: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade pip
	$(VENV)/bin/pip install --quiet torch==2.13.0
	$(VENV)/bin/pip install --quiet --editable '.[test]'
	touch $@

# `make .venv` only sets up.
$(VENV): $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info
