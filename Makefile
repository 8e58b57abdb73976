# Every target prepares what it needs: `make run` and `make test` work in a fresh clone, in either order.

PYTHON ?= python3

# Settable on the command line only: an unrelated variable of the environment must not redirect `make clean`.
VENV    := .venv
WORKERS := 2
CHIP    := hw_configs/h100.yaml
ARGS    :=
TESTS   :=

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input

.PHONY: help run test check lint types pytest format golden sample bench wheel clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help:
	@echo "make run      simulate and write the report (CHIP=$(CHIP), ARGS='...' adds options)"
	@echo "make test     all checks: ruff, mypy, tests, notebooks, examples of the docs (make check is the same)"
	@echo "make lint     ruff, check only        make types    mypy"
	@echo "make pytest   tests only (TESTS='...' chooses some, WORKERS=$(WORKERS) processes)"
	@echo "make format   let ruff rewrite the code"
	@echo "make golden   rewrite the golden cycle counts and digests; review the diff"
	@echo "make sample   rewrite the sample report, whose first lines README quotes, and the ledger of claims"
	@echo "make bench    speed and memory of the engines and of the default run"
	@echo "make wheel    build the wheel and the sdist into dist/"
	@echo "make clean    remove what make created, reports left alone"
	@echo "PYTHON=$(PYTHON) is the interpreter to start from (3.11 or newer)."

run: $(VENV)/.run
	$(PY) -m ttt_sim run $(CHIP) $(ARGS)

test check: lint types pytest

lint: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(VENV)/.dev
	$(PY) -m mypy

pytest: $(VENV)/.dev
	$(PY) -m pytest -n $(WORKERS) $(TESTS)

format: $(VENV)/.dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

golden: $(VENV)/.dev
	$(PY) -m tests.golden.regenerate

sample: $(VENV)/.dev
	$(PY) -m ttt_sim run hw_configs/h100.yaml --out reports/sample
	$(PY) -m ttt_sim claims

bench: $(VENV)/.dev
	@for script in benchmarks/bench_*.py; do echo "$$script"; $(PY) "$$script" || exit 1; done

wheel: $(VENV)/.dev
	$(PY) -m hatchling build

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find ttt_sim tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps inside the environment, so that deleting it forgets them too. Installs are editable: the checkout is what runs.

$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: '$(PYTHON)' not found; install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is $$($(PYTHON) -V 2>&1), ttt_sim needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) -V 2>&1)"
	@$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu the package python3-venv provides it" >&2; exit 1; }
	@touch $@

$(VENV)/.run: $(VENV)/.created pyproject.toml
	@echo "installing ttt_sim into $(VENV)"
	@$(PIP) install --quiet --editable .
	@touch $@

# Covers .run as well, so that `make run` after `make test` installs nothing.
$(VENV)/.dev: $(VENV)/.created pyproject.toml
	@echo "installing ttt_sim with its test tools into $(VENV)"
	@$(PIP) install --quiet --editable '.[dev]'
	@touch $(VENV)/.run $@
