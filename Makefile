# Two commands matter: `make demo` and `make test`. Both make the environment first if it is not there.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A process a core, and each file of tests in one process: what a file makes once is made once.
PARALLEL := -n auto --dist loadfile

.PHONY: demo test test-slurm check format bench bench-gpu demo-source clean

demo: $(STAMP)
	$(BIN)/explora demo

test: $(STAMP)
	$(BIN)/python -m pytest $(PARALLEL)

# Brings up a SLURM of emulated hosts for it: needs root, and Debian's packages, which it installs. Minutes.
test-slurm: $(STAMP)
	$(BIN)/python -m pytest -rs tests/slurm

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PARALLEL)

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Ours beside others, on one thread: about an hour. Each file of benchmarks/ says what it measures, and runs alone.
bench: $(STAMP)
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/step.py --memory
	$(BIN)/python benchmarks/profiling.py
	$(BIN)/python benchmarks/mae.py
	$(BIN)/python benchmarks/head.py
	$(BIN)/python benchmarks/optimizer.py
	$(BIN)/python benchmarks/accumulation.py
	$(BIN)/python benchmarks/pieces.py
	$(BIN)/python benchmarks/data.py
	$(BIN)/python benchmarks/probe.py
	$(BIN)/python benchmarks/probe_schedule.py

# The training step on one GPU. Where there is none: .venv/bin/python benchmarks/gpu.py --device cpu --tiny
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

# Remakes explora/demo/source.safetensors, the small model the demo starts from.
demo-source: $(STAMP)
	$(BIN)/python -c "from pathlib import Path; from explora.data.synthetic import write; \
	  write(Path('runs/demo_source/images'), 'photos', 'train', 400, seed=1)"
	$(BIN)/explora pack runs/demo_source/images runs/demo_source/shards
	$(BIN)/explora finetune configs/demo_source.yaml
	cp runs/demo_source/model/backbone.safetensors explora/demo/source.safetensors

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	touch $@

clean:
	rm -rf $(VENV) runs
