"""What a GRPO run tells of itself: metrics of the correction, speeds, kept completions, alarms."""

from types import SimpleNamespace

import grpo_runs
import numpy as np
import pytest
import tiny_chat
from grpo_runs import GROUP, LOOP, ROWS

from unsloth_jax import GRPOConfig, GRPOTrainer
from workflows import grpo_report, keywords
from workflows.grpo_alarms import Alarms, limits

GAP = "sampling/sampling_logp_difference"
CALM = {
    "completions/clipped_ratio": 0.0, "frac_reward_zero_std": 0.0, "completions/repetition": 0.1,
    "completions/mean_length": 20.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture
def said(monkeypatch, capsys):
    """said() are the lines that were printed, each anew."""
    monkeypatch.setattr(keywords, "_said", set())
    return lambda: capsys.readouterr().out


def trainer(model, rewards=grpo_runs.reward, **settings) -> GRPOTrainer:
    short = dict(max_steps=3, prompts_per_step=2, max_completion_length=8, alarms=False)
    args = GRPOConfig(**(LOOP | short | settings))
    return GRPOTrainer(model=model, reward_funcs=rewards, args=args, train_dataset=ROWS)


@pytest.fixture(scope="module")
def run(folder):
    """Three steps with two functions, one of which logs a column."""

    def both(completions, log_extra):
        log_extra("letters", [len(text) for text in map(str, completions)])
        return [float(len(text)) for text in map(str, completions)]

    run = trainer(
        grpo_runs.model(folder), [both, grpo_runs.reward],
        vllm_importance_sampling_correction=True,
    )  # fmt: skip
    run.train()
    return run


def test_a_row_tells_what_rollout_rewards_and_learner_took(run):
    for row in run.log_history:
        assert row["step_time"] == pytest.approx(row["seconds"], abs=2e-3)
        assert 0 < row["learner_seconds"] <= row["step_time"]
        assert row["learner_tokens_per_s"] >= row["tokens_per_s"]
        assert row["rollout_seconds"] > 0 and row["rollout_tokens_per_s"] > 0
        assert row[f"{GAP}/mean"] <= row[f"{GAP}/max"] < 1e-4
    counts = [row["num_tokens"] for row in run.log_history]
    lengths = [2 * GROUP * row["completions/mean_length"] for row in run.log_history]
    prompts = [
        GROUP * sum(len(one.ids) for one in run._batches()._prompts(n)) for n in range(len(lengths))
    ]
    assert counts == pytest.approx(np.cumsum(lengths) + np.cumsum(prompts))


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_the_importance_weights_are_told_as_trl_counts_them(mode):
    rng = np.random.default_rng(0)
    learnt = (rng.random((2, 3, 8)) < 0.7).astype(np.float32)
    learnt[0, 1, :4] = 0  # a completion that nothing is learnt from
    learnt[1, :, 7:] = 0  # nothing there, so that a step may be narrower
    owners = np.broadcast_to(2 * np.arange(3)[:, None] + np.repeat([0, 1], 4), learnt.shape)
    given = rng.random((2, 3, 8)) + 0.5
    flat = given[learnt > 0]
    if mode.startswith("sequence"):
        given = np.repeat(given[..., ::4], 4, axis=-1)
        flat = given[..., ::4][learnt.reshape(2, 3, 2, 4).any(-1)]
        assert flat.size == 11
    steps = [
        [x[:1] for x in (given, learnt, owners)],
        [x[1:, :, :7] for x in (given, learnt, owners)],
    ]
    told = grpo_report.weights(steps, mode)
    want = {"min": flat.min(), "mean": flat.mean(), "max": flat.max()}
    assert told == pytest.approx(
        {f"sampling/importance_sampling_ratio/{name}": x for name, x in want.items()}
    )
    assert grpo_report.weights([(given, 0 * learnt, owners)], mode) == {}


def test_the_log_has_the_importance_weights_where_they_are_used(run):
    for row in run.log_history:
        told = [row[f"{grpo_report.RATIO}/{n}"] for n in ("min", "mean", "max")]
        assert told == sorted(told) and told == pytest.approx([1, 1, 1], abs=1e-3)


def test_best_and_worst_of_every_tenth_generation_are_kept_unasked(run):
    assert [row["step"] for row in run.log_history if grpo_report.TABLE in row] == [1]
    table = run.log_history[0][grpo_report.TABLE]
    rewards = [one["reward"] for one in table]
    assert len(table) == 4 and rewards == sorted(rewards, reverse=True)
    assert table[0]["rewards"].keys() == {"both", "reward"} and table[0]["letters"] >= 0
    worth = SimpleNamespace(rewards=np.asarray([0.0, np.nan, 3.0, 2.0, 1.0, 0.5]))
    found = SimpleNamespace(worth=worth, completions=range(6))
    kept = lambda number, **how: grpo_report.chosen(found, number, GRPOConfig(**how))
    assert [kept(n) for n in (0, 1, 9, 10)] == [[2, 3, 0, 1], [], [], [2, 3, 0, 1]]
    assert kept(3, log_completions=True) == list(range(6))
    assert kept(3, log_completions=True, num_completions_to_print=2) == [0, 1]


def heeded(*generations) -> Alarms:
    alarms = Alarms()
    for told in generations:
        alarms.heed(CALM | told, GRPOConfig())
    return alarms


def test_alarms_stop_with_advice():
    cut = {"completions/clipped_ratio": 0.9}
    heeded(*[cut] * 4)
    with pytest.raises(RuntimeError, match="90% of the completions.*max_completion_length=512"):
        heeded(*[cut] * 5)
    heeded(*[{}] * 5, *[cut] * 9)  # which look at the first ones only
    with pytest.raises(RuntimeError, match="every group's rewards were equal"):
        heeded(*[{}] * 3, *[{"frac_reward_zero_std": 1.0}] * 5)
    heeded(*[{"frac_reward_zero_std": 1.0}] * 4, {}, *[{"frac_reward_zero_std": 1.0}] * 4)
    with pytest.raises(RuntimeError, match="step 3: sampler and learner differ by 0.500"):
        Alarms.gap({"step": 3, f"{GAP}/mean": 0.5})


def test_a_gap_between_sampler_and_learner_is_said_before_it_stops(said):
    Alarms.gap({"step": 3, f"{GAP}/mean": 0.002})
    Alarms.gap({"step": 3})
    assert not said()
    Alarms.gap({"step": 3, f"{GAP}/mean": 0.05})
    assert "differ by 0.050 nats" in said()


@pytest.mark.parametrize(
    "generations, words",
    [
        ([{"completions/repetition": 0.7}] * 5, "repeats itself"),
        ([{}] * 5 + [{"completions/mean_length": 60.0}] * 5, "3.0 times as long as at first"),
        (
            [{"rewards/right/std": 0.0, "rewards/tags/std": 0.4}] * 5,
            "reward function 'right' gave every completion of the last 5 generations the same",
        ),
        ([{}] * 10, ""),
        ([{"rewards/right/std": 0.0, "rewards/tags/std": 0.4}] * 4 + [{}], ""),
        ([{"rewards/right/std": 0.0}] * 10, ""),
    ],
)
def test_rewards_that_may_be_earned_without_the_task_are_hinted_at(generations, words, said):
    heeded(*generations)
    found = said()
    assert (words in found) if words else not found


@pytest.mark.parametrize(
    "row, words",
    [
        ({"loss": 1e-9, "grad_norm": 0.3, "frac_reward_zero_std": 0.2}, "the loss is near 0, as"),
        ({"loss": 0.0, "grad_norm": 0.0, "frac_reward_zero_std": 1.0}, "the first step taught"),
        ({"loss": 0.2, "grad_norm": 0.3, "frac_reward_zero_std": 0.2}, ""),
    ],
)
def test_a_loss_of_zero_is_explained(row, words, said):
    Alarms.loss(row)
    found = said()
    assert (words in found) if words else not found


def test_a_run_stops_past_its_limits_of_kl_and_length(run):
    args = GRPOConfig(stop_at_kl=0.5, stop_at_length=100)
    limits({"step": 2, "kl": 0.4, "completions/mean_length": 90.0}, args)
    with pytest.raises(RuntimeError, match="step 2: 0.6 nats.*over stop_at_kl=0.5"):
        limits({"step": 2, "kl": 0.6}, args)
    with pytest.raises(RuntimeError, match="110 tokens a completion.*stop_at_length=100"):
        limits({"step": 2, "completions/mean_length": 110.0}, args)
    with pytest.raises(ValueError, match="stop_at_kl=0.5 needs a beta"):
        GRPOConfig(stop_at_kl=0.5, beta=0.0)
    run.args.stop_at_length = 1.0
    with pytest.raises(RuntimeError, match="step 1: .*stop_at_length"):
        run.train()
    assert [row["step"] for row in run.log_history] == [1]


def test_repetition_is_the_share_of_runs_that_stood_before():
    assert grpo_report._repeated([1, 2, 3]) == 0.0
    assert grpo_report._repeated(list(range(20))) == 0.0
    assert grpo_report._repeated([5] * 12) == 1 - 1 / 9
