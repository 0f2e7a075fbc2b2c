# Every target sets up what it needs, from nothing. `make` alone lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.eosin-installed
THREADS := OMP_NUM_THREADS=1

.PHONY: help setup demo test test-all gpu scale check format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## a virtual environment with eosin in it (CPU build of torch where there is no NVIDIA driver)

$(STAMP): pyproject.toml constraints-cpu.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "eosin needs Python 3.11 or newer")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	links=$$($(BIN)/python -m pip config get global.find-links 2>/dev/null || $(BIN)/python -m pip config get :env:.find-links 2>/dev/null || true); \
	cpu=$$(command -v nvidia-smi >/dev/null || echo "-c constraints-cpu.txt"); \
	$(BIN)/uv pip install --python $(BIN)/python $${links:+--find-links "$$links"} $$cpu -e '.[dev]'
	touch $@

demo: setup  ## slides, tiles, shards, training, probes, report: runs/demo/report.html
	$(BIN)/eosin demo

test: setup  ## the tests (no network, no GPU)
	$(THREADS) $(BIN)/pytest -q -n 2 -m "not slow and not gpu"

test-all: test  ## the tests and the long campaigns; GPU tests where there is one
	$(THREADS) $(BIN)/pytest -q -n 2 -m "slow or gpu" --ignore=tests/slurm
	$(THREADS) $(BIN)/pytest -q -m slow tests/slurm

gpu: setup  ## on a GPU: its tests, then the benches of data path, slides, layouts, and S, B and L/14 with and without shards, into runs/bench_*.json
	$(BIN)/pytest -q -m gpu
	mkdir -p runs
	$(BIN)/eosin bench data --json runs/bench_data.json
	$(BIN)/eosin bench step --config bench/step_gpu batch_size=128 shards=made-up --json runs/bench_small.json
	$(BIN)/eosin bench step --config bench/step_gpu --config size/base batch_size=128 model.drop_path=0.2 shards=made-up --json runs/bench_base.json
	$(BIN)/eosin bench step --config bench/step_gpu --config size/large model.drop_path=0.3 shards=made-up --json runs/bench_large.json
	$(BIN)/eosin bench slides batch_size=64 steps_per_repeat=5 --json runs/bench_slides.json
	$(BIN)/eosin bench layouts --config bench/step_gpu --config size/large model.drop_path=0.3 --json runs/bench_layouts.json

scale: setup  ## 100 million made-up records and tiles: time and memory to open an index and order it, and to draw a sample
	$(THREADS) $(BIN)/python tests/scale/index_100m.py
	$(THREADS) $(BIN)/python tests/scale/sample_100m.py

check: setup  ## format, lint, types
	mkdir -p .cache && ln -sfn .. .cache/eosin
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup  ## rewrite the files as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what setup and the runs made
	rm -rf $(VENV) .cache build *.egg-info runs
