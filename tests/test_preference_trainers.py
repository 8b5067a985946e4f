"""DPO, ORPO, CPO and KTO trainers: TRL's runs, the reference, accumulation, metrics, resuming.

tests/oracles/preference_trainers.py made the numbers with TRL's trainers and PEFT.
"""

import json
import signal
from pathlib import Path

import child_process
import jax
import numpy as np
import preference_runs
import pytest
import tiny_chat
from preference_runs import JUDGED, LOOP, RUNS, TALKS, TEXTS

import unsloth_jax
from bridge.checkpoint import Checkpoints
from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
from unsloth_jax.optim import make
from unsloth_jax.train import start

ROOT = Path(__file__).parents[1]
RECORDED = json.loads((ROOT / "tests" / "data" / "preference_trainers.json").read_text())
FAST = ("dpo", "orpo", "kto")
WHOLE = dict(per_device_train_batch_size=4)  # one program for all who take it


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model") / "chat")


@pytest.fixture(scope="module")
def base(folder):
    return tiny_chat.load(folder)[0]


@pytest.fixture
def fresh(base):
    return preference_runs.fresh(base)


def trainer(kind: str, model, rows, held_out=None, **settings):
    config = getattr(unsloth_jax, f"{kind}Config")(**(LOOP | settings))
    made = getattr(unsloth_jax, f"{kind}Trainer")
    return made(model=model, args=config, train_dataset=rows, eval_dataset=held_out)


def steps(run) -> list[dict]:
    run.train()
    return [row for row in run.log_history if "loss" in row]


CASES = [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in RUNS]


@pytest.mark.parametrize("name", CASES)
def test_each_step_is_that_of_trls_trainer(name, folder, figure):
    kind, rows, settings = RUNS[name]
    ours = steps(trainer(kind, preference_runs.model(folder), rows, **settings))
    theirs = RECORDED["runs"][name]
    assert len(ours) == len(theirs) == preference_runs.STEPS
    shared = set(theirs[0]) - {"learning_rate"}
    if settings.get("cpo_alpha") == 0:
        shared -= {"nll_loss"}  # TRL writes 0 where it has no weight
    assert {"loss", "grad_norm", "rewards/chosen", "rewards/margins"} <= shared <= set(ours[0])
    # Where policy and reference are equal, rounding says which answer has the higher reward.
    told = [i for i, row in enumerate(theirs) if abs(row["rewards/margins"]) > 1e-4]
    assert len(told) >= preference_runs.STEPS - 2
    wins = "rewards/accuracies"
    if wins in shared:
        assert [ours[i][wins] for i in told] == [theirs[i][wins] for i in told]
    for metric in sorted(shared - {wins}):
        there = np.asarray([row[metric] for row in theirs if metric in row])
        here = np.asarray([row[metric] for row in ours if metric in row])
        size = max(1.0, np.abs(there).max())
        figure(f"{name} of TRL, {metric}", np.abs(here - there).max() / size, 1e-3)
    moved = [abs(theirs[-1][m] - theirs[0][m]) for m in ("loss", "rewards/margins")]
    assert min(moved) > 0.05


@pytest.mark.parametrize("shape", ["texts", "talks", "implicit"])
def test_rows_are_trls_up_to_what_a_template_writes_after_the_end_of_turn(shape, fresh):
    rows = {"texts": TEXTS, "talks": TALKS, "implicit": preference_runs.IMPLICIT}[shape]
    run = trainer("DPO", fresh, rows)
    assert run.train_dataset == RECORDED["ids"][shape]
    ends = {side.tokens[n] for pair in run.rows for side in pair[:2] for n in learnt(side)[-1:]}
    assert ends == {tiny_chat.EOS}


def learnt(row) -> list[int]:
    return [n for n, on in enumerate(row.mask) if on]


def test_after_sft_margins_and_kl_begin_at_zero_and_the_reference_stays(fresh):
    how = dict(learning_rate=2e-2, lr_scheduler_type="constant", optim="adamw_torch")
    args = SFTConfig(**how, per_device_train_batch_size=4, max_length=64, max_steps=3)
    SFTTrainer(fresh, train_dataset=tiny_chat.MESSAGES, args=args).train()
    after = fresh.adapters
    for kind, rows, settings in (("DPO", TEXTS, WHOLE), RUNS["kto"]):
        fresh.adapters = after
        run = trainer(kind, fresh, rows, **settings)
        first, *_, last = steps(run)
        assert run.reference.start is after
        zero = [v for k, v in first.items() if k == "kl" or k.startswith("rewards/")]
        assert len(zero) == 4 and np.abs(zero).max() < 1e-4
        assert abs(last["rewards/margins"]) > 0.05
    fresh.adapters = None
    other = preference_runs.fresh(fresh)
    known = trainer("DPO", other, TEXTS).reference
    assert known.start is None and known.name == "the base"  # new adapters change nothing


def test_training_raises_the_share_of_pairs_that_are_the_right_way_round(fresh):
    run = trainer("DPO", fresh, TEXTS, **WHOLE)
    before = run.evaluate(TEXTS)
    run.train()
    after = run.evaluate(TEXTS)
    assert before["eval_rewards/accuracies"] == 0 and before["eval_loss"] == pytest.approx(0.693147)
    assert after["eval_rewards/accuracies"] > 0.8 and after["eval_loss"] < 0.6
    assert after["eval_pairs"] == 8 and "eval_perplexity" not in after
    assert after["eval_rewards/margins"] == pytest.approx(
        after["eval_rewards/chosen"] - after["eval_rewards/rejected"], abs=1e-5
    )


SPLITS = [
    ("DPO", TEXTS[:7], dict(loss_type=["sigmoid", "sft"])),
    pytest.param("ORPO", TEXTS[:7], {}, marks=pytest.mark.slow),
    pytest.param("CPO", TEXTS[:7], dict(loss_type="simpo"), marks=pytest.mark.slow),
    pytest.param("KTO", JUDGED[:7], {}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("kind, rows, settings", SPLITS, ids=["DPO", "ORPO", "SimPO", "KTO"])
def test_micro_batches_change_nothing_with_a_last_partial_step(kind, rows, settings, base):
    """Seven rows in steps of four: one micro-batch of the last step is empty in part, or whole."""
    seen = []
    for batch, accumulation in ((4, 1), (1, 4)):
        split = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        run = trainer(kind, preference_runs.fresh(base), rows, max_steps=3, **split, **settings)
        seen.append(steps(run))
    for one, other in zip(*seen, strict=True):
        for name in one.keys() - {"seconds", "tokens_per_s", "memory_gib"}:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    assert [row["answers" if kind == "KTO" else "pairs"] for row in seen[0]] == [4, 3, 4]


@pytest.mark.slow
def test_reference_log_probabilities_found_beforehand_are_those_of_the_step(folder):
    seen = []
    for known in (False, True):
        run = trainer(
            "DPO", preference_runs.model(folder), TEXTS, precompute_ref_log_probs=known, **WHOLE
        )  # fmt: skip
        assert (run.rows[0].reference is not None) == known
        seen.append([row["loss"] for row in steps(run)])
    assert seen[0] == pytest.approx(seen[1], rel=1e-5) and seen[0][0] != seen[0][2]


def test_without_a_reference_rewards_are_the_log_probabilities(fresh):
    row, *_ = steps(trainer("DPO", fresh, TEXTS, reference_free=True, **WHOLE))
    assert row["rewards/chosen"] == pytest.approx(0.1 * row["logps/chosen"], rel=1e-5)
    assert row["logps/chosen"] < -10


@pytest.mark.slow
def test_rpo_alpha_is_a_weight_of_the_chosen_answers_cross_entropy(fresh):
    size = dict(per_device_train_batch_size=4, max_steps=1)
    (row,) = steps(trainer("DPO", fresh, TEXTS, rpo_alpha=0.5, **size))
    assert row["loss"] == pytest.approx(np.log(2) + 0.5 * row["nll_loss"], rel=1e-4)


def test_sparse_logs_hold_the_metrics_of_all_steps_between(base):
    seen = []
    for every in (1, 2):
        run = trainer(
            "KTO", preference_runs.fresh(base), JUDGED, **RUNS["kto"][2] | dict(logging_steps=every)
        )
        seen.append(steps(run))
    (one, two, *_), (both, *_) = seen
    # Of the first four answers two are as wanted, of the other four three.
    good = [sum(row["label"] for row in part) for part in (JUDGED[:4], JUDGED[4:])]
    wanted = np.average([one["logps/chosen"], two["logps/chosen"]], weights=good)
    assert both["logps/chosen"] == pytest.approx(wanted, rel=1e-5)
    sides = both["rewards/chosen"] - both["rewards/rejected"]
    assert both["rewards/margins"] == pytest.approx(sides)


SETTINGS = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=2, warmup_steps=2, max_steps=20,
    save_strategy="steps", save_steps=10, train_sampling_strategy="random",
)  # fmt: skip
PRELUDE = (
    child_process.PRELUDE
    + """
import test_preference_trainers as these

folder, output = map(Path, sys.argv[1:])
"""
)
KILLED = """
these.saving(folder, output / "whole").train()
run = these.saving(folder, output / "broken")
run.state.log_history = child_process.Deadly(13)
run.train()
"""
RESUMED = """
run = these.saving(folder, output / "broken")
assert run.train(resume_from_checkpoint=True).global_step == 20
"""


def saving(folder: Path, output: Path, seed: int = 0, **changes):
    """A run of the adapters that `seed` draws, which are its reference."""
    model = tiny_chat.adapted(folder, seed)
    return trainer("DPO", model, TEXTS, output_dir=str(output), **(SETTINGS | changes))


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A folder with a whole run of 20 steps and one that was killed and resumed."""
    output = tmp_path_factory.mktemp("runs")
    killed = child_process.run(PRELUDE + KILLED, folder, output)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (output / "broken" / "checkpoint_20").exists()
    resumed = child_process.run(PRELUDE + RESUMED, folder, output)
    assert resumed.returncode == 0, resumed.stderr
    return output


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_equals_a_whole_one_bitwise(runs, folder):
    model = saving(folder, runs / "unused").model
    like, states = start(model.adapters, make("adamw_torch", lambda n: n, max_grad_norm=1.0)), []
    for name in ("whole", "broken"):
        checkpoints = Checkpoints(runs / name)
        states.append(checkpoints.restore(like, 20).state)
        checkpoints.close()
    for one, other in zip(*map(jax.tree.leaves, states), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    rows = [json.loads(x) for x in (runs / "broken" / "metrics.jsonl").read_text().splitlines()]
    whole = [json.loads(x) for x in (runs / "whole" / "metrics.jsonl").read_text().splitlines()]
    named = ("step", "loss", "rewards/margins", "logps/rejected", "pairs")
    kept = lambda lines: [[line[name] for name in named] for line in lines]
    assert len(rows) == 20 and kept(rows) == kept(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, what",
    [
        (dict(seed=1), "reference"),
        (dict(beta=0.2), "loss"),
        (dict(train_sampling_strategy="sequential"), "train_sampling_strategy"),
        (dict(max_prompt_length=3), "data"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_reference_or_loss_is_refused(runs, folder, changes, what):
    run = saving(folder, runs / "broken", **changes)
    with pytest.raises(ValueError, match=f"belongs to another run, .*'{what}'"):
        run.train(resume_from_checkpoint=str(runs / "broken" / "checkpoint_10"))


def test_old_notebooks_lines_run(base):
    """Unsloth's DPO notebook: PatchDPOTrainer, settings of the loss beside the config."""
    unsloth_jax.PatchDPOTrainer()
    run = unsloth_jax.DPOTrainer(
        model=preference_runs.fresh(base),
        ref_model=None,
        args=unsloth_jax.DPOConfig(
            per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_ratio=0.1,
            num_train_epochs=3, learning_rate=5e-6, fp16=False, bf16=True, logging_steps=1,
            optim="adamw_8bit", weight_decay=0.0, lr_scheduler_type="linear", seed=42,
            report_to="none",
        ),
        beta=0.3,
        train_dataset=TALKS,
        tokenizer=base.tokenizer,
        max_length=48,
        max_prompt_length=24,
    )  # fmt: skip
    assert (run.args.beta, run.length, run.args.max_prompt_length) == (0.3, 48, 24)
    assert run.total_steps() == 3 and 'beta": 0.3' in run.objective.name


def test_the_trainers_are_named_where_unsloths_are():
    names = ["DPO", "ORPO", "CPO", "KTO"]
    for name in (f"{n}{what}" for n in names for what in ("Trainer", "Config")):
        assert name in dir(unsloth_jax) and getattr(unsloth_jax, name).__name__ == name
    assert FastLanguageModel is not None and unsloth_jax.PatchKTOTrainer() is None
