# Two commands do everything: `make demo` and `make test`. Both start from Python 3.11 and a network
# for packages; the environment is made once, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test check format bench docs clean

demo: $(VENV)/.ready
	$(BIN)/tascade demo --out demo-output

test: check
	$(BIN)/python -m pytest

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The table of the README, from ../shared; writes benchmarks/results/*.json
bench: $(VENV)/.ready-dev
	$(BIN)/python benchmarks/main_path.py

docs: $(VENV)/.ready-docs
	$(BIN)/mkdocs build --strict

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.ready: $(VENV)/.made pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.made pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e ".[dev]"
	touch $@ $(VENV)/.ready

$(VENV)/.ready-docs: $(VENV)/.ready-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis site demo-output
