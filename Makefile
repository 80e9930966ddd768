# Everything that is done with this repository. `make help` lists it.
#
#   PYTHON=python3.12      the interpreter of the environment (3.11 or newer)
#   VENV=.venv             where the environment is
#   TORCH_INDEX=URL        where torch alone comes from, as https://download.pytorch.org/whl/cpu: on Linux, PyPI's own
#                          torch brings several GB for CUDA, of which nothing here makes use
#   TARGET=onnx            what `make demo` lowers to: aoti (the default), torchscript, onnx or executorch
#   PYTEST_ARGS="-k name"  for `make test`
#   WORKERS=1              how many processes `make test` runs tests in (default: one a core, at most 4)
#   FUZZ_MINUTES=10        for `make fuzz`: what each of its eight parts gets, two at a time

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TARGET ?= aoti
PYTEST_ARGS ?=
WORKERS ?= auto
FUZZ_MINUTES ?= 10

MAKEFLAGS += --no-print-directory
PY := $(VENV)/bin/python
DEMO := nanochat-demo-$(TARGET)
QUESTION := What is 9325 + 33?
ANSWER := 9358
BUILD := build
# One stamp for each step that takes long; each is done again when what it depends on is newer.
VENV_DONE := $(VENV)/.nanochat_x-venv
PACKAGES_DONE := $(VENV)/.nanochat_x-packages
# What a bundle's content depends on: the code that lowers, and the demo model.
LOWERING := $(filter-out %/cli.py %/cli_run.py %/console.py %/runner.py %/build.py %/inspection.py \
  %/initialize.py %/cli_verify.py %/certificate.py %/parity.py %/parity_examples.py %/parity_page.py \
  %/parity_report.py %/parity_statistics.py %/session.py %/machine.py %/cli_options.py %/cli_reports.py \
  %/buildable.py %/comparing.py %/comparison.py %/cli_bench.py %/bench_plot.py %/matmul_speed.py %/doctor.py \
  %/doctor_bundle.py %/pins.py, \
  $(wildcard nanochat_x/*.py targets/*.py)) $(shell find nanochat_x/demo -type f)
CXX_FILES = $(shell find runners -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# With flock, two `make` at once do one after the other what both need; the second finds it done.
LOCK := $(shell command -v flock >/dev/null 2>&1 && echo flock $(BUILD)/setup.lock)

.DEFAULT_GOAL := help
.PHONY: help setup setup-locked demo test check format fuzz fuzz-shows sanitize clean distclean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

# --- the environment

setup: ## the environment in .venv: dependencies, this package (editable), the C++ programs
	@mkdir -p $(BUILD)
	@$(LOCK) $(MAKE) setup-locked

setup-locked: $(PACKAGES_DONE)
	@sh scripts/system-deps.sh $(VENV)/cxx
	@$(PY) -m nanochat_x build-runners

$(VENV_DONE):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "nanochat_x needs Python 3.11 or newer; name one: make setup PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(PACKAGES_DONE): pyproject.toml $(VENV_DONE)
ifneq ($(TORCH_INDEX),)
	$(PY) -m pip install --disable-pip-version-check --index-url $(TORCH_INDEX) \
	  "$$(sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)"
endif
	$(PY) -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

# --- what one does with it

demo: $(BUILD)/demo-$(TARGET).stamp ## lower the demo model and ask it a question that takes the calculator
	@echo
	@echo "> $(QUESTION)"
	@$(PY) -m nanochat_x chat $(DEMO) --prompt "$(QUESTION)" --temperature 0 > $(BUILD)/demo.txt; \
	  code=$$?; cat $(BUILD)/demo.txt; exit $$code
	@grep -q '$(ANSWER)' $(BUILD)/demo.txt || { echo "that is wrong: it should be $(ANSWER)" >&2; exit 1; }
	@echo
	@echo "Now chat with it:  $(PY) -m nanochat_x chat $(DEMO)"

# The stamp tells that the bundle is of make's making, and so may be replaced and cleaned away.
$(BUILD)/demo-$(TARGET).stamp: $(LOWERING) pyproject.toml $(if $(wildcard $(DEMO)/manifest.json),,missing) | setup
	@if [ -e $(DEMO) ] && [ ! -e $@ ]; then \
	  echo "$(DEMO) is yours, not from \`make demo\`: taken as it is"; \
	else \
	  $(PY) -m nanochat_x lower -i demo --target $(TARGET) --output $(DEMO) --force && touch $@; \
	fi

.PHONY: missing
missing:

test: setup ## all tests, those of the C++ core too
	@$(PY) -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

check: setup ## formatting, lint, types, and the C++ code without a warning
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	@$(MAKE) types
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m nanochat_x build-runners --tests --werror

# mypy sees the package as it is installed: targets/ and runners/ inside nanochat_x/, by links.
.PHONY: types
types:
	@rm -rf $(BUILD)/types && mkdir -p $(BUILD)/types/nanochat_x
	@for f in nanochat_x/* targets runners; do ln -s ../../../$$f $(BUILD)/types/nanochat_x/; done
	@ln -s ../../tests ../../scripts ../../bench $(BUILD)/types/
	cd $(BUILD)/types && $(abspath $(PY)) -m mypy --config-file ../../pyproject.toml -p nanochat_x
	cd $(BUILD)/types && $(abspath $(PY)) -m mypy --config-file ../../pyproject.toml tests scripts bench

format: setup ## rewrite Python and C++ sources in the project's format
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

fuzz: setup ## each libFuzzer target, and C++ against Python, on ever new input, for FUZZ_MINUTES each
	@$(PY) -m nanochat_x build-runners --tests
	@$(PY) scripts/fuzz.py --minutes $(FUZZ_MINUTES)

fuzz-shows: setup ## the counts of docs/robustness.md: tokenizer, calculator, UTF-8, sampler, engine
	@$(PY) -m nanochat_x build-runners --tests
	@$(PY) scripts/fuzz_shows.py

sanitize: setup ## the C++ tests under address and undefined-behaviour sanitizers, then the thread sanitizer
	@$(PY) scripts/sanitize.py

clean: ## take away what make made, but not the environment
	@for stamp in $(BUILD)/demo-*.stamp; do \
	  [ ! -e "$$stamp" ] || { name=$${stamp##*/demo-}; rm -rf "nanochat-demo-$${name%.stamp}"; }; \
	done
	rm -rf $(BUILD) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis nanochat_x.egg-info
	find nanochat_x targets runners tests scripts bench -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## the environment too
	@if [ -e $(VENV_DONE) ]; then rm -rf $(VENV); else echo "$(VENV) is not from make: it stays"; fi
