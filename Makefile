# Each target installs what it needs, once. Its description shows the command to run without make.
#
#   make demo                    fine-tune a real model, print a table of before and after
#   make demo TASK=address       the same on US addresses -> JSON
#   make learn                   open the notebooks in JupyterLab (LAB=--no-browser: print its address)
#   make test                    lint, types and the fast tests
#   make test ROOM=lora          the fast tests of one folder of tests/
#   make test ISA=avx2           the same as on a processor without AVX-512 (or ISA=default: with SSE alone)
#   make install TORCH_INDEX=https://download.pytorch.org/whl/cpu    torch without CUDA

PYTHON ?= python3
VENV ?= .venv
TASK ?= icd10
WORKERS ?= 2
ROOM ?=
ISA ?=
LAB ?=
TORCH_INDEX ?=

TRITONS := 3.3.0 3.9.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
FIND_TORCH := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.DEFAULT_GOAL := help
.PHONY: help venv install tritons demo learn test fast-tests test-all check-demo lint format types bench pictures notebooks docs clean

help:  ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/' | expand -t 20

# ---- set-up: stamp files in the environment make it run once, and again when versions change

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minilora needs Python >= 3.11, and $(PYTHON) is `$(PYTHON) --version 2>&1`: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "no venv: on Debian and Ubuntu, apt install python3-venv"; exit 1; }

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV), once: pip install -c constraints.txt -e '.[gguf]' (minutes)"
	@$(PIP) install -qq -c constraints.txt $(FIND_TORCH) -e '.[gguf]'
	@touch $@

$(VENV)/.learn: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV), once: pip install -c constraints.txt -e '.[learn]' (minutes)"
	@$(PIP) install -qq -c constraints.txt $(FIND_TORCH) -e '.[learn]'
	@touch $@ $(VENV)/.demo

$(VENV)/.all: pyproject.toml constraints.txt | $(BIN)/python
	@echo "setting up $(VENV), once: pip install -c constraints.txt -e '.[all]' (minutes)"
	@$(PIP) install -qq -c constraints.txt $(FIND_TORCH) -e '.[all]'
	@touch $@ $(VENV)/.demo $(VENV)/.learn

venv: $(BIN)/python  ## python3 -m venv .venv

# The oldest and the newest supported Triton, each in a folder that PYTHONPATH puts before the
# pinned version. Each folder also has an older numpy: numpy 2.4 no longer converts an array with
# one element to a Python number, and the interpreter of Triton 3.3 needs this conversion.
tritons: $(TRITONS:%=$(VENV)/triton-%)  ## pip install --no-deps --target .venv/triton-VERSION triton==VERSION 'numpy<2.4'

$(VENV)/triton-%: | install
	@rm -rf $@.part && $(PIP) install -qq --no-deps --target $@.part triton==$* 'numpy<2.4' && mv $@.part $@

install: $(VENV)/.all  ## pip install -c constraints.txt -e '.[all]'

# ---- demo, benchmarks and documentation

demo: $(VENV)/.demo  ## python examples/demo.py --task icd10 (or address)
	$(BIN)/python examples/demo.py --task $(TASK)

# A notebook that exists stays as it is, with what a reader wrote in it: remove it to start again.
learn: $(VENV)/.learn  ## jupytext --to ipynb notebooks/*.py && jupyter lab notebooks
	@for source in notebooks/*.py; do \
	  test -e $${source%.py}.ipynb || $(BIN)/jupytext --quiet --to ipynb $$source || exit 1; done
	$(BIN)/jupyter-lab $(LAB) notebooks

# Each benchmark prints what it leaves out without a GPU or without the other libraries. scale_8b.py
# writes its 16 GB only if --folder is given. The longest ones are peers.py (a quarter of an hour),
# qlora_parity.py and bench_train.py.
BENCHMARKS = $(filter-out benchmarks/docs/%,$(shell grep -l __main__ benchmarks/*/*.py))

bench: install  ## python benchmarks/GROUP/NAME.py, each in turn: most of an hour on two cores, 3 GB of temporary files
	@for script in $(BENCHMARKS); do echo "== $$script"; begun=$$(date +%s); \
	  $(BIN)/python $$script || failed="$$failed $$script"; echo "== $$(($$(date +%s) - begun)) s"; done; \
	  test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

pictures: install  ## python benchmarks/docs/pictures.py && python benchmarks/docs/explorer.py: draw the pictures in docs/
	$(BIN)/python benchmarks/docs/pictures.py
	$(BIN)/python benchmarks/docs/explorer.py

notebooks: install  ## python docs/site/executed_notebooks.py: execute those that changed, into out/notebooks
	$(BIN)/python docs/site/executed_notebooks.py

docs: notebooks  ## python docs/site/pages.py && zensical build -s -f out/zensical.toml: a site in out/site
	$(BIN)/python docs/site/pages.py
	$(BIN)/zensical build -s -f out/zensical.toml

# ---- checks

lint: install  ## ruff check . && ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## basedpyright
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# ISA=avx2 and ISA=default make an x86 processor run the tests with the instructions of an older
# one. One variable each sets torch's own loops, oneDNN, MKL and the compiled C code. None of them
# changes the choice of dtype="auto" (CONTRIBUTING.md).
UNDER_avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 MINILORA_MARCH=x86-64-v3
UNDER_default := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 MINILORA_MARCH=x86-64
UNDER = $(if $(ISA),$(or $(UNDER_$(ISA)),$(error ISA must be avx2 or default, got $(ISA))))

# ROOM=lora runs tests/lora alone, without lint and types.
test: $(if $(ROOM),,lint)  ## pytest -n 2 -m "not slow and not gpu", and basedpyright at the same time
	@$(MAKE) --no-print-directory -j 2 fast-tests $(if $(ROOM),,types)

fast-tests: install
	$(UNDER) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow and not gpu" --durations=10 $(ROOM:%=tests/%)

test-all: install tritons  ## pytest -n 2 -m "(slow or gpu) and not demo": the real model, the wheel, examples, notebooks
	$(UNDER) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) -m "(slow or gpu) and not demo" --durations=20

# These tests take minutes on every core. CI runs their short forms.
check-demo: install tritons  ## pytest -m demo: the demo in full, planned against measured memory, every kernel in older Tritons
	$(BIN)/python -m pytest -q -m demo --durations=5

format: install  ## ruff check --fix . && ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment, caches and outputs
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find minilora kernels tests -name __pycache__ -type d -prune -exec rm -rf {} +
