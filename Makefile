PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: bench demo demo-generate demo-real check fuzz test test-full test-exhaustive record wheel
$(VENV)/base: pyproject.toml constraints.txt kernels/native.c
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

# The pinned torch first and by itself: left to the resolver it would be a CUDA build of several GB.
$(VENV)/tests: $(VENV)/base
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,runtime]'
	touch $@

# megatron-core 0.15.3, the last one that saves and loads zarr, wants other versions of numpy and zarr than the rest.
.venv-mcore015/done: constraints-mcore015.txt
	$(PYTHON) -m venv .venv-mcore015
	.venv-mcore015/bin/pip install -q torch==2.13.0
	.venv-mcore015/bin/pip install -q -r constraints-mcore015.txt
	.venv-mcore015/bin/pip install -q --no-deps megatron-core==0.15.3
	touch $@

# A small trained model: import at TP 2 x PP 2, inspect, verify, export, compare by SHA-256.
demo: $(VENV)/base
	bash examples/demo.sh

# Text from the same model on megatron-core: one process, TP 2, PP 2, and transformers beside them.
demo-generate: $(VENV)/tests
	$(BIN)/python examples/generate_demo.py

# The same with SmolLM2-135M-Instruct; installs torch and transformers to unpack it.
demo-real: $(VENV)/tests
	$(BIN)/pip install -q -c constraints.txt gguf accelerate
	PYTHON=$(BIN)/python bash examples/demo_real.sh

check: $(VENV)/tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: $(VENV)/tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --proved=check

# The record behind `transcode architectures`, made anew from what the tests prove.
record: $(VENV)/tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" --proved=write

# The full matrices against megatron-core, and conversions that are killed fifty times.
test-full: $(VENV)/tests .venv-mcore015/done
	$(BIN)/python -m pytest -m "slow and not exhaustive"

# Every I/O call of every conversion fails once; thousands of mutated inputs; 50,000 tensors. Half an hour.
test-exhaustive: $(VENV)/tests
	$(BIN)/python -m pytest -m exhaustive

# Every reader under a coverage-guided fuzzer, FUZZ_SECONDS each; what it learns and finds stays in build/fuzz.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/base
	$(BIN)/pip install -q -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m fuzz --seconds $(FUZZ_SECONDS)

# The table of targets as ratios, with limits, drawn and stored in build/bench: an hour, 25 GB of disk. Some groups:
# make bench BENCH="--only dense,kernels --rounds 5"; whether it runs, in two minutes: make bench BENCH=--quick
BENCH ?=
bench: $(VENV)/base
	$(BIN)/pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/suite.py $(BENCH)

# A wheel holds what the source tree holds, kernels/, the schema and, where there is a compiler, its loops included.
wheel: $(VENV)/base
	rm -rf $(VENV)/wheel && $(BIN)/pip wheel -q --no-deps -w $(VENV)/wheel .
	$(PYTHON) -m venv $(VENV)/fresh
	$(VENV)/fresh/bin/pip install -q -c constraints.txt $(VENV)/wheel/*.whl
	cd $(VENV) && fresh/bin/python -c "from transcoder.kernels.native import LIBRARY; assert LIBRARY, 'not compiled'"
	cd $(VENV) && fresh/bin/transcode roundtrip ../examples/tiny-llama --tp 2 --pp 2 --quiet
