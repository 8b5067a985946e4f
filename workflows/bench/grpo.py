"""GRPO on random weights: tokens/s of rollouts and of the learner's step, their gap, the peak.

    python -m workflows.bench.grpo --prompts 8 --group 8 --prompt 256 --completion 1024 --micro 8 \\
      --output docs/performance/grpo.json

Completions end at their length alone. A rollout's limit is what its tokens must read: weights and
the caches' mean length, at the speed of a copy on this device. The learner's tokens are those of
prompts and completions as rows of their own.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerFast

from unsloth_jax import lora, tree
from unsloth_jax.plan import UNBOUNDED
from unsloth_jax.train import start
from workflows import machine, objective, plan, updates
from workflows.bench import configs, decode, rows
from workflows.bench import weights as made
from workflows.grpo_config import GRPOConfig
from workflows.grpo_trainer import GRPOTrainer
from workflows.model import Model

WORDS = 256
# At the shape on an H100: (must, aim). vLLM 0.23.0 made 7,132 tokens/s in it.
ROLLOUT, VLLM, PEAK_GB = (7100.0, 8700.0), 7132.0, 40.0
GAP = 2e-3  # nats a token
REFERENCE = dict(shape="llama-8b", prompts=8, group=8, prompt=256, completion=1024)


def tokenizer() -> PreTrainedTokenizerFast:
    """w0, w1 ... are ids of their own; nothing ends a completion."""
    vocab = {f"w{n}": n for n in range(WORDS)}
    fields = dict.fromkeys("truncation padding normalizer post_processor decoder".split())
    fields |= {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}}
    fields |= {"model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(fields, file)
        file.flush()
        return PreTrainedTokenizerFast(tokenizer_file=file.name)


def model(a: argparse.Namespace) -> Model:
    """A random NF4 model with adapters that change it."""
    family, c, shapes = made.model(a.shape)
    params = made.random(shapes)
    adapters = lora.init(jax.random.key(0), params, a.rank)
    keys = iter(jax.random.split(jax.random.key(1), len(tree.flatten(adapters))))
    drawn = lambda key, x: jax.random.normal(key, x.shape, x.dtype) * 1e-3
    adapters = tree.map_paths(
        lambda path, x: drawn(next(keys), x) if path.endswith(".b") else x, adapters
    )
    ends = {"bos_token_id", "eos_token_id", "pad_token_id"}
    fields = {k: v for k, v in configs.config(a.shape).items() if k not in ends}
    source = SimpleNamespace(config=fields, folder=None)
    length = a.prompt + a.completion
    return Model(
        a.shape, source, family, c, params, Path(), tokenizer(), length, jnp.bfloat16, "nf4",
        adapters, memory="auto", memory_budget=a.memory,
    )  # fmt: skip


def spread(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A reward that differs within every group."""
    return [sum(ids) % 1000 / 1000 for ids in completion_ids]


def trainer(a: argparse.Namespace) -> GRPOTrainer:
    draw = np.random.default_rng(0).integers(0, WORDS, (a.prompts, a.prompt))
    data = [{"prompt": " ".join(f"w{n}" for n in row)} for row in draw]
    args = GRPOConfig(
        prompts_per_step=a.prompts, num_generations=a.group, max_completion_length=a.completion,
        per_device_train_batch_size=a.micro, temperature=a.temperature, beta=a.beta,
        optim="adamw_8bit", rollout_slots=a.slots, max_steps=8, alarms=False,
    )  # fmt: skip
    return GRPOTrainer(model(a), [spread], args, data)


class Peaks:
    """The process' peak by phase; None where it did not rise above what was before."""

    def __init__(self) -> None:
        self.before = machine.device_peak()

    def __call__(self) -> float | None:
        now, before = machine.device_peak(), self.before
        self.before = now
        return now / 2**30 if now > before else None


class Found(NamedTuple):
    """What one run took."""

    rollouts: list[float]  # tokens/s, the first with its compilation
    scoring_s: float  # of reference and policy, the last
    steps: list[float]  # seconds
    gap: float  # nats a token between sampler and learner
    planned_gib: float | None  # of the learner, where there was a plan
    peaks: dict[str, float | None]


def measured(t: GRPOTrainer, a: argparse.Namespace) -> Found:
    """Rollouts, then the learner's steps on the last one."""
    peaks, batches, m = Peaks(), t._batches(), t.model
    batches.policy = lambda: m.adapters
    told: dict[str, float | None] = {"held": peaks()}
    stream, wholes, rates = batches.forever(), [], []
    for _ in range(a.rollouts):
        began = time.perf_counter()
        _, batch = next(stream)
        wholes.append(time.perf_counter() - began)
        metrics = batches.told[-1][1]
        rates.append(metrics["rollout_tokens_per_s"])
        print(json.dumps({"rollout": rates[-1], "whole_s": wholes[-1]}), flush=True)
        told["rollout"] = peaks() or told.get("rollout")
    scoring = wholes[-1] - metrics["rollout_seconds"] - metrics["reward_seconds"]
    optimizer, _ = updates.optimizer(t.args, 8, m.adapters, (None, None))
    plans: list = []
    steps, gap = [], float("nan")
    with plan.prepared(m, optimizer, batches, 8, a.memory, t.objective, plans.append) as step:
        state = start(m.adapters, optimizer)
        ready = lambda: jax.device_put(objective.embedded(m.params, t.objective.ready(1, batch)))
        for n in range(1 + a.steps if a.steps else 0):
            sent = jax.block_until_ready(ready())
            began = time.perf_counter()
            state, report = jax.block_until_ready(step(state, m.params, sent))
            steps.append(time.perf_counter() - began)
            if n == 0:
                total = report.metrics["sampling/sampling_logp_difference/mean"]
                gap = float(total.value / total.count)
            print(json.dumps({"step_s": steps[-1], "loss": float(report.loss)}), flush=True)
        told["learner"] = peaks()
    planned = plans[-1].total / 2**30 if plans else None
    return Found(rates, scoring, steps, gap, planned, told)


def read_limit(t: GRPOTrainer, a: argparse.Namespace, speed: float) -> float:
    """Tokens/s of rollouts where only reading takes time."""
    m, rows_ = t.model, min(a.slots or UNBOUNDED, a.prompts * a.group)
    whole = decode.Model(m.family, m.config, m.params)
    mean = a.prompt + a.completion // 2
    return rows_ * speed / decode.bytes_read(whole, "materialized", rows_, mean)


def figures(t: GRPOTrainer, a: argparse.Namespace, found: Found) -> list[rows.Row]:
    shape = {name: getattr(a, name) for name in REFERENCE}
    asked = shape == REFERENCE
    name = f"{a.prompts}x{a.group} completions of {a.completion} after {a.prompt}, {a.shape}"
    more = dict(peaks_gib=found.peaks, planned_gib=found.planned_gib, micro=a.micro, rank=a.rank)
    must, aim = ROLLOUT if asked else (None, None)
    limit = read_limit(t, a, decode.bandwidth(2**30 if jax.default_backend() == "gpu" else 2**22))
    rate = statistics.median(found.rollouts[1:] or found.rollouts)
    out = [
        rows.figure(
            f"GRPO rollout: {name}", rate, "tokens/s", other=VLLM if asked else None, limit=limit,
            must=must, aim=aim, absolute=True, first=found.rollouts[0], **more,
        ),
        rows.figure(
            f"GRPO peak: {name}", machine.device_peak() / 1e9, "GB",
            must=PEAK_GB if asked else None, better="lower", absolute=True, **more,
        ),
    ]  # fmt: skip
    if found.steps:
        tokens = a.prompts * a.group * (a.prompt + a.completion)
        once = statistics.median(found.steps[1:])
        out += [
            rows.figure(
                f"GRPO learner: {name}", tokens / once, "tokens/s", absolute=True,
                step_s=once, first_s=found.steps[0], scoring_s=found.scoring_s, **more,
            ),
            rows.figure(
                f"GRPO sampler-learner gap: {name}, temperature {a.temperature}", found.gap,
                "nats", must=GAP, better="lower", absolute=True, **more,
            ),
        ]  # fmt: skip
    return out


COLUMNS = "name ours other limit must aim unit".split()


def main(line: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--shape", default="llama-8b", help="a name in configs or a config.json")
    p.add_argument("--prompts", type=int, default=8)
    p.add_argument("--group", type=int, default=8)
    p.add_argument("--prompt", type=int, default=256, help="tokens")
    p.add_argument("--completion", type=int, default=1024, help="tokens")
    p.add_argument("--micro", type=int, default=8, help="completions in the learner at once")
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--beta", type=float, default=0.001)
    p.add_argument("--temperature", type=float, default=1.0)
    p.add_argument("--slots", type=int)
    p.add_argument("--rollouts", type=int, default=3)
    p.add_argument("--steps", type=int, default=3, help="of the learner; 0 leaves it out")
    p.add_argument("--memory", help="memory_budget, such as 40GB")
    p.add_argument("--output", type=Path)
    a = p.parse_args(line)
    t = trainer(a)
    found = figures(t, a, measured(t, a))
    print(rows.table(found, COLUMNS))
    if a.output:
        rows.write(a.output, found)


if __name__ == "__main__":
    main()
