"""SFTConfig and SFTTrainer: how many steps, what is logged, what is left whatever ends a run."""

import inspect
import json
import math
import os
import signal

import jax
import jaxtyping
import numpy as np
import pytest
import tiny_chat
import torch
import transformers

from unsloth_jax import (
    FastLanguageModel,
    SFTConfig,
    SFTTrainer,
    get_chat_template,
    train_on_responses_only,
)
from workflows import progress
from workflows.interrupts import uninterrupted
from workflows.run import short_hash
from workflows.trainer import Trainer

# One compiled program serves all runs with these: a constant rate does not know max_steps.
SAME = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-2,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64,
)  # fmt: skip
LONG = {"text": "one two three four five six seven eight nine ten " * 20}


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
    run.state.log_history = Acting(3, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert len(run.log_history) == 3 and same(fresh.adapters, three)


def test_ctrl_c_waits_for_the_end_of_a_step(ctrl_c):
    ended = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
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
    run.state.log_history = Acting(2, lambda: head.update(weight=sound * np.nan))
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
    with pytest.raises(ValueError, match="draws no dropout, but .* lora_dropout=0.05"):
        Trainer(fresh, SFTConfig(**SAME), fresh.tokenizer, [LONG], None, None)


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
    before = short_hash(fresh.adapters)
    trainer(fresh, max_steps=1).train()
    after = short_hash(fresh.adapters)
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
OUT_OF_RANGE = dict(
    warmup_ratio=3, adam_beta1=2, max_length=0, weight_decay=-1, save_total_limit=0,
    learning_rate=math.inf, num_train_epochs=math.inf, warmup_steps=math.nan, adam_epsilon=0,
    max_steps=2**31, output_dir="", dataset_text_field=" ",
)  # fmt: skip


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


def test_two_names_of_one_limit_may_not_differ():
    with pytest.raises(ValueError, match="max_seq_length=7 and max_length=5 name the same limit"):
        SFTConfig(max_seq_length=7, max_length=5)
    assert SFTConfig(max_seq_length=7, max_length=7).max_length == 7


OLD_STYLE = [
    (dict(packing="no"), TypeError, "packing must be bool, got 'no'"),
    (dict(packing=1), TypeError, "packing must be bool, got 1"),
    (dict(max_seq_length=-5), ValueError, "max_seq_length must be at least 1, got -5"),
    (dict(max_seq_length=0), ValueError, "max_seq_length must be at least 1, got 0"),
    (dict(max_seq_length="64"), TypeError, "max_seq_length must be int | None, got '64'"),
    (dict(max_seq_length=2.5), TypeError, "max_seq_length must be int | None, got 2.5"),
    (dict(dataset_text_field=5), TypeError, "dataset_text_field must be str, got 5"),
    (dict(dataset_text_field=""), ValueError, "dataset_text_field must be a text that names"),
]


@pytest.mark.parametrize("given, error, message", OLD_STYLE, ids=str)
def test_the_trainers_own_keywords_are_checked_like_the_configs(fresh, given, error, message):
    with pytest.raises(error) as found:
        SFTTrainer(fresh, train_dataset=tiny_chat.TEXTS, **given)
    assert str(found.value).startswith(f"SFTTrainer: {message}")


def test_a_keyword_that_is_none_leaves_the_configs_and_one_that_differs_is_said(fresh, capsys):
    args = SFTConfig(max_seq_length=48, **SAME | {"max_length": None})
    none = dict(max_seq_length=None, packing=None, dataset_text_field=None)
    run = SFTTrainer(fresh, train_dataset=tiny_chat.TEXTS, args=args, **none)
    assert run.args == args and "replaces" not in capsys.readouterr().out
    run = SFTTrainer(fresh, train_dataset=tiny_chat.TEXTS, args=args, max_seq_length=40)
    assert run.length == 40
    assert "SFTTrainer(max_seq_length=40) replaces SFTConfig's 48" in capsys.readouterr().out


SLIPS = [
    (dict(model=None), "model must be Model, got None"),
    (dict(model=("model", object())), "model must be Model, got a tuple of str, object"),
    (dict(args={"max_steps": 1}), "args must be .*SFTConfig.*, got a value of dict"),
    (dict(args=SFTConfig), "args must be .*SFTConfig.*, got <class"),
    (dict(tokenizer="x"), "tokenizer must be .*PreTrainedTokenizerBase.*, got 'x'"),
    (dict(processing_class=5), "processing_class must be .*PreTrainedTokenizerBase.*, got 5"),
    (dict(train_dataset=5), "train_dataset must be .*Iterable.*, got 5"),
    (dict(formatting_func="x"), "formatting_func must be .*Callable.*, got 'x'"),
]


def unchecked(function):
    """A function without the tests' own checks of annotations, which users don't have."""
    return inspect.unwrap(function)


@pytest.mark.parametrize("given, message", SLIPS)
def test_what_a_trainer_cannot_take_is_refused_by_its_keyword(fresh, given, message):
    made = dict(model=fresh, train_dataset=tiny_chat.TEXTS) | given
    with pytest.raises(TypeError, match=f"SFTTrainer: {message}"):
        unchecked(SFTTrainer.__init__)(object.__new__(SFTTrainer), **made)


def test_two_tokenizers_that_differ_are_refused(fresh):
    both = dict(tokenizer=fresh.tokenizer, processing_class=fresh.tokenizer)
    assert SFTTrainer(fresh, train_dataset=tiny_chat.TEXTS, **both).tokenizer is fresh.tokenizer
    both["tokenizer"] = transformers.AutoTokenizer.from_pretrained(fresh.tokenizer_folder)
    with pytest.raises(ValueError, match="tokenizer or processing_class, got two that differ"):
        SFTTrainer(fresh, train_dataset=tiny_chat.TEXTS, **both)


@pytest.mark.parametrize(
    "given", [dict(trainer=None), dict(instruction_part=5), dict(last_response_only="yes")], ids=str
)
def test_what_responses_only_cannot_take_is_refused(fresh, given):
    (name,) = given
    with pytest.raises(TypeError, match=f"train_on_responses_only: {name} must be .*, got"):
        unchecked(train_on_responses_only)(**{"trainer": trainer(fresh)} | given)


@pytest.mark.parametrize("resume, error", [(5, TypeError), ([], TypeError), ("", ValueError)])
def test_what_no_run_is_resumed_from_is_refused(fresh, resume, error):
    run = trainer(fresh, max_steps=1)
    with pytest.raises(error, match="train: resume_from_checkpoint must be .*, got"):
        unchecked(SFTTrainer.train)(run, resume)


def test_an_output_dir_that_is_a_file_is_refused_before_the_run(fresh, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="output_dir='.*out' is a file, expected a folder"):
        trainer(fresh, max_steps=1, output_dir=str(tmp_path / "out")).train()
    assert (tmp_path / "out").read_text() == "mine"


def steps_in(file) -> list[int]:
    return [json.loads(line)["step"] for line in file.read_text().splitlines()]


def test_a_new_run_moves_the_log_of_an_earlier_one_aside(fresh, tmp_path, capsys):
    run = trainer(fresh, max_steps=3, output_dir=str(tmp_path))
    kept = []
    for steps in (3, 2, 1):
        run.args.max_steps = steps
        run.train()
        kept.append((tmp_path / "metrics.jsonl").read_bytes())
    assert steps_in(tmp_path / "metrics.jsonl") == [1]
    older = [tmp_path / f"metrics.{n}.jsonl" for n in (1, 2)]
    assert [file.read_bytes() for file in older] == kept[:2]
    names = ("metrics{}.jsonl", "report{}.html", "run{}.json")
    there = {name.format(n) for name in names for n in ("", ".1", ".2")}
    assert {path.name for path in tmp_path.iterdir()} == there
    said = capsys.readouterr().out
    assert "the log of an earlier run in" in said and "is now metrics.2.jsonl" in said


def test_a_run_without_checkpoints_does_not_mix_with_those_of_an_earlier_one(fresh, tmp_path):
    kept = dict(max_steps=2, output_dir=str(tmp_path))
    trainer(fresh, save_strategy="steps", save_steps=1, **kept).train()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="checkpoint 2 of an earlier run: continue it"):
        trainer(fresh, **kept).train()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_run_resumed_into_another_folder_leaves_that_folders_log_whole(fresh, tmp_path):
    saved = dict(max_steps=2, save_strategy="steps", save_steps=1)
    trainer(fresh, output_dir=str(tmp_path / "a"), **saved).train()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "metrics.jsonl").write_text('{"step": 1, "loss": 7}\n')
    run = trainer(fresh, output_dir=str(tmp_path / "b"), max_steps=2)
    run.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint_1"))
    assert steps_in(tmp_path / "b" / "metrics.jsonl") == [2]
    assert (tmp_path / "b" / "metrics.1.jsonl").read_text() == '{"step": 1, "loss": 7}\n'


@pytest.mark.parametrize("text", ['{"step": 1}\nnotes\n{"step": 2}\n', '{"loss": 1}\n', "[1]\n{}"])
def test_a_continued_file_that_is_no_log_is_named_and_left_alone(tmp_path, text):
    file = tmp_path / "metrics.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match="metrics.jsonl is not the log of a run.*another output"):
        with progress.bar(3, file, 1):
            pass
    assert file.read_text() == text


def test_a_last_line_that_was_cut_short_is_written_anew(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"st')
    with progress.bar(3, file, 2):
        pass
    assert steps_in(file) == [1, 2]


def test_exports_hold_the_template_that_was_trained_with(folder, tmp_path):
    model, tokenizer = tiny_chat.load(folder)
    FastLanguageModel.get_peft_model(model, r=4)
    own = get_chat_template(tokenizer, "chatml")
    rows, args = tiny_chat.MESSAGES, SFTConfig(**(SAME | {"max_steps": 1}))
    SFTTrainer(model=model, tokenizer=own, train_dataset=rows, args=args).train()
    model.save_pretrained(tmp_path / "a")
    again, _ = FastLanguageModel.from_pretrained(str(tmp_path / "a"), 256, load_in_4bit=False)
    assert again.tokenizer.chat_template == own.chat_template != tokenizer.chat_template


def test_a_schedule_takes_transformers_settings(fresh):
    steps = dict(max_steps=6, warmup_steps=2, lr_scheduler_type="cosine_with_min_lr")
    run = trainer(fresh, **steps, lr_scheduler_kwargs={"min_lr_rate": 0.1})
    run.train()
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2e-2)
    theirs = transformers.get_scheduler(
        "cosine_with_min_lr", optimizer, 2, 6, scheduler_specific_kwargs={"min_lr_rate": 0.1}
    )
    expected = []
    for _ in range(6):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    rates = [row["learning_rate"] for row in run.log_history]
    assert rates == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="min_lr_rat"):
        SFTConfig(**steps, lr_scheduler_kwargs={"min_lr_rat": 0.1})
