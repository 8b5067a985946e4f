"""rollout_fn: a game of two turns with a calculator, what its environment says, bad input."""

import re
from pathlib import Path

import grpo_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpo_runs import GROUP, TEXTS

from unsloth_jax import GRPOConfig, GRPOTrainer, SamplingParams, decoder, lora
from workflows import grpo_objective
from workflows.custom_rollout import Episode, columns, continuations
from workflows.rollout import Completion

SETTINGS = grpo_runs.LOOP | dict(alarms=False, max_steps=1, prompts_per_step=2)


@pytest.fixture(scope="module")
def model(folder):
    return grpo_runs.model(folder)


FILTERED = SamplingParams(max_tokens=9, top_k=50)


def calculator(model, seen):
    """Says 5 tokens, hears what a calculator makes of their ids, says some more."""

    def play(params, prompts, key):
        games, turns = [Episode(one.ids) for one in prompts], jax.random.split(key)
        for n, settings in enumerate((SamplingParams(max_tokens=5), FILTERED)):
            said = continuations(model, params, [g.context for g in games], settings, turns[n])
            for game, one in zip(games, said, strict=True):
                game.said(one)
                if n == 0:
                    answer = str(sum(game.ids) % 97)
                    game.heard(model.tokenizer(f" = {answer};")["input_ids"])
        for game in games:
            game.reward = float(sum(game.ids) % 7)
        seen.append((prompts, games))
        return games

    return play


def trainer(model, rollout_fn, rewards=(), **settings) -> GRPOTrainer:
    args = GRPOConfig(**(SETTINGS | settings))
    how = dict(args=args, train_dataset=TEXTS, rollout_fn=rollout_fn)
    return GRPOTrainer(model=model, reward_funcs=rewards, **how)


def laid(games):
    """Games as padded rows: tokens, segments, and where their tokens after the prompt are."""
    tokens, on = np.zeros((2, len(games), 64), np.int32)
    for n, game in enumerate(games):
        tokens[n, : len(game.context)] = game.context
        on[n, len(game.prompt) - 1 : len(game.context) - 1] = game.loss_mask
    return jnp.asarray(tokens), jnp.asarray(tokens > 0, jnp.int32), on


def logps(model, adapters, tokens, segments):
    """Log-probabilities [B, T - 1] of the tokens that follow, by a plain forward pass."""
    params = lora.attach(model.params, adapters, model.scale)
    at = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = decoder.forward(model.family, model.config, params, tokens, at, segments)
    whole = jax.nn.log_softmax(decoder.logits(model.family, model.config, params, hidden))
    return jnp.take_along_axis(whole[:, :-1], tokens[:, 1:, None], 2)[..., 0]


def test_a_game_of_two_turns_learns_from_what_the_policy_said_alone(model, figure):
    seen = []
    run = trainer(model, calculator(model, seen), loss_type="bnpo", beta=0.0)
    before = model.adapters
    batches = run._batches()
    batches.policy = lambda: before
    _, batch = next(batches.forever())
    prompts, games = seen[0]
    assert [one.example["answer"] for one in prompts] == [
        row["answer"] for row in TEXTS[:2] for _ in range(GROUP)
    ]
    rewards = np.array([game.reward for game in games]).reshape(2, GROUP)
    worth = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1)[:, None] + 1e-4)

    tokens, segments, on = laid(games)

    @jax.jit
    def by_hand(adapters):
        new = logps(model, adapters, tokens, segments)
        term = jnp.exp(new - jax.lax.stop_gradient(new)) * worth.reshape(-1, 1)
        return -jnp.where(on[:, :-1], term, 0).sum() / on.sum()

    want, slope = jax.value_and_grad(by_hand)(before)
    micro = jax.tree.map(lambda x: jnp.asarray(x[0]), batch)
    lowered = run.objective.alone(model.family, model.config, model.scale)

    @jax.jit
    def ours(adapters):
        found = lowered(adapters, model.params, micro)
        return found.total.value / found.total.count

    loss, gradient = jax.value_and_grad(ours)(before)
    figure("loss of a game, by hand", abs(float(loss - want)), 1e-5)
    size = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope))
    for one, other in zip(*map(jax.tree.leaves, (gradient, slope)), strict=True):
        figure("gradient of a game, by hand", float(jnp.abs(one - other).max()) / size, 1e-5)
    assert size > 1e-4
    heard = sum(len(g.loss_mask) - sum(g.loss_mask) for g in games)
    assert heard > GROUP and micro.weights.sum() == sum(sum(g.loss_mask) for g in games)


def test_the_learners_log_probabilities_are_the_samplers_in_both_turns(model, figure):
    seen = []
    trainer(model, calculator(model, seen), max_steps=2, learning_rate=0.0).train()
    games = seen[-1][1]
    tokens, segments, on = laid(games)
    learners = np.asarray(logps(model, model.adapters, tokens, segments))[on[:, :-1] == 1]
    said = np.concatenate([game.loss_mask for game in games]) == 1
    drawn, sampled = (
        np.concatenate([getattr(game, name) for game in games])[said]
        for name in ("logprobs", "sampled_logprobs")
    )
    figure("sampler and learner over two turns", np.abs(learners - drawn).max(), 5e-5)
    assert np.ptp(sampled - drawn) > 0.01  # the second turn's filter


def test_a_run_of_games_tells_its_rewards_lengths_and_gap(model):
    seen = []

    def short(completion_ids):
        return [-len(ids) / 10 for ids in completion_ids]

    run = trainer(model, calculator(model, seen), short, max_steps=3, learning_rate=1e-2)
    run.train()
    for row, (_, games) in zip(run.log_history, seen, strict=True):
        assert row["sampling/sampling_logp_difference/mean"] < 1e-5
        assert row["rewards/rollout_fn/mean"] == pytest.approx(np.mean([g.reward for g in games]))
        both = [g.reward - len(g.ids) / 10 for g in games]
        assert row["reward"] == pytest.approx(np.mean(both))
        spoken = [sum(g.loss_mask) for g in games]
        assert row["completions/mean_length"] == pytest.approx(np.mean(spoken))
        assert row["rollout_tokens_per_s"] == pytest.approx(
            sum(spoken) / row["rollout_seconds"], rel=0.05
        )
        assert row["completions/clipped_ratio"] == np.mean([g.truncated for g in games])


def test_completions_that_are_cut_off_can_be_masked_whole(model):
    def play(params, prompts, key):
        ids = [[9, 9, 7] for _ in prompts]
        masks = [[1, 0, 1] for _ in prompts]
        cut = [n % 2 == 0 for n in range(len(prompts))]
        return dict(
            ids=ids, logprobs=[[-1.0, None, -1.0]] * len(ids), loss_mask=masks,
            reward=[float(n) for n in range(len(ids))], truncated=cut,
        )  # fmt: skip

    run = trainer(model, play, mask_truncated_completions=True)
    batches = run._batches()
    batches.policy = lambda: model.adapters
    _, batch = next(batches.forever())
    on, owners = grpo_objective.behind(batch.weights, batch), grpo_objective.owned(batch)
    assert [on[np.asarray(owners) == n].sum() for n in range(2 * GROUP)] == [0, 2] * GROUP


def test_alike_neighbours_are_read_once_and_each_draws_for_itself(model):
    ids = [[5, 6, 7]] * 3 + [[5, 6]] + [[5, 6, 7]]
    how = SamplingParams(max_tokens=6, ignore_eos=True)
    params = model.adapted()
    found = continuations(model, params, ids, how, jax.random.key(1))
    assert len(found) == 5 and len({tuple(one.tokens) for one in found}) == 5
    again = continuations(model, params, ids, how, jax.random.key(1))
    assert [one.tokens for one in again] == [one.tokens for one in found]
    other = continuations(model, params, ids, how, jax.random.key(2))
    assert [one.tokens for one in other] != [one.tokens for one in found]
    pairs = continuations(model, params, ids[2:4], SamplingParams(n=2), jax.random.key(1))
    assert len(pairs) == 4 and pairs[0].tokens[:6] == found[0].tokens
    with pytest.raises(ValueError, match="1 sampling parameters for 5 lists"):
        continuations(model, params, ids, [how], jax.random.key(1))


GOOD = dict(
    ids=[[5, 6]] * 8, logprobs=[[-1.0, -2.0]] * 8, loss_mask=[[1, 0]] * 8, reward=[0.0, 1.0] * 4
)  # fmt: skip


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(ids=[[5, 6]] * 7), "returned 7 ids for 8 prompts"),
        (dict(ids=[[5, 482]] * 8), r"completion 0: ids must be .* 0 to 481, got \[482\]"),
        (dict(ids=[[5, 6.0]] * 8), r"completion 0: ids must be .*got \[6.0\]"),
        (dict(ids=[[]] * 8), "at least one token"),
        (dict(ids=[[5] * 128] * 8), "completion 0: 128 tokens.*more than max_seq_length=128"),
        (dict(ids="ab"), "ids must be a list"),
        (dict(loss_mask=[[1]] * 8), "loss_mask must be 2 entries of 0 or 1.*got 1"),
        (dict(loss_mask=[[1, 2]] * 8), "loss_mask must be 2 entries of 0 or 1.*'2'"),
        (dict(logprobs=[[-1.0]] * 8), "1 logprobs for 2 ids"),
        (dict(logprobs=[[None, -1.0]] * 8), r"logprobs of tokens \[0\] are \[None\]"),
        (dict(logprobs=[[float("nan"), -1.0]] * 8), r"tokens \[0\] are \[nan\]"),
        (dict(logprobs=[[0.5, -1.0]] * 8), r"\[0.5\].*at most 0"),
        (dict(reward=[float("inf")] * 8), "completion 0: reward must be a finite number"),
        (dict(reward=[None] * 8), "rollout_fn gave no reward, and there is no reward function"),
        (dict(rewards=[1.0] * 8), r"unknown \['rewards'\], without \[\]"),
    ],
)
def test_a_rollout_that_means_nothing_is_refused_by_what_is_wrong(changes, message, model):
    batches = trainer(model, lambda params, prompts, key: GOOD | changes)._batches()
    batches.policy = lambda: model.adapters
    with pytest.raises((TypeError, ValueError), match=message):
        next(batches.forever())


def test_what_is_no_rollout_at_all_is_refused(model):
    four = tuple(GOOD.values())
    assert columns(four) == columns(GOOD)
    for wrong in (four[:3], [1, 2], None):
        with pytest.raises(TypeError, match="must return .ids, logprobs, loss_mask, reward"):
            columns(wrong)
    with pytest.raises(ValueError, match=r"unknown \[\], without \['loss_mask'\]"):
        columns({"ids": [], "logprobs": []})
    with pytest.raises(ValueError, match="rollout_func is TRL's.*rollout_fn"):
        GRPOTrainer(model=model, train_dataset=TEXTS, rollout_func=lambda prompts, trainer: {})
    with pytest.raises(ValueError, match="no reward function"):
        GRPOTrainer(model=model, train_dataset=TEXTS, args=GRPOConfig(**SETTINGS))


def test_an_episode_keeps_ids_as_they_were_drawn():
    game = Episode([1, 2])
    game.said(Completion([3, 4], [-1.0, -2.0], [-0.5, -1.5], "stop"))
    game.heard([5])
    game.said(Completion([6], [-3.0], [-3.0], "length"))
    assert game.context == [1, 2, 3, 4, 5, 6] and game.loss_mask == [1, 1, 0, 1]
    assert game.logprobs == [-1.0, -2.0, 0.0, -3.0] and game.truncated


@pytest.mark.slow
def test_the_pages_game_runs_as_it_stands(model):
    page = (Path(__file__).parents[1] / "docs" / "grpo.md").read_text()
    [code] = [
        one for one in re.findall(r"```python\n(.*?)```", page, flags=re.S) if "Episode" in one
    ]
    names = dict(model=model, tokenizer=model.tokenizer, rows=TEXTS)
    exec(compile(code, "docs/grpo.md", "exec"), names)
    names["trainer"].train()
    rows = names["trainer"].log_history
    assert len(rows) == 2
    assert all(row["sampling/sampling_logp_difference/mean"] < 1e-5 for row in rows)
