# Five verbs. `make check` is what a change must pass.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test lint check

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	touch $@

demo: install
	$(BIN)/python quantize/run.py --bits 4 --resume

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint test
