# `make setup` makes .venv once and refreshes it when pyproject.toml or constraints.txt change; all other targets
# that need it do so themselves. Another interpreter: make setup PYTHON=python3.12
PYTHON ?= python3
EXTRAS := lab,train,scale,kernels,dev
PYTEST_WORKERS ?= 2
BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup dashboard notebook notebooks demo-model test test-lint test-types test-unit test-kernels test-notebooks test-dashboard test-browser \
	lint format constraints gpu-check clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z -]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## make .venv with everything the lab needs

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make setup: there is no $(PYTHON)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make setup: hydra_lab needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1);" \
			"try: make setup PYTHON=python3.12" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

dashboard: $(STAMP) ## open the dashboard on 127.0.0.1
	$(BIN)/hydra-lab dashboard $(ARGS)

notebook: $(STAMP) ## open the guided tour in JupyterLab
	$(BIN)/hydra-lab notebook $(ARGS)

# Each test process uses one thread: two processes with two threads each would fight over two cores.
test-unit test-kernels test-notebooks test-dashboard test-browser: export OMP_NUM_THREADS = 1

test: test-lint test-types test-unit test-kernels test-notebooks test-dashboard test-browser ## everything CI runs

test-lint lint: $(STAMP) ## style and import direction
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

test-types: $(STAMP) ## static types
	$(BIN)/pyright

test-unit: $(STAMP) ## unit and property tests
	$(BIN)/pytest -n $(PYTEST_WORKERS) --ignore=tests/kernels \
		-m "not notebook and not dashboard and not browser" $(ARGS)

test-kernels: $(STAMP) ## the Triton kernels in the interpreter, and compiled for an H100
	$(BIN)/pytest -n $(PYTEST_WORKERS) tests/kernels $(ARGS)

test-notebooks: $(STAMP) ## every lesson from top to bottom, solved and as a student gets it
	HYDRA_LAB_QUICK=1 $(BIN)/pytest -n $(PYTEST_WORKERS) --dist worksteal -m notebook --durations=20 $(ARGS)

test-dashboard: $(STAMP) ## the dashboard in process
	$(BIN)/pytest -m dashboard $(ARGS)

test-browser: $(STAMP) ## the dashboard in Chromium (skipped, with the reason, where there is none)
	$(BIN)/pytest -m browser $(ARGS)

# glibc gives large buffers back to the system after every step unless told to keep them: a quarter of the time.
TRAIN = MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 $(BIN)/python -m hydra_lab.training \
	--corpus build/corpus
MODEL := build/demo-2/model

demo-model: $(STAMP) ## train the model that ships anew (two hours on two cores), into build/demo-2/model
	$(BIN)/python -m hydra_lab.data.build build/corpus --seed 0
	$(TRAIN) --preset demo --seed 0 --out build/demo-1
	$(TRAIN) --preset demo-lookups --seed 1 --init-from build/demo-1/model --out build/demo-2
	$(BIN)/python -m hydra_lab.data.sample_texts build/corpus $(MODEL)
	$(BIN)/python -m hydra_lab.training.evaluate $(MODEL) --corpus build/corpus --out $(MODEL)/evaluation.json
	$(BIN)/python -m hydra_lab.data.ngram build/corpus --json > $(MODEL)/ngram.json
	$(BIN)/hydra-lab info $(MODEL) --corpus build/corpus --record
	$(BIN)/python tests/demo_questions.py build/corpus

notebooks: $(STAMP) ## write the lessons' notebooks, with and without solutions, from their py:percent sources
	$(BIN)/python -m hydra_lab.course.build

format: $(STAMP) ## rewrite the sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(STAMP) ## pin what is installed now in constraints.txt
	$(BIN)/python .ci/constraints.py

gpu-check: ## kernels, model and speed on a GPU, using $(PYTHON) as it is (no .venv is made)
	PYTHONPATH=.:$$PYTHONPATH $(PYTHON) tests/gpu/check.py $(ARGS)

clean: ## remove .venv and caches
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache .hypothesis
