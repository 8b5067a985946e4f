"""compute_metrics as transformers calls it, on the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_chat
import torch
import transformers

from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
from workflows import user_metrics
from workflows.rows import Shown

SAME = dict(
    per_device_train_batch_size=2, per_device_eval_batch_size=2, gradient_accumulation_steps=1,
    learning_rate=2e-2, lr_scheduler_type="constant", optim="adamw_torch", max_length=64,
)  # fmt: skip
HELD_OUT = [*tiny_chat.MESSAGES[:2], {"text": "one two three four " * 10}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("model"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def model(folder):
    return FastLanguageModel.get_peft_model(tiny_chat.load(folder)[0], r=4)


def trainer(model, compute, reduce=None, held_out=HELD_OUT, **changes) -> SFTTrainer:
    return SFTTrainer(
        model=model, train_dataset=tiny_chat.MESSAGES, eval_dataset=held_out,
        compute_metrics=compute, preprocess_logits_for_metrics=reduce,
        args=SFTConfig(**(SAME | changes)),
    )  # fmt: skip


def accuracy(found) -> dict:
    """Share of tokens whose likeliest guess is right; for logits and for guesses alike."""
    predictions, labels = found
    guesses = predictions if predictions.ndim == 2 else predictions.argmax(-1)
    on = labels[:, 1:] != -100
    return {"accuracy": (guesses[:, :-1] == labels[:, 1:])[on].mean(), "count": on.sum()}


class Kept(list):
    def __call__(self, found):
        self.append(found)
        return accuracy(found)


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def padded(rows: list[dict]) -> dict:
    width = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {k: torch.tensor([[*row[k], *[pad] * (width - len(row[k]))] for row in rows])
            for k, pad in fill.items()}  # fmt: skip


@pytest.mark.parametrize("reduced", [False, True])
def test_predictions_and_metrics_are_those_of_transformers(folder, model, tmp_path, reduced):
    ours, others = Kept(), Kept()
    run = trainer(model, ours, (lambda logits, labels: logits.argmax(-1)) if reduced else None)
    found = run.evaluate()
    args = transformers.TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, use_cpu=True, report_to=[], disable_tqdm=True
    )
    rows = [dict(row) for row in Shown(run.eval_rows[""])]
    theirs = transformers.Trainer(
        tiny_chat.reference(folder), args, eval_dataset=Rows(rows), data_collator=padded,
        compute_metrics=others,
        preprocess_logits_for_metrics=(lambda x, y: x.argmax(-1)) if reduced else None,
    ).evaluate()  # fmt: skip
    assert found["eval_accuracy"] == pytest.approx(theirs["eval_accuracy"], abs=0.02)
    assert found["eval_count"] == theirs["eval_count"] > 20
    (one,), (other,) = ours, others
    width = other.label_ids.shape[1]
    np.testing.assert_array_equal(one.label_ids[:, :width], other.label_ids)
    assert (one.label_ids[:, width:] == -100).all() and len(one.predictions) == 3
    if not reduced:
        assert one.predictions.dtype == np.float32 and one.predictions.shape[2] == tiny_chat.VOCAB
        for i, row in enumerate(rows):
            here = slice(len(row["input_ids"]))
            gap = np.abs(one.predictions[i, here] - other.predictions[i, here]).max()
            assert gap < 1e-3 * other.predictions[i, here].std()


def test_metrics_of_several_sets_have_their_names_and_choose_the_best(model):
    both = {"a": HELD_OUT[:1], "b": HELD_OUT}
    run = trainer(model, accuracy, lambda logits, labels: logits.argmax(-1), both)
    assert {"eval_a_accuracy", "eval_b_accuracy", "eval_a_loss"} < run.evaluate().keys()
    with pytest.raises(ValueError, match=r"'accuracy' is none of .*another after \['eval_a_', 'ev"):
        trainer(model, accuracy, None, both, metric_for_best_model="accuracy")
    run = trainer(
        model, accuracy, lambda x, y: x.argmax(-1), max_steps=2, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, metric_for_best_model="accuracy",
    )  # fmt: skip
    run.train()
    found = [row["eval_accuracy"] for row in run.log_history if "eval_accuracy" in row]
    assert len(found) == 2 and run.state.best_metric == max(found)
    assert run.evaluate()["eval_accuracy"] == max(found)


def test_one_rows_logits_are_made_at_a_time(model):
    shapes = []

    def reduce(logits, labels):
        shapes.append((logits.shape, labels.shape, type(logits)))
        return {"guess": logits.argmax(-1), "entropy": jax.nn.softmax(logits).max(-1)}

    run = trainer(model, lambda found: {"n": len(found.predictions["guess"])}, reduce)
    assert run.evaluate()["eval_n"] == 3
    assert {s[0][0] for s in shapes} == {1} and len(shapes) == 3
    assert all(s[0][:2] == s[1] and issubclass(s[2], jax.Array) for s in shapes)


def test_packed_rows_keep_every_tokens_label(model):
    ours, packed = Kept(), Kept()
    alone = trainer(model, ours).evaluate()
    together = trainer(model, packed, eval_packing=True, max_length=128).evaluate()
    assert together["eval_count"] == alone["eval_count"]
    assert together["eval_accuracy"] == pytest.approx(alone["eval_accuracy"])
    assert len(packed[0].label_ids) < len(ours[0].label_ids)


def test_what_is_no_dictionary_of_numbers_or_would_not_fit_is_refused(model):
    for answer in (0.5, {"a": np.zeros(2)}):
        with pytest.raises(TypeError, match="compute_metrics must return a dictionary of numbers"):
            trainer(model, lambda found, answer=answer: answer).evaluate()
    with pytest.raises(ValueError, match="host has .*give preprocess_logits_for_metrics too"):
        user_metrics._room(trainer(model, accuracy)._batches(), 10**11)


def test_parts_of_other_lengths_are_padded_as_in_transformers():
    parts = [jnp.ones((1, 2, 3)), jnp.ones((2, 4, 3))]
    joined = user_metrics._joined(parts)
    assert joined.shape == (3, 4, 3) and (joined[0, 2:] == -100).all() and joined[1:].min() == 1
    np.testing.assert_array_equal(user_metrics._joined([np.float32(1), np.ones(2)]), [1, 1, 1])
