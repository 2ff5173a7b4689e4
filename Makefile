# Every target prepares .venv by itself; PYTHON chooses the interpreter that it is made from.
PYTHON ?= python3
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: demo test lint bench

demo: $(STAMP)
	$(BIN)/python benchmarks/demo.py

# Files side by side on one thread each: most tests are small nets, which two threads hardly speed up.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -P -m pytest -n auto --maxprocesses 4 --dist loadfile \
	  -m "not slow and not gpu" $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/accuracy.py --quick

# The stamp is written last, so an installation that was cut off is taken up again. An environment
# without a working interpreter or pip cannot be repaired in place and is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: $(PYTHON) is missing or older than 3.11, which the pinned set needs;" \
	       "name another with PYTHON=..." >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[compile,openvino,test]'
	@touch $@
