PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test
$(VENV)/base: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/tests: $(VENV)/base
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,runtime]'
	touch $@

demo: $(VENV)/base
	bash examples/demo.sh

test: $(VENV)/tests
	$(BIN)/python -m pytest tests/formats tests/test_roundtrip.py tests/test_megatron_loads.py transcoder/layout.py transcoder/moves.py transcoder/engine.py transcoder/mesh.py
