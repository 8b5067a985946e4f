"""Evaluation by reward: TRL's metrics, the same draws each time, training as without it.

tests/oracles/grpo.py made the numbers with TRL's GRPOTrainer and PEFT.
"""

import json
import math
from pathlib import Path

import grpo_runs
import jax
import numpy as np
import pytest
import tiny_chat
from grpo_runs import GROUP, LOOP, ROWS, TEXTS

from unsloth_jax import GRPOConfig, GRPOTrainer, SamplingParams
from workflows import rollout
from workflows.rollout import Completion, Counts, Rollout

RECORDED = json.loads((Path(__file__).parent / "data" / "grpo.json").read_text())["evaluation"]
TOLD = ("eval_reward", "eval_completions/", "eval_frac_reward_zero_std")
SHORT = dict(max_steps=3, prompts_per_step=1, max_completion_length=8, alarms=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture
def model(folder):
    return grpo_runs.model(folder)


def trainer(model, held_out=TEXTS, rewards=grpo_runs.reward, **settings) -> GRPOTrainer:
    return GRPOTrainer(
        model=model, reward_funcs=rewards, train_dataset=ROWS, eval_dataset=held_out,
        args=GRPOConfig(**(LOOP | SHORT | settings)),
    )  # fmt: skip


def evaluations(run) -> list[dict]:
    return [row for row in run.log_history if "loss" not in row]


def test_an_evaluation_tells_what_trls_does(model, monkeypatch, figure):
    def run(family, c, params, ids, settings, **_):
        found = grpo_runs.completions(grpo_runs.HELD_OUT, len(ids))
        how = lambda one: "stop" if one[-1] == tiny_chat.EOS else "length"
        made = [Completion(x, [0.0] * len(x), [0.0] * len(x), how(x)) for x in found]
        groups = [made[at : at + GROUP] for at in range(0, len(made), GROUP)]
        return Rollout(groups, Counts(0, sum(map(len, found)), 1))

    monkeypatch.setattr(rollout, "run", run)
    for size in (None, 3, 8):  # completions at once, which changes nothing
        found = trainer(model, per_device_eval_batch_size=size).evaluate()
        for name, want in RECORDED.items():
            if name.startswith(TOLD):
                gap = abs(found[name] - want) / max(1, want)
                figure(f"evaluation of TRL, {name}", gap, 1e-6)
    assert sum(name.startswith(TOLD) for name in RECORDED) == 12


@pytest.mark.slow
def test_each_evaluation_draws_alike_and_the_policy_alone_makes_the_difference(model):
    run = trainer(model, ROWS[:2], num_generations_eval=2)
    clocks = ("eval_runtime", "eval_samples_per_second")
    once, again = ({k: v for k, v in run.evaluate().items() if k not in clocks} for _ in range(2))
    assert once == again
    alone = trainer(model, ROWS[:2], num_generations_eval=2, per_device_eval_batch_size=1)
    assert {k: v for k, v in alone.evaluate().items() if k not in clocks} == once
    model.adapters = jax.tree.map(lambda x: 3 * x, model.adapters)
    assert run.evaluate()["eval_reward"] != once["eval_reward"]


def test_a_greedy_evaluation_draws_what_the_model_answers_greedily(model):
    seen = []

    def kept(completion_ids, **_):
        seen.append(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    found = trainer(model, TEXTS[:3], kept, eval_temperature=0).evaluate()
    greedy = [
        tokens
        for row in TEXTS[:3]
        for tokens in [model.fast_generate(
            row["prompt"], sampling_params=SamplingParams(temperature=0.0, max_tokens=8)
        )[0].outputs[0].token_ids]
    ]  # fmt: skip
    assert [list(ids) for ids in seen[-1]] == [list(ids) for ids in greedy]
    assert found["eval_reward"] == np.mean([len(ids) for ids in greedy])


def test_evaluations_change_nothing_of_the_training(folder):
    found = []
    for more in (None, {"a": TEXTS[:2], "b": ROWS[:1]}):
        model = grpo_runs.model(folder)
        given = {} if more is None else dict(eval_steps=1, eval_on_start=True)
        run = trainer(model, more, **given)
        run.train()
        found.append([x.tobytes() for x in map(np.asarray, jax.tree.leaves(model.adapters))])
    assert found[0] == found[1]
    rows = evaluations(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(math.isfinite(row[f"eval_{n}_reward"]) for row in rows for n in "ab")
    assert rows[0]["eval_a_rewards/reward/mean"] == rows[0]["eval_a_reward"]


def test_the_model_gets_the_adapters_of_the_best_reward(model):
    run = trainer(
        model, ROWS[:1], eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        learning_rate=5e-2, lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    assert run.args.metric_for_best_model == "reward" and run.args.greater_is_better
    run.train()
    told = {row["step"]: row["eval_reward"] for row in evaluations(run)}
    best = max(told, key=told.get)
    assert run.state.best_metric == told[best] and len(set(told.values())) > 1
    assert run.evaluate()["eval_reward"] == pytest.approx(told[best])


@pytest.mark.slow
def test_a_resumed_run_has_the_evaluations_and_the_tokens_of_a_whole_one(folder, tmp_path):
    how = dict(
        output_dir=str(tmp_path), save_strategy="steps", save_steps=1, eval_steps=1,
        metric_for_best_model="eval_reward",
    )  # fmt: skip
    whole = trainer(grpo_runs.model(folder), ROWS[:1], **how)
    whole.train()
    for step in (2, 3):
        (tmp_path / f"checkpoint_{step}").rename(tmp_path / f"later_{step}")
    again = trainer(grpo_runs.model(folder), ROWS[:1], **how)
    again.train(resume_from_checkpoint=True)
    names = ("step", "eval_reward", "num_tokens", "reward", "loss", "grad_norm")
    rows = lambda run: [[row.get(n) for n in names] for row in run.log_history]
    assert rows(again) == rows(whole)
    assert [row[2] for row in rows(whole) if row[2]] == sorted(row[2] for row in rows(whole)
                                                              if row[2])  # fmt: skip


def test_nothing_scored_is_no_number_and_no_best(model):
    with pytest.raises(ValueError, match="metric_for_best_model='loss' is none of"):
        trainer(model, metric_for_best_model="loss")
    found = trainer(model, TEXTS[:1], lambda completions: [None] * len(completions)).evaluate()
    assert math.isnan(found["eval_reward"]) and found["eval_unscored"] == GROUP


@pytest.mark.parametrize(
    "held_out, rewards, settings, message",
    [
        ({}, grpo_runs.reward, {}, "eval_dataset is an empty dictionary"),
        ({"a": [{"text": "x"}]}, grpo_runs.reward, {}, r"eval_dataset\['a'\]: row 0: no column"),
        ([{"prompt": "x"}], lambda completions, answer: [], {}, "eval_dataset: .*needs .'answer'"),
        (None, grpo_runs.reward, dict(eval_strategy="steps"), "need an eval_dataset"),
        (TEXTS, grpo_runs.reward, dict(num_generations_eval=0), "num_generations_eval"),
        (
            TEXTS, grpo_runs.reward, dict(num_generations_eval=2, eval_temperature=0),
            "2 greedy completions of a prompt would be the same",
        ),
        (
            TEXTS, grpo_runs.reward, dict(metric_for_best_model="rewards/other/mean"),
            "none of .*eval_reward.*eval_rewards/reward/mean",
        ),
    ],
)  # fmt: skip
def test_evaluations_that_can_not_be_are_refused_before_the_first_step(
    held_out, rewards, settings, message, model
):
    with pytest.raises(ValueError, match=message):
        trainer(model, held_out, rewards, **settings)


def test_without_any_rows_evaluate_says_so(model):
    with pytest.raises(ValueError, match="no eval_dataset and none was given"):
        trainer(model, None).evaluate()
