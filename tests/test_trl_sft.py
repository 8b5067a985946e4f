"""30 steps of SmolLM2 against TRL's SFTTrainer with PEFT, recorded by tests/oracles/trl_sft.py."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from bridge import hub, peft_adapter
from tests import recorded_sft as recorded
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer, tree
from unsloth_jax.data import Row

pytestmark = pytest.mark.slow

TRL = json.loads(recorded.FILE.read_text())
EXACT = 1e-3
EXAMPLES = [{"messages": messages} for messages in TRL["rows"]]


@pytest.fixture(scope="module")
def base():
    return FastLanguageModel.from_pretrained(
        str(hub.embedded_smollm2()), max_seq_length=256, dtype="float32", load_in_4bit=False
    )[0]


def trainer(base, packing: bool, answers: bool, alpha: float = recorded.ALPHA) -> SFTTrainer:
    """Our trainer with the adapters that TRL's began with."""
    base.adapters = None
    model = FastLanguageModel.get_peft_model(base, r=recorded.RANK, lora_alpha=alpha)

    def start(path, leaf):
        module, side = path.split(".")[-2:]
        draw = lambda i, x: recorded.start(i, module, x.shape) if side == "a" else np.zeros(x.shape)
        return jnp.asarray(np.stack([draw(i, x) for i, x in enumerate(leaf)]), jnp.float32)

    model.adapters = tree.map_paths(start, model.adapters)
    settings = SFTConfig(
        per_device_train_batch_size=recorded.BATCH, gradient_accumulation_steps=1,
        max_steps=recorded.STEPS, learning_rate=recorded.RATE, warmup_steps=0, weight_decay=0.0,
        max_grad_norm=recorded.CLIP, optim="adamw_torch", packing=packing,
        max_length=recorded.PACKED if packing else recorded.WIDTH, assistant_only_loss=answers,
        train_sampling_strategy="sequential",
    )  # fmt: skip
    return SFTTrainer(model=model, train_dataset=EXAMPLES, args=settings)


def furthest(run: SFTTrainer, way: str, what: str) -> float:
    """The largest difference to TRL's losses or gradient norms, a share of TRL's."""
    ours = np.array([row[what] for row in run.log_history])
    theirs = np.array([step[what] for step in TRL["ways"][way]["steps"]])[: len(ours)]
    return np.abs(ours - theirs).max() / theirs.max()


def adapters_off(adapters, way: str) -> float:
    """How far the final adapters are from TRL's, as a share of how far TRL's have come."""
    ours, apart, moved = peft_adapter.tensors(adapters), 0.0, 0.0
    for layer, module, side, norm, *products in TRL["ways"][way]["adapters"]:
        (name,) = (n for n in ours if f".{layer}." in n and f".{module}.lora_{side.upper()}" in n)
        drawn = recorded.start(layer, module, ours[name].shape) if side == "a" else 0 * ours[name]
        found = np.array(recorded.kept(layer, module, side, ours[name])[1:])
        began = np.array(recorded.kept(layer, module, side, drawn)[1:])
        np.testing.assert_allclose(np.linalg.norm(ours[name]), norm, rtol=EXACT)
        apart += np.square(found - products).sum()
        moved += np.square(began - products).sum()
    return np.sqrt(apart / moved)


@pytest.mark.parametrize("way", recorded.WAYS)
def test_thirty_steps_equal_trls_with_peft(base, way, figure):
    run = trainer(base, *recorded.WAYS[way])
    first = run._batches().epoch(0).__next__()
    assert int(first.weights.sum()) == TRL["ways"][way]["first"][1]
    run.train()
    losses = [row["loss"] for row in run.log_history]
    assert len(losses) == 30 and losses[-1] < 0.7 * losses[0]
    named = f"of 30 steps of SmolLM2 against TRL with PEFT, {way}"
    figure(f"losses {named}", furthest(run, way, "loss"), EXACT)
    figure(f"gradient norms {named}", furthest(run, way, "grad_norm"), EXACT)
    figure(f"final adapters {named}", adapters_off(base.adapters, way), 2e-3)


def test_adapters_with_another_scale_do_not_equal_trls(base):
    run = trainer(base, False, True, alpha=1.1 * recorded.ALPHA)
    run.args.max_steps = 5
    run.args.schedule = lambda warmup, total: SFTConfig.schedule(run.args, warmup, recorded.STEPS)
    run.train()
    assert furthest(run, "answers", "loss") > 3 * EXACT
    assert furthest(run, "answers", "grad_norm") > 20 * EXACT


def test_a_mask_shifted_by_one_token_does_not_equal_trls(base):
    run = trainer(base, False, True)
    run.rows = [Row(row.tokens, [0, *row.mask[:-1]]) for row in run.rows]
    run.args.max_steps = 1
    run.train()
    assert furthest(run, "answers", "loss") > 20 * EXACT
