"""report_to: metrics reach tensorboard by transformers' names; others are asked for by name."""

import pytest
import tiny_chat
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations.integration_utils import rewrite_logs

from unsloth_jax import FastLanguageModel, SFTConfig, SFTTrainer
from workflows import report_to

SAME = dict(
    per_device_train_batch_size=2, gradient_accumulation_steps=1, learning_rate=2e-2,
    lr_scheduler_type="constant", optim="adamw_torch", max_length=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model, _ = tiny_chat.load(tiny_chat.save(tmp_path_factory.mktemp("model")))
    return FastLanguageModel.get_peft_model(model, r=4)


def trained(model, **changes) -> SFTTrainer:
    run = SFTTrainer(
        model=model, train_dataset=tiny_chat.MESSAGES, eval_dataset=tiny_chat.MESSAGES[:2],
        args=SFTConfig(**(SAME | changes)),
    )  # fmt: skip
    run.train()
    return run


def events(folder) -> dict[str, list[tuple[int, float]]]:
    read = EventAccumulator(str(folder))
    read.Reload()
    return {tag: [(e.step, e.value) for e in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def test_tensorboard_holds_every_number_of_the_log_under_transformers_names(model, tmp_path):
    run = trained(
        model, max_steps=4, eval_strategy="steps", eval_steps=2, sample_prompts=["one two"],
        sample_max_new_tokens=2, output_dir=str(tmp_path), report_to="tensorboard",
    )  # fmt: skip
    found = events(tmp_path / "runs")
    assert {"train/loss", "train/learning_rate", "train/grad_norm", "eval/loss"} <= set(found)
    expected = {}
    for row in run.log_history:
        for name, value in rewrite_logs(row).items() if "samples" not in row else ():
            if name != "train/step":
                expected.setdefault(name, []).append((row["step"], pytest.approx(value)))
    assert found == expected
    assert [step for step, _ in found["eval/loss"]] == [2, 4]


def test_a_folder_and_a_name_say_where_tensorboards_files_go(model, tmp_path):
    trained(
        model, max_steps=1, logging_dir=str(tmp_path / "tb"), run_name="mine",
        report_to=["tensorboard"], eval_strategy="epoch",
    )  # fmt: skip
    assert "train/loss" in events(tmp_path / "tb" / "mine")


@pytest.mark.parametrize("nothing", [None, "none", [], ["none"]])
def test_nothing_is_reported_by_default(nothing):
    assert report_to.names(SFTConfig(report_to=nothing).report_to) == []


def test_all_are_those_that_are_installed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mlflow").mkdir()  # a folder of logs is no package
    found = report_to.names("all")
    assert "tensorboard" in found and "mlflow" not in found


@pytest.mark.parametrize(
    "asked, error, message",
    [
        ("tensorbord", ValueError, r"report_to names \['tensorbord'\], known: .*'tensorboard'"),
        (["tensorboard", "comet"], ValueError, r"names \['comet'\]"),
        (["none", "tensorboard"], ValueError, r"names \['none'\]"),
        ("clearml", ValueError, "known"),
        (5, TypeError, "report_to must be"),
    ],
)
def test_what_nothing_is_reported_to_is_refused(asked, error, message):
    with pytest.raises(error, match=message):
        SFTConfig(report_to=asked)


def test_a_program_that_is_not_installed_is_named_with_its_package(monkeypatch):
    monkeypatch.setitem(report_to.KNOWN, "no_such_tracker", None)
    with pytest.raises(ImportError, match="needs a package: pip install no_such_tracker"):
        SFTConfig(report_to=["tensorboard", "no_such_tracker"])
