# Everything a newcomer needs; `make help` lists it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
# The first Python >= 3.12 that really runs (a version manager's shim may be there and not work).
PYTHON312 ?= $(shell for python in python3.12 python3.13 python3.14 python3 $$HOME/.pyenv/versions/3.1[2-9]*/bin/python; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && { echo "$$python"; break; }; done)
# Overrides of `make pretrain`: make pretrain ARGS="model=tiny run.steps=20"
ARGS ?=
# Of `make test`: the tests that start several ranks share one worker.
WORKERS ?= 2
TESTS ?= tests
# Of `make eval`: a run, and the packed model made of it.
RUN ?= runs/default
MODEL ?= $(RUN)/packed
KV_BITS ?= 16 4 3
# Of `make bench-gpu`: a Python with a torch for CUDA, which is not what `make setup` installs, and where results go.
BENCH_PYTHON ?= python3
RESULTS ?= runs/bench.jsonl

# $(call install,DIRECTORY,PYTHON): a virtual environment with bitmoe in it, editable.
define install
	@$(2) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "bitmoe needs Python >= 3.11 and '$(2)' is not: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "setup: $(1) with $$($(2) --version); what constraints.txt lists is downloaded and installed (minutes, once)"
	@$(2) -m venv --clear $(1)
	@$(1)/bin/python -m pip --disable-pip-version-check install --progress-bar off \
		--constraint constraints.txt --editable '.[test]' </dev/null | sed -unE 's/^ +(Downloading .*)/setup: \1/p; s/^(Installing collected).*/setup: installing/p'
	@touch $(1)/installed
	@echo "setup: done"
endef

.PHONY: help
help:  ## Show this help.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: .venv/installed  ## Make .venv with everything in it (skipped when up to date).

.venv/installed: pyproject.toml setup.py constraints.txt
	$(call install,.venv,$(PYTHON))

.venv-py312/installed: pyproject.toml setup.py constraints.txt
	@[ -n "$(PYTHON312)" ] || { \
		echo "no Python >= 3.12 found: make test-py312 PYTHON312=/path/to/python3.12" >&2; exit 1; }
	$(call install,.venv-py312,$(PYTHON312))

.PHONY: pretrain
pretrain: setup  ## Pretrain the default model; ARGS="key=value ..." changes it.
	@.venv/bin/bitmoe pretrain $(ARGS)

.PHONY: eval
eval: setup  ## Evaluate a run with lm-eval on the text it held out, at each of KV_BITS; RUN=runs/NAME takes another.
	@[ -d $(MODEL) ] || .venv/bin/bitmoe convert source=$(RUN) to=bitmoe out=$(MODEL)
	@.venv/bin/python tools/evaluate.py $(MODEL) --run $(RUN) --kv-bits $(KV_BITS)

.PHONY: bench-gpu
bench-gpu:  ## Benchmarks of one NVIDIA GPU beside baselines, run by BENCH_PYTHON; RESULTS=file takes the JSON lines.
	@PYTHONPATH=.:kernels$${PYTHONPATH:+:$$PYTHONPATH} $(BENCH_PYTHON) tools/bench_gpu.py --out $(RESULTS)

.PHONY: test
test: setup lint  ## Run the linter and all tests; TESTS=tests/arch runs a part.
	@.venv/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)

.PHONY: test-py312
test-py312: .venv-py312/installed  ## Run all tests on Python >= 3.12, with the newer megatron-core.
	@.venv-py312/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(TESTS)

.PHONY: lint
lint: setup  ## Run the linter.
	@.venv/bin/ruff check --output-format concise .

.PHONY: clean
clean:  ## Remove environments, caches and build outputs; runs/ and data/ stay.
	rm -rf .venv .venv-py312 build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +
