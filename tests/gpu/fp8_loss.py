"""QLoRA on real weights with products in bf16 and in fp8: do they end at the same loss?

    python tests/gpu/fp8_loss.py SMOLLM2_FOLDER --output fp8_loss.json

All start from the same adapters and see the same rows, none of them twice: whole conversations of
the demo's task, whose choices can't be foreseen, so that the loss ends well above zero. Prints one
line of JSON a run and one with the ratios of the last ten steps' means. On a CPU XLA emulates e4m3;
a few steps in float32 show there that the script works.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import numpy as np

from unsloth_jax import optim, plan, quant, train
from workflows import demo_data, objective
from workflows.batching import Batches
from workflows.bench import rows
from workflows.face import FastLanguageModel
from workflows.sft_config import SFTConfig
from workflows.sft_trainer import SFTTrainer

LIMIT, LAST = 0.01, 10


def losses(a: argparse.Namespace, model, batches: Batches, matmul_dtype: str) -> list[float]:
    """The loss of every step."""
    params = quant.matmul_in(model.params, matmul_dtype, jax.default_backend() == "cpu")
    rate = optim.schedule("linear", a.learning_rate, min(5, a.steps), a.steps)
    optimizer = optim.make(a.optimizer, rate, max_grad_norm=1.0)
    memory, documents = plan.named(a.policy), batches.documents(a.steps)
    loss = objective.loss(model.family, model.config, model.scale, memory, documents)
    step, state = train.make_step(loss, optimizer), train.start(model.adapters, optimizer)
    seen, start = [], time.perf_counter()
    for _, batch in itertools.islice(batches.forever(), a.steps):
        state, report = step(state, params, jax.device_put(batch))
        seen.append(float(report.loss))
        if a.steps - len(seen) and len(seen) % 20 == 0:
            print(matmul_dtype, len(seen), np.mean(seen[-LAST:]), file=sys.stderr, flush=True)
    found = {"matmul_dtype": matmul_dtype, "first": seen[0], "last": float(np.mean(seen[-LAST:]))}
    found |= {"seconds": round(time.perf_counter() - start, 1), "losses": seen}
    print(json.dumps(found | {"losses": [round(x, 4) for x in seen[:: max(1, a.steps // 20)]]}))
    return seen


def main(line: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("folder", help="a checkpoint such as SmolLM2-135M-Instruct")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--length", type=int, default=256)
    p.add_argument("--learning-rate", type=float, default=2e-4)
    p.add_argument("--optimizer", default="adamw_8bit")
    p.add_argument("--policy", default="none", help="plan's name of what the backward finds")
    p.add_argument("--dtype", help="of what passes through the layers; float32 on a CPU")
    p.add_argument("--kinds", default="fp8,fp8_backward", help="compared with bf16")
    p.add_argument("--seed", type=int, default=3407)
    p.add_argument("--output", type=Path)
    a = p.parse_args(line)
    model, _ = FastLanguageModel.from_pretrained(a.folder, a.length, a.dtype)
    model = FastLanguageModel.get_peft_model(model, random_state=a.seed)
    # Conversations have at least 30 tokens, so that none is seen twice.
    count = min(8000, a.steps * a.batch * (a.length // 30 + 1))
    data = demo_data.conversations(demo_data.split(a.seed, count, 1).train)
    size = SFTConfig(packing=True, per_device_train_batch_size=a.batch)
    made = SFTTrainer(model, train_dataset=data, args=size).rows
    batches = Batches(made, a.batch, 1, a.length, True, a.seed)
    found = {kind: losses(a, model, batches, kind) for kind in ("bf16", *a.kinds.split(","))}
    last = {kind: float(np.mean(seen[-LAST:])) for kind, seen in found.items()}
    result = {"steps": a.steps, "epochs": a.steps / batches.steps(0), "last": last}
    result["ratio"] = {kind: x / last["bf16"] for kind, x in last.items() if kind != "bf16"}
    result["within"] = {kind: abs(x - 1) <= LIMIT for kind, x in result["ratio"].items()}
    print(json.dumps(result))
    if a.output:
        facts = {**result, "dtype": str(model.dtype), "losses": found, **rows.facts()}
        a.output.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
