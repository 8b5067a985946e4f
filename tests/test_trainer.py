"""SFTConfig and SFTTrainer: how many steps, what is logged, what is left whatever ends a run."""

import json
import os
import signal

import jax
import jaxtyping
import numpy as np
import pytest
import tiny_chat
import torch
import transformers

from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer, train_on_responses_only
from workflows import sft

# One compiled program serves all runs with these: a constant rate does not know max_steps.
SAME = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-2,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64,
)  # fmt: skip
LONG = {"text": "one two three four five six seven eight nine ten " * 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def base(folder):
    """Loaded once; `fresh` gives it new adapters."""
    return tiny_chat.load(folder)[0]


@pytest.fixture
def fresh(base):
    base.adapters = None
    return FastLanguageModel.get_peft_model(base, r=4)


def trainer(model, rows=tiny_chat.MESSAGES, **changes) -> SFTTrainer:
    return SFTTrainer(model=model, train_dataset=rows, args=SFTConfig(**(SAME | changes)))


def same(one, other) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


class Acting(list):
    """A history that does something when a step's row arrives."""

    def __init__(self, step, act):
        super().__init__()
        self.step, self.act = step, act

    def append(self, row):
        super().append(row)
        if row["step"] == self.step:
            self.act()


def test_the_loss_falls_and_every_metric_is_in_the_file(fresh, tmp_path):
    run = trainer(fresh, max_steps=12, output_dir=str(tmp_path))
    done = run.train()
    losses = [row["loss"] for row in run.log_history]
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == run.log_history and [row["step"] for row in lines] == [*range(1, 13)]
    assert done.global_step == 12 and done.training_loss == pytest.approx(np.mean(losses))
    assert done.metrics["train_loss"] == done.training_loss and done.metrics["train_runtime"] > 0
    assert [row["epoch"] for row in lines[:4]] == [0.25, 0.5, 0.75, 1.0]
    assert {row["learning_rate"] for row in lines} == {np.float32(2e-2)}


def test_a_run_of_epochs_takes_its_steps_and_a_second_run_goes_on(fresh):
    first = trainer(fresh, tiny_chat.MESSAGES[:7], num_train_epochs=2)
    assert first.train().global_step == 8
    middle = fresh.adapters
    second = trainer(fresh, tiny_chat.MESSAGES[:7], max_steps=2)
    second.train()
    assert second.log_history[0]["loss"] < 0.7 * first.log_history[0]["loss"]
    assert not same(middle, fresh.adapters)


def test_sparse_logs_hold_the_mean_of_the_steps_between(base):
    histories = []
    for every in (1, 3):
        base.adapters = None
        FastLanguageModel.get_peft_model(base, r=4)
        run = trainer(base, max_steps=7, logging_steps=every)
        done = run.train()
        histories.append(([row["loss"] for row in run.log_history], done))
    (each, whole), (sparse, fewer) = histories
    assert sparse == pytest.approx([np.mean(each[:3]), np.mean(each[3:6]), each[6]])
    assert fewer.training_loss == pytest.approx(whole.training_loss)


COUNTS = [
    dict(rows=7, batch=2, accumulation=2, epochs=1.5),
    dict(rows=8, batch=2, accumulation=1, epochs=2),
    dict(rows=5, batch=4, accumulation=3, epochs=3),
    dict(rows=8, batch=3, accumulation=1, epochs=0.5),
]


class Line(torch.nn.Module):
    """The smallest model that transformers' Trainer trains."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"loss": (self.w * x).mean()}


@pytest.mark.parametrize("case", COUNTS, ids=str)
def test_epochs_are_as_many_steps_as_in_transformers(fresh, tmp_path, case):
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=case["batch"], use_cpu=True,
        gradient_accumulation_steps=case["accumulation"], num_train_epochs=case["epochs"],
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data = [{"x": torch.ones(1)}] * case["rows"]
    theirs = transformers.Trainer(Line(), args, train_dataset=data).train().global_step
    ours = trainer(
        fresh, tiny_chat.MESSAGES[: case["rows"]], num_train_epochs=case["epochs"],
        per_device_train_batch_size=case["batch"],
        gradient_accumulation_steps=case["accumulation"],
    )  # fmt: skip
    assert ours.total_steps() == theirs


@pytest.mark.parametrize("given", [0, 5, 0.1, 0.03, 12])
@pytest.mark.parametrize("total", [10, 33, 60])
def test_warm_up_steps_and_shares_are_those_of_transformers(tmp_path, given, total):
    args = transformers.TrainingArguments(str(tmp_path), warmup_steps=given)
    assert SFTConfig(warmup_steps=given).warmup(total) == args.get_warmup_steps(total)


def test_warm_up_is_a_tenth_unless_steps_or_a_ratio_are_given():
    assert SFTConfig().warmup(60) == 6
    assert SFTConfig(warmup_ratio=0.25).warmup(60) == 15
    assert SFTConfig(warmup_steps=0).warmup(60) == 0
    assert SFTConfig(warmup_steps=5, warmup_ratio=0.5).warmup(60) == 5


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C, which a shell's background jobs start without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_the_adapters_of_the_last_step(fresh, ctrl_c):
    start = fresh.adapters
    trainer(fresh, max_steps=3).train()
    three = fresh.adapters
    fresh.adapters = start
    run = trainer(fresh, max_steps=9)
    run.log_history = Acting(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert len(run.log_history) == 3 and same(fresh.adapters, three)


def test_ctrl_c_waits_for_the_end_of_a_step(ctrl_c):
    ended = []
    with pytest.raises(KeyboardInterrupt), sft.uninterrupted():
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(sum(range(1000)))
    assert ended
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_finite_state(fresh):
    start, head = fresh.adapters, fresh.params["lm_head"]
    trainer(fresh, max_steps=2).train()
    two, sound = fresh.adapters, head["weight"]
    fresh.adapters = start
    run = trainer(fresh, max_steps=5)
    run.log_history = Acting(2, lambda: head.update(weight=sound * np.nan))
    with pytest.raises(FloatingPointError, match="step 3: loss nan .* is not finite"):
        run.train()
    head.update(weight=sound)
    assert [row["step"] for row in run.log_history] == [1, 2] and same(fresh.adapters, two)


def test_packed_rows_give_the_same_loss(fresh):
    start, rows, seen = fresh.adapters, tiny_chat.TEXTS[3:5], []
    for packing in (False, True):
        fresh.adapters = start
        run = trainer(fresh, rows, max_steps=1, packing=packing)
        assert [len(b) for b in run._batches().bins(0)] == ([2] if packing else [1, 1])
        run.train()
        seen.append(run.log_history[0])
    for name in ("loss", "grad_norm", "supervised_tokens"):
        assert seen[0][name] == pytest.approx(seen[1][name], rel=1e-5), name


def test_a_long_row_is_refused_by_its_index_and_cut_when_asked(fresh):
    rows = [*tiny_chat.TEXTS, LONG]
    with pytest.raises(ValueError, match="row 8: .*more than max_length=64"):
        trainer(fresh, rows)
    cut = trainer(fresh, rows, truncation=True)
    assert len(cut.rows[8].tokens) == 64


def test_a_row_without_supervised_tokens_is_named(fresh):
    blind = {"input_ids": [3, 4, 5], "labels": [-100, -100, -100]}
    with pytest.raises(ValueError, match="row 1: no supervised token"):
        trainer(fresh, [{"input_ids": [3, 4, 5]}, blind])
    plain = trainer(fresh, [*tiny_chat.MESSAGES, {"input_ids": [3, 4, 5]}])
    with pytest.raises(ValueError, match="row 8: no supervised token"):
        train_on_responses_only(plain)


def test_responses_only_leaves_the_answers(fresh):
    run = train_on_responses_only(trainer(fresh))
    tokenizer, row = fresh.tokenizer, run.rows[0]
    learnt = [t for t, on in zip(row.tokens, row.mask, strict=True) if on]
    assert tokenizer.decode(learnt) == "The capital of France is Paris.<|im_end|>"


def test_an_adapter_with_dropout_is_not_trained_without_it(fresh):
    fresh.peft = fresh.peft._replace(dropout=0.05)
    with pytest.raises(ValueError, match="lora_dropout=0.05.*not supported yet"):
        SFTTrainer(fresh, train_dataset=[LONG])


def test_a_trainer_needs_adapters_and_data(base):
    base.adapters = None
    with pytest.raises(ValueError, match="no adapters; call FastLanguageModel.get_peft_model"):
        trainer(base)
    with pytest.raises(ValueError, match="needs a train_dataset"):
        trainer(FastLanguageModel.get_peft_model(base, r=4), None)


def test_adapters_that_hold_nothing_are_not_trained(fresh):
    fresh.adapters = {}
    with pytest.raises(ValueError, match="adapters are empty: target_modules=.*q_proj"):
        trainer(fresh)


@pytest.mark.parametrize("layer", [1.5, "1", True])
def test_layers_that_are_no_integers_get_no_adapters(base, layer):
    base.adapters = None
    with pytest.raises(TypeError):
        FastLanguageModel.get_peft_model(base, r=4, layers_to_transform=[layer])
    assert base.adapters is None


def test_the_hashes_of_the_adapters_are_printed_around_a_run(fresh, capsys):
    before = sft.short_hash(fresh.adapters)
    trainer(fresh, max_steps=1).train()
    after = sft.short_hash(fresh.adapters)
    assert f"adapters sha256 {before} before, {after} after\n" in capsys.readouterr().out
    assert before != after and len(after) == 12


def test_old_keywords_of_the_trainer_stand_above_the_config_and_leave_it_alone(fresh):
    args = SFTConfig(**SAME)
    run = SFTTrainer(
        model=fresh, tokenizer=fresh.tokenizer, train_dataset=[{"body": "one two"}], args=args,
        dataset_text_field="body", max_seq_length=32, packing=True, dataset_num_proc=2,
    )  # fmt: skip
    assert (run.args.packing, run.length, args.packing, args.max_seq_length) == (
        True, 32, False, None,
    )  # fmt: skip


def test_models_of_two_families_train_in_one_process(fresh, tmp_path):
    alone = trainer(fresh, max_steps=1)
    alone.train()
    other, _ = tiny_chat.load(tiny_chat.save(tmp_path / "qwen2", "Qwen2"))
    FastLanguageModel.get_peft_model(other, r=4)
    run = trainer(other, max_steps=6)
    run.train()
    assert run.log_history[-1]["loss"] < run.log_history[0]["loss"]
    fresh.adapters = None
    again = trainer(FastLanguageModel.get_peft_model(fresh, r=4), max_steps=1)
    again.train()
    assert again.log_history[0]["loss"] == alone.log_history[0]["loss"]


WRONG_KIND = dict(
    packing="False", max_steps=2.5, learning_rate="2e-4", per_device_train_batch_size=2.5,
    seed=None, save_steps=True, lr_scheduler_type=3, num_train_epochs="3",
)  # fmt: skip
OUT_OF_RANGE = dict(warmup_ratio=3, adam_beta1=2, max_length=0, weight_decay=-1, save_total_limit=0)


@pytest.mark.parametrize("name", WRONG_KIND)
def test_a_value_of_another_kind_is_refused_by_name(name):
    with pytest.raises(TypeError, match=f"SFTConfig: {name} must be"):
        SFTConfig(**{name: WRONG_KIND[name]})


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"SFTConfig: {name} must be"):
        SFTConfig(**{name: OUT_OF_RANGE[name]})


def test_no_clipping_is_none_or_zero():
    assert SFTConfig(max_grad_norm=None).max_grad_norm is None
    assert SFTConfig(max_grad_norm=0).max_grad_norm == 0


def test_an_empty_data_set_and_a_dictionary_for_a_config_are_refused(fresh):
    with pytest.raises(ValueError, match="data set is empty"):
        SFTTrainer(fresh, train_dataset=[])
    with pytest.raises((TypeError, jaxtyping.TypeCheckError), match="args"):
        SFTTrainer(fresh, train_dataset=[LONG], args={"max_steps": 1})
