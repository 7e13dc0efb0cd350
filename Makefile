# The developer's verbs. `make check` is what a change must pass.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install demo test test-fast fuzz lint check

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	touch $@

demo: install
	$(BIN)/python quantize/run.py --bits 4 --resume

test: install
	$(BIN)/python -m pytest -n logical

# No slow and no gpu tests.
test-fast: install
	$(BIN)/python -m pytest -m 'not slow and not gpu' -n logical

# All readers of untrusted files and requests, for MINUTES minutes; status 1 if there are finds, in output/fuzz/finds.
MINUTES := 10
fuzz: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz --minutes $(MINUTES)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test
