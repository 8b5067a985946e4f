"""GRPOTrainer: TRL's runs, rollouts of the learner's own policy, resuming, bad input.

tests/oracles/grpo.py made the numbers with TRL's GRPOTrainer and PEFT.
"""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import child_process
import grpo_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat
import trl
from grpo_runs import GROUP, LOOP, ROWS, RUNS, TEXTS

from bridge.checkpoint import Checkpoints
from unsloth_jax import FastLanguageModel, GRPOConfig, GRPOTrainer, decoder, lora, plan
from unsloth_jax.leaves import Hosted
from unsloth_jax.optim import make
from unsloth_jax.remat import Memory
from unsloth_jax.train import start
from workflows import engines, grpo_objective, rollout
from workflows import plan as planning
from workflows.grpo_prompts import prompts
from workflows.rollout import Completion, Counts, Rollout

ROOT = Path(__file__).parents[1]
RECORDED = json.loads((ROOT / "tests" / "data" / "grpo.json").read_text())
FAST = ("dapo", "bnpo_kl", "grpo_twice")
QUIET = dict(alarms=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture
def model(folder):
    return grpo_runs.model(folder)


def trainer(model, rows=TEXTS, rewards: Any = grpo_runs.reward, **settings) -> GRPOTrainer:
    args = GRPOConfig(**(LOOP | QUIET | settings))
    return GRPOTrainer(model=model, reward_funcs=rewards, args=args, train_dataset=rows)


def injected(patch) -> None:
    """Rollouts give the recorded completions, one generation after another."""
    count = iter(range(100))

    def run(family, c, params, ids, settings, **_):
        found = grpo_runs.completions(next(count), len(ids))
        ended = lambda one: one[-1] == tiny_chat.EOS
        made = [
            Completion(one, [0.0] * len(one), [0.0] * len(one), "stop" if ended(one) else "length")
            for one in found
        ]
        groups = [made[at : at + GROUP] for at in range(0, len(made), GROUP)]
        return Rollout(groups, Counts(0, sum(map(len, found)), 1))

    patch.setattr(rollout, "run", run)


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in RUNS]
)
def test_each_step_is_that_of_trls_trainer(name, model, figure, monkeypatch):
    injected(monkeypatch)
    run = trainer(model, **RUNS[name])
    run.train()
    ours, theirs = run.log_history, RECORDED["runs"][name]
    assert len(ours) == len(theirs) == grpo_runs.STEPS
    shared = (set(theirs[0]) | set(theirs[-1])) & {*ours[0], *ours[-1]} - {"learning_rate"}
    if RUNS[name].get("importance_sampling_level") == "sequence":
        # Means are counted by sequence there.
        shared -= {n for n in shared if n.startswith("clip_ratio") and n.endswith("_mean")}
    if RUNS[name].get("gradient_accumulation_steps", 1) > 1:
        # TRL's are means of micro-batches' means, whatever tokens they have.
        shared -= {n for n in shared if n.startswith(("entropy", "clip_ratio", "kl"))}
    assert {"loss", "grad_norm", "reward", "completions/clipped_ratio", "num_tokens"} <= shared
    for metric in sorted(shared):
        there = {row_number: row[metric] for row_number, row in enumerate(theirs) if metric in row}
        here = {n: row[metric] for n, row in enumerate(ours) if row.get(metric) is not None}
        assert there.keys() <= here.keys(), metric
        gap = max(abs(here[n] - there[n]) for n in there)
        size = max(1.0, *map(abs, there.values()))
        figure(f"{name} of TRL, {metric}", gap / size, 1e-3)
    assert max(np.ptp([row[metric] for row in theirs]) for metric in ("loss", "grad_norm")) > 0.05


def test_the_sampler_is_the_learners_own_policy_at_every_step(model, figure):
    run = trainer(
        model, ROWS, temperature=0.8, top_k=20, beta=0.1, learning_rate=2e-2, prompts_per_step=3
    )
    run.train()
    for row in run.log_history:
        gap = row["sampling/sampling_logp_difference/mean"]
        figure(f"sampler and learner, step {row['step']}", gap, 1e-5)
        assert row["ratio"] == 1.0
    # The reference is the policy as it stood: no divergence before an update, some after.
    assert abs(run.log_history[0]["kl"]) < 1e-9 and run.log_history[-1]["kl"] > 1e-4
    assert run.log_history[0]["rollout_tokens_per_s"] > 0


def test_the_micro_batch_changes_no_number(folder):
    found = []
    for rows, accumulation in ((8, 1), (3, 9), (1, 1)):
        run = trainer(
            grpo_runs.model(folder), ROWS, prompts_per_step=2, per_device_train_batch_size=rows,
            gradient_accumulation_steps=accumulation, max_steps=2, loss_type="grpo", beta=0.04,
        )  # fmt: skip
        run.train()
        found.append(run.log_history[-1])
    for other in found[1:]:
        for name in ("loss", "grad_norm", "reward", "kl", "entropy", "completions"):
            assert other[name] == pytest.approx(found[0][name], rel=1e-5, abs=1e-7), name


def test_rewards_get_the_columns_and_the_texts_of_messages(model):
    seen = []

    def right(prompts, completions, answer, trainer_state):
        seen.append((prompts, completions, answer, trainer_state.global_step))
        return [float(len(c[0]["content"]) if isinstance(c, list) else len(c)) for c in completions]

    talks = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in TEXTS]
    for rows in (TEXTS, talks):
        seen.clear()
        run = trainer(model, rows, right, max_steps=2, prompts_per_step=2)
        run.train()
        assert [step for *_, step in seen] == [0, 1]
        given, completions, answers, _ = seen[0]
        assert given == [row["prompt"] for row in rows[:2] for _ in range(GROUP)]
        assert answers == [row["answer"] for row in rows[:2] for _ in range(GROUP)]
        assert len(completions) == 2 * GROUP
    assert completions[0][0]["role"] == "assistant"


def test_reward_rises_where_one_token_is_rewarded(model):
    def wanted(completion_ids, **_):
        return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]

    run = trainer(
        model, ROWS, wanted, max_steps=12, learning_rate=3e-2, prompts_per_step=4,
        num_generations=8,
        lr_scheduler_type="constant", warmup_steps=0, per_device_train_batch_size=32,
    )  # fmt: skip
    run.train()
    rewards = [row["reward"] for row in run.log_history]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:2]) + 0.1


def test_the_next_rollout_after_a_resume_is_the_learners(folder, tmp_path):
    model = grpo_runs.model(folder)
    how = dict(output_dir=str(tmp_path), save_strategy="steps", save_steps=2, max_steps=4)
    trainer(model, ROWS, **how).train()
    (tmp_path / "checkpoint_4").rename(tmp_path / "later")
    again = trainer(grpo_runs.model(folder), ROWS, **how)
    again.train(resume_from_checkpoint=True)
    rows = again.log_history[-2:]
    assert [row["step"] for row in rows] == [3, 4]
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-5 for row in rows)


PRELUDE = (
    child_process.PRELUDE
    + """
import test_grpo_trainer as these, grpo_runs

folder, output = map(Path, sys.argv[1:])
"""
)
KILLED = """
these.saving(folder, output / "whole").train()
run = these.saving(folder, output / "broken")
run.state.log_history = child_process.Deadly(4)
run.train()
"""
RESUMED = """
run = these.saving(folder, output / "broken")
assert run.train(resume_from_checkpoint=True).global_step == 6
"""


def saving(folder: Path, output: Path) -> GRPOTrainer:
    how = dict(output_dir=str(output), save_strategy="steps", save_steps=3, max_steps=6, beta=0.1)
    return trainer(grpo_runs.model(folder), ROWS, **how)


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_equals_a_whole_one_bitwise(folder, tmp_path):
    killed = child_process.run(PRELUDE + KILLED, folder, tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "broken" / "checkpoint_6").exists()
    resumed = child_process.run(PRELUDE + RESUMED, folder, tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    model = grpo_runs.model(folder)
    like, states = start(model.adapters, make("adamw_torch", lambda n: n, max_grad_norm=1.0)), []
    for name in ("whole", "broken"):
        checkpoints = Checkpoints(tmp_path / name)
        states.append(checkpoints.restore(like, 6).state)
        checkpoints.close()
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_what_a_step_learns_from_is_laid_behind_its_prompt(model, monkeypatch):
    injected(monkeypatch)
    run = trainer(model, prompts_per_step=2, per_device_train_batch_size=3, loss_type="grpo")
    batches = run._batches()
    batches.policy = lambda: model.adapters
    _, batch = next(batches.forever())
    found = grpo_runs.completions(0, 2)
    # Two of a group's four in each row, since three are in memory at once.
    assert batch.shared.places.shape[:3] == (4, 1, 2) and batch.beside["real"].sum() == 8
    for n, ids in enumerate(found):
        row, place = batch.tokens[n // 2, 0], batch.shared.places[n // 2, 0, n % 2]
        prompt = run.rows[n // GROUP].ids
        assert row[place[place >= 0]].tolist() == prompt + ids
        mine = grpo_objective.behind(batch.tokens, batch)[n // 2, 0]
        mine = mine[batch.shared.owners[n // 2, 0] == n % 2]
        assert mine.tolist() == ids
    assert batch.weights.sum() == sum(map(len, found))
    assert not batch.weights[batch.segments < 2].any()
    told = grpo_objective.of_each(model.family, model.config, model.scale, 1.0)
    logps, entropies = told(model.adapters, model.params, batch._replace(beside=None))
    params = lora.attach(model.params, model.adapters, model.scale)
    ids = run.rows[0].ids + found[0]
    row = jnp.asarray([ids])
    place = jnp.arange(len(ids))[None]
    hidden = decoder.forward(model.family, model.config, params, row, place, jnp.ones_like(row))
    whole = jax.nn.log_softmax(decoder.logits(model.family, model.config, params, hidden[0]))
    at = np.arange(len(run.rows[0].ids) - 1, len(ids) - 1)
    want = whole[at, jnp.asarray(found[0])]
    np.testing.assert_allclose(logps[0, 0, : len(at)], want, atol=2e-5)
    want = -(jnp.exp(whole) * whole).sum(-1)[at]
    np.testing.assert_allclose(entropies[0, 0, : len(at)], want, atol=2e-5)


def test_the_plan_has_the_shapes_of_the_longest_step(model, monkeypatch):
    run = trainer(model, prompts_per_step=3, per_device_train_batch_size=8, beta=0.04)
    batches = run._batches()
    batches.policy = lambda: model.adapters

    def longest(family, c, params, ids, settings, **_):
        one = Completion([5] * grpo_runs.LONGEST, *[[0.0] * grpo_runs.LONGEST] * 2, "length")
        return Rollout([[one] * GROUP for _ in ids], Counts(0, 1, 1))

    monkeypatch.setattr(rollout, "run", longest)
    batches.prompts = [max(run.rows, key=lambda one: len(one.ids))] * 3
    _, batch = next(batches.forever())
    shapes = lambda node: jax.tree.map(lambda x: (x.shape, x.dtype.name), node)
    sizes = batches.accumulation, batches.batch
    job = planning.job_of(model, make("adamw_torch", lambda n: n), batches)._replace(
        beside=run.objective.beside(*sizes), shared=run.objective.shared(*sizes)
    )
    assert shapes(plan.batches(job, Memory())) == shapes(batch)
    assert job.mixed == (8, batch.shared.places.shape[-1]) and job.batch == 2


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(num_generations=1), "num_generations"),
        (dict(loss_type="gpro"), "loss_type 'gpro' is not supported"),
        (dict(beta=-1.0), "beta"),
        (dict(temperature=0.0), "temperature"),
        (dict(top_p=1.5), "top_p must be in"),
        (dict(steps_per_generation=3, gradient_accumulation_steps=2), "no whole number"),
        (dict(generation_batch_size=12), "no whole number of optimizer steps"),
        (dict(steps_per_generation=1, generation_batch_size=8), "say the same"),
        (dict(save_strategy="steps", save_steps=3, num_iterations=2), "save_steps=3 cuts"),
        (dict(reward_weights=[1.0, 2.0]), "2 reward_weights for 1 functions"),
        (dict(reward_weights=[float("nan")]), r"GRPOConfig: reward_weights\[0\] must be a number"),
        (dict(max_completion_length=0), "max_completion_length must be at least 1, got 0"),
        (dict(epsilon=-0.1), "epsilon=-0.1, expected a number of at least 0"),
        (dict(importance_sampling_level="word"), "importance_sampling_level 'word' is not"),
        (dict(entropy_coef=0.1), "entropy_coef=0.1 is not supported yet"),
        (dict(sync_ref_model=True), "sync_ref_model=True is not supported yet"),
        (
            dict(
                loss_type="vespo", vllm_importance_sampling_correction=True,
                vllm_importance_sampling_mode="sequence_mask",
            ),
            "vespo.*token_truncate",
        ),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(changes, message, model):
    with pytest.raises(ValueError, match=message):
        trainer(model, **changes)


def test_every_setting_of_trls_config_is_known():
    own = {f.name: f.default for f in dataclasses.fields(trl.GRPOConfig)}
    assert len(own) > 150
    for name, default in own.items():
        try:
            GRPOConfig(**{name: None if default is dataclasses.MISSING else default})
        except ValueError as error:
            assert name in str(error)


def test_an_unknown_setting_or_keyword_is_refused_with_the_nearest_name(model):
    with pytest.raises(TypeError, match="num_generation'; nearest known: .*num_generations"):
        GRPOConfig(num_generation=4)
    with pytest.raises(TypeError, match="reward_function'.*reward_funcs"):
        GRPOTrainer(model=model, reward_function=len, train_dataset=ROWS)


@pytest.mark.parametrize(
    "rows, rewards, error, message",
    [
        (ROWS, (), ValueError, "no reward function"),
        (ROWS, None, ValueError, "no reward function"),
        (ROWS, "org/reward-model", TypeError, "functions are taken, reward models are not"),
        ([{"prompt": "a", "x": 1}, {"prompt": "b"}], grpo_runs.reward, ValueError, "different col"),
        ([{"text": "x"}], grpo_runs.reward, ValueError, "row 0: no column 'prompt'.*text"),
        ([{"prompt": ""}], grpo_runs.reward, ValueError, "row 0: the prompt is empty"),
        ([{"prompt": []}], grpo_runs.reward, ValueError, "row 0: prompt must be text or messages"),
        ([], grpo_runs.reward, ValueError, "the data set is empty"),
        (None, grpo_runs.reward, ValueError, "needs a train_dataset"),
        (ROWS, lambda completions, gold: [], ValueError, "needs .'gold'.*answer"),
    ],
)
def test_data_and_rewards_that_do_not_fit_are_refused_before_the_first_step(
    rows, rewards, error, message, model
):
    with pytest.raises(error, match=message):
        trainer(model, rows, rewards)


def test_long_prompts_are_dropped_only_where_that_is_asked_for(model, capsys):
    rows = [*TEXTS, {"prompt": "one two three " * 60, "answer": ""}]
    with pytest.raises(ValueError, match="1 of 9 prompts have more than .* drop_long_prompts"):
        trainer(model, rows)
    run = trainer(model, rows, drop_long_prompts=True)
    assert len(run.rows) == 8
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        trainer(model, max_completion_length=128)


def test_a_reward_functions_error_names_function_row_and_completion(model):
    def broken(completions, answer):
        return [1 / (text == "never") for text in completions]

    with pytest.raises(RuntimeError, match="'broken' raised ZeroDivisionError.*row 0 of 8"):
        trainer(model, TEXTS, broken, max_steps=1).train()


def test_truncated_completions_can_be_left_out_of_means_and_deviations(model, monkeypatch):
    worth = []
    for inside in (True, False):
        with monkeypatch.context() as patch:
            injected(patch)
            masked = dict(mask_truncated_completions=True, truncated_in_statistics=inside)
            batches = trainer(model, **masked)._batches()
            batches.policy = lambda: model.adapters
            _, batch = next(batches.forever())
        worth.append(batch.beside["advantages"].reshape(-1, GROUP))
        learnt = grpo_objective.behind(batch.weights, batch)[..., None] > 0
        own = batch.shared.owners[..., None] == np.arange(GROUP)
        assert (learnt & own).any(-2).reshape(-1).tolist() == [
            one[-1] == tiny_chat.EOS for one in grpo_runs.completions(0, 2)
        ]
    cut = np.asarray([one[-1] != tiny_chat.EOS for one in grpo_runs.completions(0, 2)])
    cut = cut.reshape(-1, GROUP)
    assert cut.any() and not worth[1][cut].any() and worth[0][cut].all()
    np.testing.assert_allclose(worth[1].sum(1), 0, atol=1e-5)


def test_steps_without_a_signal_change_nothing_and_end_no_run(folder):
    """Fresh adapters, a KL term that is 0, and rewards that differ in the third step alone."""
    model, _ = tiny_chat.load(folder)
    FastLanguageModel.get_peft_model(model, r=4)
    begun = model.adapters
    told = iter(range(100))

    def late(completion_ids):
        differ = next(told) == 2
        return [differ * sum(ids) / len(ids) for ids in completion_ids]

    run = trainer(
        model, ROWS, late, max_steps=4, warmup_steps=0, lr_scheduler_type="constant", beta=0.1
    )
    trainer(model, ROWS, lambda completion_ids: [1.0] * len(completion_ids), max_steps=2).train()
    for one, other in zip(*map(jax.tree.leaves, (begun, model.adapters)), strict=True):
        np.testing.assert_array_equal(one, other)
    run.train()
    norms = [row["grad_norm"] for row in run.log_history]
    assert norms[0] == norms[1] == 0 < norms[2]
    assert [row["frac_reward_zero_std"] for row in run.log_history[:3]] == [1.0, 1.0, 0.0]
    assert any(
        np.any(one != other)
        for one, other in zip(*map(jax.tree.leaves, (begun, model.adapters)), strict=True)
    )


def test_unsloths_settings_of_a_loss_type_are_taken_unless_others_are_given():
    dapo = GRPOConfig(loss_type="dapo")
    assert dapo.mask_truncated_completions and dapo.epsilon_high == 0.28
    mine = GRPOConfig(loss_type="dapo", epsilon_high=0.3, mask_truncated_completions=False)
    assert not mine.mask_truncated_completions and mine.epsilon_high == 0.3
    assert GRPOConfig(loss_type="dr_grpo").scale_rewards == "none"
    plain = GRPOConfig()
    assert (plain.loss_type, plain.beta, plain.num_generations) == ("bnpo", 0.001, 8)
    assert GRPOConfig(scale_rewards=False).scale_rewards == "none"


def test_prompts_keep_their_columns_and_get_the_generation_prompt(model):
    found = prompts(ROWS, model.tokenizer, 100)
    for row, one in zip(ROWS, found, strict=True):
        want = (
            model.tokenizer(row["prompt"])["input_ids"]
            if isinstance(row["prompt"], str)
            else model.tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_dict=False
            )
        )
        assert one.ids == list(want) and one.example == row
    assert [one.conversational for one in found] == [n % 2 == 1 for n in range(8)]


def test_a_table_in_host_memory_is_on_the_device_for_a_rollout():
    table = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    params = {"model": {"embed_tokens": {"weight": Hosted(table)}, "norm": jnp.ones(2)}}
    found = engines.on_device(params)
    np.testing.assert_array_equal(found["model"]["embed_tokens"]["weight"], table)
    assert found["model"]["norm"] is params["model"]["norm"]
