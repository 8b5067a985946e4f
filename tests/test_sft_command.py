"""python -m workflows.sft: flags, files of settings, dry runs, and runs that are the same again."""

import json
import os
from dataclasses import fields

import jax
import pytest
import tiny_chat
import yaml

from unsloth_jax import FastLanguageModel, SFTConfig
from workflows import settings_file, sft, sft_settings
from workflows.plan import FRACTIONS
from workflows.run import short_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_chat.save(tmp_path_factory.mktemp("command") / "tiny")


@pytest.fixture
def there(folder, tmp_path, monkeypatch):
    """A folder with rows.jsonl, in which commands run; (its path, flags that every run needs)."""
    monkeypatch.chdir(tmp_path)
    lines = (json.dumps(row) + "\n" for row in tiny_chat.MESSAGES)
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    flags = f"--model-name {folder} --max-seq-length 128 --no-load-in-4bit --r 4 --max-steps 3"
    return tmp_path, [*flags.split(), "--train-dataset", "rows.jsonl", "--learning-rate", "1e-2"]


def everything(folder) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_command_trains_and_leaves_what_was_asked_for(there, folder, capsys):
    path, flags = there
    more = "--eval-dataset few=rows.jsonl all=rows.jsonl --eval-steps 2 --packing --save-merged"
    sft.main([*flags, *more.split(), "--train-on-responses-only", "--chat-template", "chatml"])
    out = path / "outputs"
    assert {"report.html", "run.json", "metrics.jsonl", "config.yaml"} <= everything(out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert {"eval_few_loss", "eval_all_loss"} <= {name for row in rows for name in row}
    adapted, tokenizer = FastLanguageModel.from_pretrained(str(out / "adapter"), 128)
    assert adapted.peft.rank == 4 and "<|im_start|>" in tokenizer.chat_template
    merged, _ = FastLanguageModel.from_pretrained(str(out / "merged"), 128)
    assert merged.adapters is None
    said = capsys.readouterr().out
    assert "report: outputs/report.html" in said and "adapter: outputs/adapter" in said


@pytest.mark.slow
def test_the_written_settings_give_the_same_adapters_to_the_byte(there):
    path, flags = there
    more = "--packing --warmup-steps 0 --lora-alpha 8 --lr-scheduler-type cosine"
    sft.main([*flags, *more.split(), "--output-dir", "a"])
    sft.main(["--config", "a/config.yaml", "--output-dir", "b"])
    sft.main(["--config", "a/config.yaml", "--output-dir", "c", "--learning-rate", "5e-3"])
    a, b, c = ((path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in "abc")
    assert a == b != c
    one, other = (settings_file.read(path / n / "config.yaml") for n in "ab")
    assert one | {"output_dir": "b"} == other and one["warmup_ratio"] == 0.0


@pytest.mark.slow
def test_a_run_goes_on_from_its_own_settings(there):
    path, flags = there
    saved = ["--save-strategy", "steps", "--save-steps", "1", "--no-save-adapter"]
    sft.main([*flags, *saved, "--output-dir", "whole"])
    sft.main([*flags, *saved, "--output-dir", "parts"])
    kept = path / "parts" / "metrics.jsonl"
    kept.write_text("".join(kept.read_text().splitlines(keepends=True)[:2]))
    for file in (path / "parts").glob("checkpoint_3*"):
        os.rename(file, path / "away")
    again = ["--config", "parts/config.yaml", "--resume", "--save-adapter"]
    sft.main(again)
    sft.main(["--config", "whole/config.yaml", "--resume", "--save-adapter"])
    parts, whole = (path / n / "adapter" / "adapter_model.safetensors" for n in ("parts", "whole"))
    assert parts.read_bytes() == whole.read_bytes()
    steps = [json.loads(line)["step"] for line in kept.read_text().splitlines()]
    assert steps == [1, 2, 3]


@pytest.mark.slow
def test_a_run_in_8_bits_leaves_settings_that_run_again(there, capsys):
    path, flags = there
    flags = [flag for flag in flags if flag != "--no-load-in-4bit"]
    sft.main([*flags, "--load-in-8bit", "--output-dir", "a"])
    written = settings_file.read(path / "a" / "config.yaml")
    assert (written["load_in_8bit"], written["load_in_4bit"]) == (True, False)
    assert json.loads((path / "a" / "run.json").read_text())["model"]["stored as"] == "int8"
    sft.main(["--config", "a/config.yaml", "--output-dir", "b"])
    a, b = ((path / n / "adapter" / "adapter_model.safetensors").read_bytes() for n in "ab")
    assert a == b
    sft.main(["--config", "a/config.yaml", "--dry-run"])
    assert "a dry run" in capsys.readouterr().out


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as ended:
        sft.main(["--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    names = {f.name for f in fields(SFTConfig)} | {"model_name", "load_in_4bit", "r", "lora_alpha"}
    names |= {"target_modules", "use_gradient_checkpointing", "config", "dry_run", "resume"}
    for name in names:
        assert f"--{name.replace('_', '-')}" in said, name
    assert "--token " not in said


def test_every_setting_of_the_face_is_a_flag_or_left_out_for_a_reason():
    known = {section: set(sft_settings.options(section)) for section in sft_settings.SOURCES}
    every = [name for names in known.values() for name in names]
    assert len(every) == len(set(every)), "a flag of two sections"
    assert known["training"] == {f.name for f in fields(SFTConfig)} - {"max_seq_length"}


@pytest.mark.parametrize("section", sft_settings.SOURCES)
def test_every_default_can_be_written_and_read_again(section, tmp_path):
    defaults = {name: o.default for name, o in sft_settings.options(section).items()}
    (tmp_path / "a.yaml").write_text(settings_file.written({section: defaults}, "a\nb"))
    assert settings_file.read(tmp_path / "a.yaml") == settings_file.plain(defaults)


def test_a_dry_run_shows_data_mask_steps_and_memory_and_writes_nothing(there, capsys, monkeypatch):
    path, flags = there
    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    before = everything(path)
    more = "--packing --train-on-responses-only --dry-run --gpu 24GB --eval-dataset rows.jsonl"
    sft.main([*flags, *more.split()])
    assert everything(path) == before
    said = capsys.readouterr().out
    for part in ("rows.jsonl: messages in rows of columns ['messages']", "8 rows,", "steps: 3",
                 "<|im_end|>]]", "75% of a GPU of 24GB",
                 "residuals", "* "):  # fmt: skip
        assert part in said, part


def test_a_dry_run_reads_no_weights(there, folder, tmp_path, capsys):
    _, flags = there
    for name in ("config.json", *tiny_chat.TOKENIZER_FILES):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"no weights")
    sft.main([*flags, "--model-name", str(tmp_path / "bare"), "--dry-run", "--use-rslora"])
    assert "a dry run" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="model.safetensors"):
        sft.main([*flags, "--model-name", str(tmp_path / "bare")])


def test_a_dry_run_of_a_plan_that_fits_nowhere_says_what_would(there, capsys):
    _, flags = there
    sft.main([*flags, "--dry-run", "--memory-budget", "1MB"])
    assert "don't fit into" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, error",
    [
        (
            "learning_rat: 1",
            r"a\.yaml: unknown key 'learning_rat'; nearest known: \['learning_rate",
        ),
        ("max_steps: many", r"a\.yaml: max_steps must be int, got 'many'"),
        ("packing: 1", r"a\.yaml: packing must be bool, got 1"),
        ("r: 4\nr: 8", r"a\.yaml is no YAML: line 2: the key 'r' comes twice"),
        ("- r", r"a\.yaml holds no settings"),
        ("dry_run: true", r"a\.yaml: unknown key 'dry_run'"),
        ("optim: adam", "optim 'adam' is not supported"),
        ("eval_dataset: nowhere.jsonl", "no data file nowhere.jsonl"),
        ("save_gguf: [q9]", "q9"),
        ("system_message: hi", "system_message needs a chat_template"),
        ("instruction_part: hi", "need train_on_responses_only"),
        ("eval_dataset: [a.jsonl, b.jsonl]", "need a name each, as name=path"),
        ("load_in_fp8: true", "load_in_fp8=True is not supported yet"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_before_anything_is_trained(there, text, error):
    path, flags = there
    (path / "a.yaml").write_text(text + "\n")
    with pytest.raises(SystemExit, match=error):
        sft.main([*flags, "--config", "a.yaml"])
    assert not (path / "outputs").exists()


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--learning-rat 1", "--learning-rate"),
        ("--max-steps many", "--max-steps"),
    ],
)
def test_a_wrong_flag_names_the_nearest(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        sft.main(flags.split())
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_flags_win_over_the_file_and_the_file_over_defaults(there):
    path, _ = there
    (path / "a.yaml").write_text("learning_rate: 2e-4\nseed: 1\nsave_strategy: no\nbf16: true\n")
    given = sft_settings.parsed(["--config", "a.yaml", "--seed", "2"], "p", "d")
    assert given["training"] == {
        "learning_rate": 2e-4, "seed": 2, "save_strategy": "no", "bf16": True
    }  # fmt: skip
    assert sft_settings.complete(given)["training"]["output_dir"] == "outputs"


@pytest.mark.parametrize(
    "line, section, expected",
    [
        ("--target-modules q_proj", "adapters", {"target_modules": ["q_proj"]}),
        ("--target-modules all-linear", "adapters", {"target_modules": "all-linear"}),
        ("--target-modules q_proj v_proj", "adapters", {"target_modules": ["q_proj", "v_proj"]}),
        ("--use-gradient-checkpointing False", "adapters", {"use_gradient_checkpointing": False}),
        ("--layers-to-transform 0 1", "adapters", {"layers_to_transform": [0, 1]}),
        ("--memory-budget 20GB --no-packing", "training",
         {"memory_budget": "20GB", "packing": False}),
        ("--eval-steps 0.5", "training", {"eval_steps": 0.5}),
        ("--lr-scheduler-kwargs {num_cycles:\t2}", "training",
         {"lr_scheduler_kwargs": {"num_cycles": 2}}),
    ],
)  # fmt: skip
def test_flags_mean_what_the_face_takes(line, section, expected):
    words = [word.replace("\t", " ") for word in line.split(" ")]
    assert sft_settings.parsed(words, "p", "d")[section] == expected


@pytest.mark.parametrize(
    "text, value",
    [("2e-4", 2e-4), ("1e3", 1e3), ("no", "no"), ("on", "on"), ("true", True), ("12", 12),
     ("-0.5", -0.5), ("~", None), ("null", None), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
     ("[1, a]", [1, "a"]), ("1.", 1.0), ("'7'", "7")],
)  # fmt: skip
def test_yaml_values_are_those_of_version_1_2(text, value):
    found = settings_file.value(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", ["no", "2e-4", "1:30", "true", "7", "", "a: b", "# c", "ü\n"])
def test_a_text_that_looks_like_something_else_is_written_in_quotes(text, tmp_path):
    (tmp_path / "a.yaml").write_text(settings_file.written({"s": {"key": text}}, "head"))
    assert settings_file.read(tmp_path / "a.yaml") == {"key": text}
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == {"key": text}


def test_folders_of_an_earlier_run_are_found_before_training(there):
    path, flags = there
    (path / "outputs" / "adapter").mkdir(parents=True)
    (path / "outputs" / "adapter" / "mine").write_text("kept")
    for more, why in (([], "of an earlier run"), (["--overwrite"], "that no export made")):
        with pytest.raises(SystemExit, match=f"outputs/adapter hold files {why}"):
            sft.main([*flags, *more])
    assert everything(path / "outputs") == {"adapter", "adapter/mine"}


@pytest.mark.slow
def test_an_adapter_folder_is_trained_on(there, folder):
    path, flags = there
    sft.main([*flags, "--output-dir", "a", "--lora-alpha", "8"])
    held, _ = FastLanguageModel.from_pretrained(str(path / "a" / "adapter"), 128)
    before = short_hash(held.adapters)
    data = ["--train-dataset", "rows.jsonl", "--max-seq-length", "128", "--no-load-in-4bit"]
    more = ["--model-name", "a/adapter", "--max-steps", "2", "--output-dir", "b"]
    sft.main([*data, *more])
    found = settings_file.read(path / "b" / "config.yaml")
    assert (found["r"], found["lora_alpha"]) == (4, 8)
    model, _ = FastLanguageModel.from_pretrained(str(path / "b" / "adapter"), 128)
    assert short_hash(model.adapters) != before
    same = jax.tree.structure(model.adapters) == jax.tree.structure(held.adapters)
    assert same and model.peft.rank == 4
