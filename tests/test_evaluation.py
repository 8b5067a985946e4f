"""Evaluation during and after a run: its loss, when it happens, what follows from it."""

import json
import math

import jax
import pytest
import tiny_chat
import torch
import transformers

from unsloth_jax import SFTConfig, SFTTrainer, train_on_responses_only
from workflows import evaluate
from workflows.run import short_hash

SAME = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-2,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64,
)  # fmt: skip
HELD_OUT = tiny_chat.MESSAGES[:3]


def trainer(model, held_out=HELD_OUT, callbacks=None, **changes) -> SFTTrainer:
    return SFTTrainer(
        model=model, train_dataset=tiny_chat.MESSAGES, eval_dataset=held_out,
        callbacks=callbacks, args=SFTConfig(**(SAME | changes)),
    )  # fmt: skip


def evaluations(run) -> list[dict]:
    return [row for row in run.log_history if "eval_loss" in row]


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def test_the_loss_is_that_of_transformers_over_all_supervised_tokens(folder, fresh):
    run = trainer(fresh)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    value, count = 0.0, 0
    for row in run.eval_rows[""]:
        with torch.no_grad():
            scores = reference(torch.tensor([row.tokens])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(
            scores, torch.tensor(row.tokens[1:]), reduction="none"
        )
        on = torch.tensor(row.mask[1:])
        value, count = value + float((losses * on).sum()), count + int(on.sum())
    found = run.evaluate()
    assert found["eval_loss"] == pytest.approx(value / count, rel=2e-4)
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert found["eval_supervised_tokens"] == count


@pytest.mark.parametrize("how", [{"per_device_eval_batch_size": 1}, {"eval_packing": True}])
def test_batches_and_packing_leave_the_loss_as_it_is(fresh, how):
    plain, other = (trainer(fresh, **kind).evaluate() for kind in ({}, how))
    assert other["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)


def test_sets_by_name_have_metrics_of_their_own(fresh):
    both = {"first": tiny_chat.MESSAGES[:2], "rest": tiny_chat.MESSAGES[2:]}
    run = trainer(fresh, both)
    found, whole = run.evaluate(), run.evaluate(tiny_chat.MESSAGES)
    parts = [(found[f"eval_{n}_loss"], found[f"eval_{n}_supervised_tokens"]) for n in both]
    mean = sum(loss * count for loss, count in parts) / sum(count for _, count in parts)
    assert mean == pytest.approx(whole["eval_loss"], rel=1e-5)
    named = run.evaluate(HELD_OUT, metric_key_prefix="test")
    assert all(name.startswith("test_") for name in named)


def test_evaluations_change_nothing_of_the_training(fresh):
    start = fresh.adapters
    trainer(fresh, None, max_steps=4).train()
    without, fresh.adapters = fresh.adapters, start
    run = trainer(fresh, max_steps=4, eval_strategy="steps", eval_steps=1)
    run.train()
    assert same(fresh.adapters, without) and len(evaluations(run)) == 4


@pytest.mark.parametrize(
    "given, steps",
    [
        ({"eval_steps": 0.5}, [4, 8]),  # as without eval_strategy, but rarer
        ({"eval_strategy": "epoch", "eval_on_start": True}, [0, 4, 8]),
    ],
)
def test_evaluations_happen_when_they_are_asked_for(fresh, tmp_path, given, steps):
    run = trainer(fresh, max_steps=8, output_dir=str(tmp_path / "out"), **given)
    run.train()
    assert [row["step"] for row in evaluations(run)] == steps
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.log_history == run.state.log_history


@pytest.mark.parametrize(
    "given, every",
    [({}, 0.1), ({"eval_strategy": "steps", "logging_steps": 2}, 2), ({"eval_steps": 3}, 3)],
)
def test_without_a_number_evaluation_follows_unsloth_and_transformers(fresh, given, every):
    run = trainer(fresh, **given)
    assert (run.args.eval_strategy, run.args.eval_steps) == ("steps", every)


def test_the_best_adapters_are_those_of_the_lowest_loss(fresh):
    run = trainer(
        fresh, max_steps=3, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        learning_rate=0.5,
    )  # fmt: skip
    run.train()
    found = {row["step"]: row["eval_loss"] for row in evaluations(run)}
    best = min(found, key=found.get)
    assert run.state.best_global_step == best < 3 and run.state.best_metric == found[best]
    assert run.evaluate()["eval_loss"] == pytest.approx(found[best], rel=1e-6)


def test_transformers_early_stopping_ends_the_run(fresh):
    stop = transformers.EarlyStoppingCallback(early_stopping_patience=2)
    run = trainer(
        fresh, HELD_OUT, [stop], max_steps=12, eval_strategy="steps", eval_steps=1,
        metric_for_best_model="eval_loss", learning_rate=0.5,
    )  # fmt: skip
    done = run.train()
    losses = [row["eval_loss"] for row in evaluations(run)]
    assert done.global_step == len(losses) < 12
    assert min(losses[:-2]) <= min(losses[-2:])


class Steps(transformers.TrainerCallback):
    """Notes what transformers' own callbacks get."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **more):
        self.seen.append((state.global_step, state.max_steps, args.learning_rate))

    def on_log(self, args, state, control, logs=None, **more):
        self.seen.append(("log", logs["loss"]))


class Asking:
    """Asks for a checkpoint, an evaluation and the end, by no class of transformers'."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, **more):
        self.seen.append(state.global_step)
        control.should_save = state.global_step == 1
        control.should_evaluate = state.global_step == 2
        control.should_training_stop = state.global_step == 3

    def on_save(self, args, state, control, **more):
        self.seen.append(f"save {state.global_step}")

    def on_train_end(self, args, state, control, **more):
        self.seen.append("end")


def test_callbacks_are_called_in_order_and_may_ask_for_evaluation_or_the_end(fresh, tmp_path):
    steps = Steps()
    asks = Asking()
    run = trainer(
        fresh, HELD_OUT, [asks, steps], max_steps=8, eval_strategy="steps", eval_steps=100,
        output_dir=str(tmp_path / "out"), save_strategy="steps", save_steps=100,
    )  # fmt: skip
    done = run.train()
    assert done.global_step == 3 and asks.seen == [1, "save 1", 2, 3, "save 3", "end"]
    assert [row["step"] for row in evaluations(run)] == [2]
    assert [one[0] for one in steps.seen] == ["log", 1, "log", 2, "log", 3]
    saved = {path.name for path in (tmp_path / "out").glob("checkpoint_*")}
    assert saved == {"checkpoint_1", "checkpoint_3"}


class Events:
    """Notes every event with the step that it comes after."""

    def __init__(self):
        self.seen = []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return object.__getattribute__(self, name)
        return lambda args, state, control, **more: self.seen.append((name, state.global_step))


def test_every_event_comes_in_its_place(fresh):
    events = Events()
    run = trainer(fresh, HELD_OUT, [events], max_steps=5, eval_strategy="steps", eval_steps=5)
    run.train()
    step = lambda n: [("on_step_begin", n - 1), ("on_log", n), ("on_step_end", n)]
    expected = [("on_init_end", 0), ("on_train_begin", 0), ("on_epoch_begin", 0)]
    expected += [event for n in (1, 2, 3, 4) for event in step(n)]
    expected += [("on_epoch_end", 4), ("on_epoch_begin", 4), *step(5)]
    assert events.seen == [*expected, ("on_evaluate", 5), ("on_train_end", 5)]


@pytest.mark.parametrize("name", ["should_epoch_stop", "should_log"])
def test_what_a_callback_cannot_ask_for_is_said(fresh, name):
    class Asks:
        def on_train_begin(self, args, state, control, **more):
            setattr(control, name, True)

    with pytest.raises(ValueError, match=f"a callback set {name}, which a run here can't do"):
        trainer(fresh, None, [Asks], max_steps=1).train()


class Answering:
    def on_init_end(self, *given, **more):
        return True


def test_what_is_no_callback_is_refused(fresh):
    class Inner(transformers.TrainerCallback):
        def on_substep_end(self, args, state, control, **more): ...

    for given, error, message in [
        ("on_log", TypeError, "a list of callbacks, got str"),
        ([object()], TypeError, "no method of an event; known"),
        ([Inner], ValueError, r"listens to \['on_substep_end'\]"),
        ([Answering], TypeError, "Answering.on_init_end returned bool, expected the control"),
    ]:
        with pytest.raises(error, match=message):
            trainer(fresh, HELD_OUT, given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"eval_strategy": "steps"}, "need an eval_dataset"),
        ({"load_best_model_at_end": True}, "need an eval_dataset"),
        ({"eval_strategy": "often"}, "eval_strategy 'often' is not supported"),
        ({"eval_steps": 0}, "eval_steps must be"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be"),
    ],
)
def test_evaluation_settings_that_cannot_be_are_refused(fresh, given, message):
    with pytest.raises(ValueError, match=message):
        trainer(fresh, None, **given)


def test_a_metric_that_no_evaluation_will_give_is_named_before_the_run(fresh):
    two = {"a": HELD_OUT[:1], "b": HELD_OUT[1:]}
    with pytest.raises(ValueError, match=r"'accuracy' is none of \['eval_loss', 'eval_perp"):
        trainer(fresh, metric_for_best_model="accuracy")
    with pytest.raises(ValueError, match=r"'loss' is none of \['eval_a_loss', .*'eval_b_loss', "):
        trainer(fresh, two, load_best_model_at_end=True)
    with pytest.raises(ValueError, match=r"'eval_perplexity' is none of \['eval_loss'\]"):
        trainer(fresh, metric_for_best_model="eval_perplexity", label_smoothing_factor=0.1)
    trainer(fresh, two, metric_for_best_model="b_loss")


def test_nothing_to_evaluate_on_is_said(fresh):
    with pytest.raises(ValueError, match="no eval_dataset and none was given"):
        trainer(fresh, None).evaluate()
    with pytest.raises(ValueError, match="empty dictionary"):
        trainer(fresh, {})


def test_responses_only_masks_the_held_out_rows_too(fresh):
    run = trainer(fresh)
    before = sum(sum(row.mask) for row in run.eval_rows[""])
    train_on_responses_only(run)
    after = sum(sum(row.mask) for row in run.eval_rows[""])
    assert 0 < after < before
    assert run.evaluate()["eval_supervised_tokens"] == after


def test_the_trainers_data_set_shows_ids_and_labels(fresh):
    run = train_on_responses_only(trainer(fresh))
    row, kept = run.train_dataset[1], run.rows[1]
    assert row["input_ids"] == kept.tokens and len(run.train_dataset) == len(run.rows)
    learnt = [token for token in row["labels"] if token != -100]
    assert learnt == [t for t, on in zip(kept.tokens, kept.mask, strict=True) if on]
    answer = tiny_chat.MESSAGES[1]["messages"][-1]["content"]
    assert answer in run.tokenizer.decode(learnt)


def test_three_hundred_evaluations_compile_once_and_keep_nothing(fresh):
    run = trainer(fresh)
    evaluator = run._evaluator(run.eval_rows)
    first = evaluator(fresh.adapters)
    held, before = len(jax.live_arrays()), resident()
    losses = {evaluator(fresh.adapters)["eval_loss"] for _ in range(300)}
    assert losses == {first["eval_loss"]} and len(jax.live_arrays()) <= held
    assert resident() - before < 16 * 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


@pytest.mark.parametrize("given, total, every", [(0.1, 100, 10), (0.1, 7, 1), (3, 7, 3)])
def test_a_share_of_all_steps_is_rounded_up(given, total, every):
    assert evaluate.interval(given, total) == every
    due = [step for step in range(1, 8) if evaluate.due("steps", every, step, step / 4)]
    assert due == [*range(every, 8, every)]


class Broken:
    """Ends a run as a crash would, after a step that was saved."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **more):
        if state.global_step == self.step:
            raise OSError("crash")


def test_best_adapters_and_patience_of_a_resumed_run_are_those_of_a_whole_one(fresh, tmp_path):
    start, found = fresh.adapters, []
    much = dict(
        max_steps=12, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, save_strategy="steps",
        save_steps=2, learning_rate=2e-3,
    )  # fmt: skip
    for name, crash in (("whole", None), ("broken", 3)):
        fresh.adapters = start
        patience = lambda: transformers.EarlyStoppingCallback(early_stopping_patience=4)
        output = str(tmp_path / name)
        if crash is not None:
            broken = trainer(
                fresh, HELD_OUT, [patience(), Broken(crash)], output_dir=output, **much
            )
            with pytest.raises(OSError, match="crash"):
                broken.train()
        run = trainer(fresh, HELD_OUT, [patience()], output_dir=output, **much)
        done = run.train(resume_from_checkpoint=crash is not None)
        s = run.state
        found.append(
            (done.global_step, s.best_metric, s.best_global_step, short_hash(fresh.adapters))
        )
    assert found[0] == found[1]
    assert found[0][0] < 12 and found[0][2] <= 2  # best and counted before the crash


def test_the_mean_loss_of_a_row_spans_a_crash(fresh, tmp_path):
    start, rows = fresh.adapters, []
    much = dict(max_steps=6, logging_steps=3, save_strategy="steps", save_steps=2)
    for crash in (None, 3, 5):
        fresh.adapters = start
        output = str(tmp_path / str(crash))
        if crash is not None:
            with pytest.raises(OSError, match="crash"):
                trainer(fresh, None, [Broken(crash)], output_dir=output, **much).train()
        run = trainer(fresh, None, output_dir=output, **much)
        run.train(resume_from_checkpoint=crash is not None)
        lines = [json.loads(line) for line in open(tmp_path / str(crash) / "metrics.jsonl")]
        rows.append([(row["step"], row["loss"]) for row in lines])
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 2


@pytest.mark.parametrize("greater", [True, False])
def test_a_metric_that_is_no_number_is_never_best(greater):
    best = None
    for step, metric in enumerate([math.nan, 0.5, math.nan, 0.5]):
        best = evaluate.better(best, metric, step, {}, greater)
    assert (best.step, best.metric) == (1, 0.5)
