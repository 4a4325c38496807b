# Needs Python 3.11 or 3.12, git and make; everything else is installed into $(VENV).
#   make demo     the main job on three models        make test     the tests
#   make lint     ruff: lint, format, import rules    make types    mypy --strict on the package
#   make bench    benchmarks/results/*.json and the README's table
#   make bench-fusion     what each tool fuses, and what the pass costs (FUSION_ARGS="models.json --only resnet")
#   make bench-gpu    kernels and models on a GPU, benchmarks/results/gpu-*; one line where there is none (GPU_ARGS="--only norm")
#   make sass     machine code of the GPU kernels into benchmarks/results/sass.{json,md}; no GPU needed
#   make sweep    detection over the families of torchvision, timm and transformers (hours; SWEEP_ARGS="--only resnet")

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST_ARGS ?= -n 2 --dist=worksteal
SWEEP_ARGS ?=
FUSION_ARGS ?=
GPU_ARGS ?=
READY = $(VENV)/.ready

.PHONY: env demo test lint types bench bench-fusion bench-gpu sweep sass clean
.DEFAULT_GOAL := env

env: $(READY)

# torchvision, timm and transformers come without their requirements, which could replace a CPU torch by one with CUDA;
# what they need otherwise is the extra "models".
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "rescompile needs Python 3.11 or 3.12; name one with make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt -e '.[all,models,dev]'
	$(PIP) install --quiet --no-deps -c constraints.txt torchvision timm transformers
	@touch $@

demo: $(READY)
	$(VENV)/bin/python -m examples.demo

# Two processes of one thread each: two of two threads would wait for each other on two cores.
test: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(READY)
	$(VENV)/bin/mypy

bench: $(READY)
	$(VENV)/bin/python -m benchmarks.run

bench-fusion: $(READY)
	$(VENV)/bin/python -m benchmarks.fusion $(FUSION_ARGS)
	$(VENV)/bin/python -m benchmarks.fusion $(FUSION_ARGS) --verify
	$(VENV)/bin/python -m benchmarks.fuse_scale

bench-gpu: $(READY)
	$(VENV)/bin/python -m benchmarks.gpu $(GPU_ARGS)

sweep: $(READY)
	$(VENV)/bin/python -m benchmarks.sweep $(SWEEP_ARGS)

sass: $(READY)
	$(VENV)/bin/python -m benchmarks.sass

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
