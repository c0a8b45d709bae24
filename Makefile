# `make quickstart` and `make test` need Python 3.11+ and a package index, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test lint functional clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m distill.main --config=configs/arithmetic.py --workdir=runs/quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

functional: $(VENV)/.installed
	PYTHON=$(abspath $(BIN))/python bash tests/functional/distillation.sh
	PYTHON=$(abspath $(BIN))/python bash tests/functional/gsm8k.sh

# A stamp per requirements file: installing again only when it changes.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11: pass PYTHON=python3.11 or newer"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements-test.txt
	@touch $@

clean:
	rm -rf $(VENV) runs
