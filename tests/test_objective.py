"""The losses that SFTConfig asks for, against transformers, TRL and torch; what draws noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat
import torch
from transformers.trainer_pt_utils import LabelSmoother

from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer, layers, leaves, lora, losses, tree
from unsloth_jax.dims import Batch
from workflows import objective
from workflows.user_metrics import labelled

SAME = dict(
    per_device_train_batch_size=4, gradient_accumulation_steps=1, learning_rate=2e-2,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64, max_steps=2,
)  # fmt: skip
ROWS = tiny_chat.MESSAGES[:4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def base(folder):
    return tiny_chat.load(folder)[0]


def fresh(base, **adapters):
    base.adapters = None
    return FastLanguageModel.get_peft_model(base, r=4, **adapters)


def trainer(model, **changes) -> SFTTrainer:
    return SFTTrainer(model=model, train_dataset=ROWS, args=SFTConfig(**(SAME | changes)))


def only(run):
    """The one batch of all rows, as a step gets it."""
    return next(run._batches().epoch(0))


def first(batch):
    return jax.tree.map(lambda x: jnp.asarray(x[0]), batch)


def value(run, batch) -> float:
    """The run's loss of the first micro-batch."""
    m = run.model
    fn = run.objective.loss(m.family, m.config, m.scale)
    return float(fn(m.adapters, m.params, first(batch)).mean())


def scores(folder, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' logits of the batch, and its labels."""
    tokens, mask = (torch.tensor(np.asarray(x[0])) for x in (batch.tokens, batch.segments > 0))
    with torch.no_grad():
        logits = tiny_chat.reference(folder)(tokens, attention_mask=mask.long()).logits
    return logits, torch.tensor(labelled(batch), dtype=torch.long)


@pytest.mark.parametrize("smoothing", [0.1, 0.4])
def test_label_smoothing_is_that_of_transformers(base, folder, smoothing, figure):
    run = trainer(fresh(base), label_smoothing_factor=smoothing)
    logits, labels = scores(folder, only(run))
    theirs = LabelSmoother(epsilon=smoothing)({"logits": logits}, labels, shift_labels=True).item()
    ours, plain = value(run, only(run)), value(trainer(base), only(run))
    figure(f"label smoothing {smoothing}: relative difference", abs(ours / theirs - 1), 1e-5)
    assert abs(plain / theirs - 1) > 1e-3


def test_dft_weighs_each_token_by_its_probability(base, folder, figure):
    run = trainer(fresh(base), loss_type="dft")
    logits, labels = scores(folder, only(run))
    on = labels[:, 1:] != -100
    logps = logits[:, :-1].log_softmax(-1)[on].gather(-1, labels[:, 1:][on][:, None])
    theirs = -(logps.exp() * logps).mean().item()
    ours = value(run, only(run))
    figure("DFT: relative difference", abs(ours / theirs - 1), 1e-5)
    assert abs(value(trainer(base), only(run)) / theirs - 1) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.3}, {"loss_type": "nll"}], ids=str
)
def test_evaluations_are_those_of_trls_trainer(base, folder, tmp_path, how, figure):
    import datasets
    import trl

    rows = [dict(row) for row in trainer(fresh(base)).train_dataset]
    data = datasets.Dataset.from_list([{k: r[k] for k in ("input_ids", "labels")} for r in rows])
    args = trl.SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=64,
        per_device_eval_batch_size=4, gradient_checkpointing=False, **how,
    )  # fmt: skip
    theirs = trl.SFTTrainer(
        model=tiny_chat.reference(folder), args=args, train_dataset=data, eval_dataset=data,
        processing_class=base.tokenizer,
    ).evaluate()["eval_loss"]  # fmt: skip
    found = trainer(base, **how).evaluate(ROWS)
    ours = found["eval_loss"]
    assert ("eval_perplexity" in found) == (how == {"loss_type": "nll"})
    figure(f"{how}: evaluation beside TRL's, relative", abs(ours / theirs - 1), 1e-5)


def test_dft_with_smoothing_and_unknown_losses_are_refused():
    with pytest.raises(ValueError, match="'dft' weighs tokens.*label_smoothing_factor=0.1.*choose"):
        SFTConfig(loss_type="dft", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="loss_type 'ntl' is not supported; .*nll.*dft"):
        SFTConfig(loss_type="ntl")


def test_a_checkpoints_name_tells_the_loss_and_its_options(base):
    names = {
        trainer(fresh(base, **adapters), **config).objective.name
        for adapters, config in (
            ({}, {}),
            ({}, {"loss_type": "dft"}),
            ({}, {"label_smoothing_factor": 0.1}),
            ({}, {"label_smoothing_factor": 0.2}),
            ({}, {"neftune_noise_alpha": 5}),
            ({"lora_dropout": 0.1}, {}),
            ({"lora_dropout": 0.1}, {"neftune_noise_alpha": 5}),
        )
    }
    assert len(names) == 7 and {"sft/1", "sft/1, smoothing 0.1"} < names


def noised(config, alpha: float, segments: np.ndarray, seed: int) -> np.ndarray:
    """What a table of ones becomes under one key, [B, T, 4096]."""
    zeros = np.zeros_like(segments)
    b = Batch(*[zeros] * 4, segments, None, objective.keys(seed, 1, 1)[0])
    params = tree.unflatten({"model.embed_tokens.weight": jnp.ones((2, 4096))})
    return objective._noised(params, jax.tree.map(jnp.asarray, b), alpha)


def test_neftune_adds_uniform_noise_by_the_documents_length(base):
    alpha, lengths = 5.0, np.asarray([[5] * 5 + [4] * 4, [3] * 3 + [6] * 6])
    segments = np.asarray([[1] * 5 + [0] * 4, [1] * 3 + [2] * 6], np.int32)
    noise = np.asarray([noised(base.config, alpha, segments, seed) for seed in range(3)]) - 1
    for lead in noise:
        for row, size, on in zip(lead, lengths, segments, strict=True):
            bound = alpha / np.sqrt(size[on > 0] * 4096.0)
            here = row[on > 0] / bound[:, None]
            assert np.abs(here).max() <= 1 and np.abs(here).max() > 0.999
            assert abs(here.mean()) < 5 / np.sqrt(3 * here.size)
            assert here.var() == pytest.approx(1 / 3, rel=0.02)
    apart = np.corrcoef(noise.reshape(3, -1))
    assert np.abs(apart - np.eye(3)).max() < 0.02


def test_noise_is_drawn_by_seed_step_and_micro_batch_and_never_in_evaluation(base):
    run = trainer(fresh(base, lora_dropout=0.25), neftune_noise_alpha=5)
    base.adapters = jax.tree.map(lambda x: x + 0.05, base.adapters)
    batch = only(run)
    ready = [run.objective.ready(step, batch) for step in (1, 2, 1)]
    first, second, again = (value(run, b) for b in ready)
    assert first == again and abs(first - second) > 1e-4 * first
    other = trainer(base, neftune_noise_alpha=5, seed=1).objective.ready(1, batch)
    assert abs(value(run, other) - first) > 1e-4 * first
    micro = objective.keys(3407, 1, 3)
    assert micro.dtype == np.uint32 and len(np.unique(micro, axis=0)) == 3
    quiet = trainer(fresh(base))
    base.adapters = jax.tree.map(lambda x: x + 0.05, base.adapters)
    assert batch.key is None and value(run, batch) == value(quiet, batch)
    held = run.evaluate(ROWS)["eval_loss"]
    assert held == quiet.evaluate(ROWS)["eval_loss"] == run.evaluate(ROWS)["eval_loss"]


def test_neither_noise_has_a_part_in_the_others_draw(base):
    model = fresh(base, lora_dropout=0.25)
    model.adapters = jax.tree.map(lambda x: x + 0.05, model.adapters)
    b = first(only(trainer(model)))._replace(key=objective.keys(0, 1, 1)[0])
    keys = [objective._key(b, use) for use in (objective.ADAPTERS, objective.EMBEDDINGS)]
    assert not np.array_equal(*(np.asarray(jax.random.key_data(k)) for k in keys))
    dropped = lora.attach(model.params, model.adapters, model.scale, 0.25, keys[0])
    ours = objective.attached(model.params, model.adapters, model.scale, b, 0.25)
    same = jax.tree.map(lambda x, y: bool((x == y).all()), dropped, ours)
    assert all(jax.tree.leaves(same))


def test_the_mean_loss_over_dropouts_draws_is_near_that_without(base):
    run = trainer(fresh(base, lora_dropout=0.2))
    base.adapters = jax.tree.map(lambda x: x + 0.02, base.adapters)
    m, batch = run.model, first(only(run))
    fn = jax.jit(run.objective.loss(m.family, m.config, m.scale))
    drawn = [
        float(fn(m.adapters, m.params, batch._replace(key=key)).mean())
        for key in objective.keys(0, 1, 200)
    ]
    quiet = float(fn(m.adapters, m.params, batch).mean())
    deviation = np.std(drawn)
    assert deviation > 1e-4 * quiet
    # The loss bends, so that its mean is off by a second-order term that shrinks with the rate.
    assert abs(np.mean(drawn) - quiet) < 5 * deviation / 200**0.5 + 0.5 * deviation


def test_a_run_with_noise_goes_on_bitwise(base, tmp_path):
    how = dict(neftune_noise_alpha=5, max_steps=4, gradient_accumulation_steps=2)
    how |= dict(per_device_train_batch_size=2)
    start = fresh(base, lora_dropout=0.1).adapters
    whole = trainer(base, **how)
    whole.train()
    wanted, base.adapters = base.adapters, start
    saved = dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=2)
    trainer(base, **how, **saved).train()
    base.adapters = start
    trainer(base, **how).train(resume_from_checkpoint=str(tmp_path / "checkpoint_2"))
    same = jax.tree.map(lambda x, y: bool((x == y).all()), wanted, base.adapters)
    assert all(jax.tree.leaves(same))
    base.adapters = start
    other = trainer(base, **how | {"neftune_noise_alpha": 6})
    with pytest.raises(ValueError, match="neftune 5.0.*neftune 6.0"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint_2"))


def test_tiles_and_chunks_of_a_head_draw_masks_of_their_own(base):
    model = fresh(base, target_modules="all-linear", lora_dropout=0.5)
    move = lambda x: x + 0.1
    attached = lora.attach(
        model.params, jax.tree.map(move, model.adapters), 1.0, 0.5, jax.random.key(0)
    )
    node = {k: {n: leaves.layer(w, 0) for n, w in x.items()}
            for k, x in attached["model"]["layers"]["*"]["mlp"].items()}  # fmt: skip
    x = jnp.ones((1, 1, 64)) * jnp.ones((1, 8, 1))
    tiles = np.asarray(layers.feed_forward(node, x, "silu", 4)).reshape(4, -1)
    assert len(np.unique(tiles, axis=0)) == 4
    head = {"weight": leaves.Lora(
        leaves.Apart(model.params["lm_head"]["weight"], None, jax.random.key(1), 0.5),
        jnp.ones((2, 64)), jnp.ones((482, 2)) * jnp.arange(482.0)[:, None], jnp.float32(0.01),
    )}  # fmt: skip
    found = losses.token_logprobs(x, head, jnp.full((1, 8), 7), 2)[0]
    assert len(np.unique(np.asarray(found).reshape(4, 2), axis=0)) == 4
