"""Which checkpoints a run goes on from: of its own data, whole ones, older ones of its folder."""

import copy
import json
import shutil
from pathlib import Path

import datasets
import pytest
import tiny_chat

from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
from workflows import facts

SAME = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-2,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64, max_steps=4,
    save_strategy="steps", save_steps=2,
)  # fmt: skip


def trainer(model, output, rows=None, **changes) -> SFTTrainer:
    args = SFTConfig(**(SAME | {"output_dir": str(output)} | changes))
    rows = stream() if rows is None else rows
    return SFTTrainer(model=model, train_dataset=rows, args=args)


def stream(rows=tiny_chat.MESSAGES) -> datasets.IterableDataset:
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


def losses(run: SFTTrainer) -> list[float]:
    return [row["loss"] for row in run.log_history]


@pytest.fixture(scope="module")
def done(base, tmp_path_factory) -> tuple[Path, list[float]]:
    """(the folder of a whole run over a stream, its losses)."""
    base.adapters = None
    folder = tmp_path_factory.mktemp("whole") / "out"
    run = trainer(FastLanguageModel.get_peft_model(base, r=4), folder)
    run.train()
    return folder, losses(run)


@pytest.fixture
def out(done, tmp_path) -> Path:
    """A copy of that folder."""
    return Path(shutil.copytree(done[0], tmp_path / "out"))


def damage(checkpoint: Path) -> str:
    """Cuts its largest file to the half; the file's name."""
    files = (p for p in checkpoint.rglob("*") if p.is_file())
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    return largest.name


def test_a_run_goes_on_from_an_older_checkpoint_and_sets_later_ones_aside(fresh, done, out, capsys):
    for aside in (["superseded_4"], ["superseded_4", "superseded_4.1"]):
        run = trainer(fresh, out)
        run.train(resume_from_checkpoint=str(out / "checkpoint_2"))
        assert losses(run) == done[1]
        names = sorted(p.name for p in out.iterdir() if p.is_dir())
        assert names == ["checkpoint_2", "checkpoint_4", *aside]
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert "checkpoints [4], is now named superseded_" in capsys.readouterr().out


OTHERS = {
    "rows": (
        dict(rows=stream([*tiny_chat.MESSAGES[:7], tiny_chat.MESSAGES[0]])),
        "streamed, first 8 rows",
    ),
    "masks": (dict(assistant_only_loss=True), r"'assistant_only_loss': \(False, True\)"),
    "cutting": (dict(truncation=True), r"'truncation': \(False, True\)"),
    "a list": (dict(rows=tiny_chat.MESSAGES), "'data'"),
}


@pytest.mark.parametrize("how", OTHERS)
def test_a_stream_that_is_read_otherwise_is_refused(fresh, done, how):
    changes, named = OTHERS[how]
    with pytest.raises(ValueError, match=f"belongs to another run.*: .*{named}"):
        trainer(fresh, done[0], **changes).train(resume_from_checkpoint=True)


def test_another_chat_template_is_refused_for_a_stream(fresh, done, monkeypatch):
    other = copy.deepcopy(fresh.tokenizer)
    other.chat_template += " "
    monkeypatch.setattr(fresh, "tokenizer", other)
    with pytest.raises(ValueError, match="belongs to another run.*'chat template sha256'"):
        trainer(fresh, done[0]).train(resume_from_checkpoint=True)


def test_the_rows_by_which_a_stream_is_known_are_trained_on_too(fresh, done, tmp_path):
    rows = iter(tiny_chat.MESSAGES)
    once = datasets.IterableDataset.from_generator(lambda: rows)
    run = trainer(fresh, tmp_path, once)
    run.train()
    assert losses(run) == done[1]


def test_of_a_damaged_checkpoint_the_newest_whole_one_is_named(fresh, out, capfd):
    name = damage(out / "checkpoint_4")
    with pytest.raises(ValueError, match=f"checkpoint_4 is damaged.*{name} has") as error:
        trainer(fresh, out).train(resume_from_checkpoint=True)
    line = f"trainer.train(resume_from_checkpoint={str(out / 'checkpoint_2')!r})"
    assert str(error.value).endswith(line) and "Traceback" not in capfd.readouterr().err
    run = trainer(fresh, out)
    eval(line, {"trainer": run})
    assert (out / "superseded_4").is_dir() and run.state.global_step == 4
    damage(out / "checkpoint_2")
    with pytest.raises(ValueError, match="checkpoint_2 is damaged.*No older one there is whole"):
        trainer(fresh, out).train(resume_from_checkpoint=str(out / "checkpoint_2"))


def test_an_output_dir_that_cannot_be_written_is_named_before_the_run(fresh):
    run = trainer(fresh, "/proc/nowhere/out")
    with pytest.raises(OSError, match="output_dir='/proc/nowhere/out' can't be written: .*other"):
        run.train()
    assert run.log_history == []


class Asking:
    def on_step_end(self, args, state, control, **more):
        control.should_save = state.global_step == 3


def test_a_callback_that_asks_for_a_checkpoint_gets_one_without_a_save_strategy(fresh, tmp_path):
    run = trainer(fresh, tmp_path / "out", save_strategy="no")
    run.add_callback(Asking)
    run.train()
    assert [p.name for p in (tmp_path / "out").glob("checkpoint_*")] == ["checkpoint_3"]
    again = trainer(fresh, tmp_path / "out", save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(run)


def test_what_a_callback_asks_for_does_not_mix_with_an_earlier_run(fresh, out, monkeypatch):
    monkeypatch.chdir(out.parent)
    out.rename("unsloth_training_checkpoints")
    run = trainer(fresh, "unused", save_strategy="no")
    run.args.output_dir = None
    run.add_callback(Asking)
    with pytest.raises(FileExistsError, match="checkpoint 4 of an earlier run"):
        run.train()


CHANGED = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
    "lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"num_cycles": 2}, "weight_decay": 0.5,
    "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "max_grad_norm": 3.0,
    "optim": "lion", "optim_args": "k=1", "embedding_learning_rate": 1e-5,
    "loraplus_lr_ratio": 4.0, "packing": True, "seed": 7, "packing_strategy": "bfd_split",
    "train_sampling_strategy": "sequential", "group_by_length": True, "pad_to_multiple_of": 32,
}  # fmt: skip


def test_every_setting_that_changes_the_next_batch_or_update_is_a_fact(fresh, tmp_path):
    run = trainer(fresh, tmp_path)
    same = facts.of(run, 4, {})
    assert set(CHANGED) == set(facts.DECISIVE)
    for name, value in CHANGED.items():
        before = getattr(run.args, name)
        setattr(run.args, name, value)
        found = facts.of(run, 4, {})
        setattr(run.args, name, before)
        assert {k for k in found if found[k] != same[k]} == {name}
    assert facts.of(run, 5, {}) != same != facts.of(run, 4, {"data": "another"})
