# `make demo` and `make test` do all set-up themselves; see README.md. Everything else here is for developers.
SHELL := /bin/bash
VENV ?= .venv
OLDEST ?= .venv-oldest
BIN := $(VENV)/bin
# The oldest torch declared. Where PyTorch's index is out of reach, give a version whose CPU build pip can find.
TORCH_OLDEST ?= 2.11.0
TORCHVISION_OLDEST ?= 0.26.0
PINNED = $(shell sed -n 's/^$(1)==//p' constraints.txt)

# One thread per process: the tests run as many processes as there are cores. Nothing is fetched from a hub.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PATH="$(CURDIR)/$(BIN):$$PATH"
SETUP_FILES := pyproject.toml constraints.txt scripts/make-venv.sh
# For its Llama-3 tokenizer file alone: its dependencies, and what they would change here, are not wanted.
LLAMA_TOKENIZER = $(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llama-models==$(call PINNED,llama-models)
# A torchvision of another build than torch cannot be imported, and older transformers import it where it is installed.
FITTING_TORCHVISION = @$(@D)/bin/python -c 'import torchvision' >/dev/null 2>&1 || { \
	echo "setup: torchvision does not fit this torch; removed (one test then uses a stand-in)"; \
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision; }
TEST_EXTRAS := deepspeed,quant,data,metrics,track,serve,video,sentencepiece,demo,dev
ALL_EXTRAS := deepspeed,quant,data,metrics,track,serve,web,video,sentencepiece,demo,dev

.PHONY: demo test test-unit test-parity test-integration test-distributed test-docs test-fuzz test-gpu test-oldest test-vllm test-web fuzz lint format \
	render check-extras clean help

help:            ## this list
	@sed -n 's/^\([a-z-]*\): .*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(VENV)/.installed-demo ## set up, then the whole workflow on the tiny model (no GPU, no network after set-up)
	$(BIN)/cogtune demo $(ARGS)

test: $(VENV)/.installed-test lint ## set up, then lint, types, import contracts and all tests, tier by tier
	$(TEST_ENV) $(BIN)/python tests/run_tiers.py unit parity integration distributed docs fuzz $(ARGS)

test-unit test-parity test-integration test-distributed test-docs test-fuzz test-gpu: test-%: $(VENV)/.installed-test
	$(TEST_ENV) $(BIN)/python tests/run_tiers.py $* $(ARGS)

test-web: $(VENV)/.installed-web ## the page of `cogtune web`, driven by a real browser; wants chromium on the PATH
	$(TEST_ENV) $(BIN)/python tests/run_tiers.py web $(ARGS)

fuzz: $(VENV)/.installed-test ## 100,000 broken inputs of every kind; writes benchmarks/results/fuzz.json
	$(TEST_ENV) $(BIN)/python -m tests.fuzz --output benchmarks/results/fuzz.json $(ARGS)

lint: $(VENV)/.installed-test ## ruff, formatting, mypy --strict on src and benchmarks, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-test ## let ruff fix and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

render: $(VENV)/.installed-test ## rewrite the tables in the docs from benchmarks/results
	$(BIN)/python -m benchmarks.render

test-oldest: $(OLDEST)/.installed ## the model's tests with the oldest declared versions; writes benchmarks/results/oldest.json
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" $(OLDEST)/bin/python tests/run_tiers.py \
		--json benchmarks/results/oldest.json oldest

test-vllm: ## the plug-in for vLLM against generate(), on a CPU, in an environment of its own (3 GB)
	scripts/make-venv.sh .venv-vllm demo /dev/null $(call PINNED,torch) $(call PINNED,torchvision)
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e 'contrib/vllm[cpu,dev]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd contrib/vllm && OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 \
		../../.venv-vllm/bin/python -m pytest -q $(ARGS)

check-extras: ## all extras together in a fresh environment, then pip check; writes benchmarks/results/extras.json
	rm -rf .venv-extras
	scripts/make-venv.sh .venv-extras $(ALL_EXTRAS) constraints.txt $(call PINNED,torch) $(call PINNED,torchvision)
	.venv-extras/bin/python scripts/check_extras.py benchmarks/results/extras.json

clean: ## remove environments, caches and build products; results and outputs stay
	rm -rf $(VENV) $(OLDEST) .venv-extras .venv-vllm build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-test: $(SETUP_FILES)
	scripts/make-venv.sh $(VENV) $(TEST_EXTRAS) constraints.txt $(call PINNED,torch) $(call PINNED,torchvision)
	$(LLAMA_TOKENIZER)
	$(FITTING_TORCHVISION)
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-demo: $(SETUP_FILES)
	scripts/make-venv.sh $(VENV) demo constraints.txt $(call PINNED,torch) $(call PINNED,torchvision)
	@touch $@

$(VENV)/.installed-web: $(VENV)/.installed-test
	scripts/make-venv.sh $(VENV) $(TEST_EXTRAS),web constraints.txt $(call PINNED,torch) $(call PINNED,torchvision)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt playwright
	$(FITTING_TORCHVISION)
	@touch $@

$(OLDEST)/.installed: $(SETUP_FILES) constraints-oldest.txt
	scripts/make-venv.sh $(OLDEST) demo,quant,dev constraints-oldest.txt $(TORCH_OLDEST) $(TORCHVISION_OLDEST)
	$(LLAMA_TOKENIZER)
	$(FITTING_TORCHVISION)
	@touch $@
